"""A strong base first, preferences after: weak_to_strong, then RN-DPO on pairs mined from it."""

from configs.recipes import weak_to_strong

SECOND = {
  "finetune.terms.weak_to_strong.weight": 0.0,
  "finetune.terms.labelled.weight": 0.0,
  "finetune.terms.preference.weight": 1.0,
  "finetune.augment": True,
  "finetune.reference": "online",
  "finetune.ema_decay": 0.0,
  "finetune.num_steps": 400,
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, SECOND)
