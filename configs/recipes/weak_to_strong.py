"""The moving average's sure classes of the weak view, learned on strong views with CutMix.

FixMatch (Sohn et al., 2020) and UniMatch (Yang et al., 2023), without the latter's further views.
"""

from configs.recipes import average, without_pairs


def apply(config):
  without_pairs(config)
  average(config)
  config.finetune.terms.weak_to_strong.weight = 1.0
  config.finetune.num_steps = 1600
  config.finetune.eval_every_steps = 100
