"""Consistency with the moving average under noise (Tarvainen and Valpola, 2017)."""

from configs.recipes import average, without_pairs


def apply(config):
  without_pairs(config)
  average(config)
  config.finetune.terms.consistency.weight = 10.0
  config.finetune.ramp_steps = 100
