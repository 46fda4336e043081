"""A strong base first: weak_to_strong, then its judge's top proposals as labels."""

from configs.recipes import weak_to_strong

SECOND = {
  "finetune.terms.weak_to_strong.weight": 0.0,
  "finetune.terms.chosen.weight": 1.0,
  "finetune.augment": True,
  "finetune.strong": True,
  "finetune.ema_decay": 0.0,
  "finetune.num_steps": 400,
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, SECOND)
