"""DPO: sums over the region where the two masks differ, not divided by its size."""


def apply(config):
  config.finetune.objective = "dpo"
  config.finetune.beta = 0.1
