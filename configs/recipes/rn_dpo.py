"""RN-DPO: the preference update divided by the size of the region where the two masks differ."""


def apply(config):
  config.finetune.objective = "rn_dpo"
  config.finetune.beta = 10.0
