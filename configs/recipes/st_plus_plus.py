"""Self-training in two rounds, the second one's labels being the first one's (Yang et al., 2022).

Without the choice of reliable images first that ST++ makes.
"""

from configs.recipes import self_training


def apply(config):
  self_training.apply(config)
  config.finetune.num_steps = 200
  config.finetune.rounds = 2
