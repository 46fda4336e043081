"""Preferences alone, summed over the region: DPO (Rafailov et al., 2023)."""

from configs.recipes import rn_dpo


def apply(config):
  rn_dpo.apply(config)
  config.finetune.objective = "dpo"
  config.finetune.beta = 0.03
