"""weak_to_strong, and then the same with preferences beside it, on pairs mined from its result."""

from configs.recipes import weak_to_strong

SECOND = {
  # Its gradient's mass is beta / 2 a pair, where that of a cross-entropy is 1 at most.
  "finetune.terms.preference.weight": 0.1,
  "finetune.augment": True,
  "finetune.reference": "online",
  "finetune.num_steps": 400,
  "finetune.eval_every_steps": 50,
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, SECOND)
