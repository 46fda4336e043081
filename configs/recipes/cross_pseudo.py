"""Two networks that learn each other's classes (Chen et al., 2021)."""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
  config.base.num_members = 2
  config.finetune.terms.cross_pseudo.weight = 1.0
  config.finetune.ramp_steps = 100
