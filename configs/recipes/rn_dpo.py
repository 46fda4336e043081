"""Preferences alone, divided by the size of the region: RN-DPO (Kalisch et al., 2026)."""


def apply(config):
  config.finetune.augment = True
  config.finetune.reference = "online"
  config.finetune.num_steps = 400
