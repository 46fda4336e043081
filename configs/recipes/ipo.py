"""Preferences alone, towards a fixed margin: IPO (Azar et al., 2023) under region normalization."""

from configs.recipes import rn_dpo


def apply(config):
  rn_dpo.apply(config)
  config.finetune.objective = "ipo"
  config.finetune.normalization = "region"
  config.finetune.beta = 1.0
