"""A strong base first, preferences after: weak_to_strong, then DPO on pairs mined from it."""

from configs.recipes import weak_to_strong, weak_to_strong_rn_dpo

SECOND = {
  **weak_to_strong_rn_dpo.SECOND,
  "finetune.objective": "dpo",
  "finetune.beta": 0.03,
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, SECOND)
