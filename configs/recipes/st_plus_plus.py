"""Self-training, first on the images that are reliable, then on all (ST++: Yang et al., 2022).

Reliable is the half on which the checkpoints of the first phase agree most. Each phase's labels are
those of the one before. ST++ tells it by checkpoints of the supervised training, and starts again
from its first weights in each phase.
"""

from configs.recipes import self_training


def apply(config):
  self_training.apply(config)
  config.finetune.num_steps = 100
  config.phases = (
    {"finetune.num_steps": 200},
    {"finetune.reliable_share": 0.5},
    {},
  )
