"""A strong base first: weak_to_strong, then RN-DPO on pairs made while training.

Without mining and its judge: the policy proposes, the moving average judges (Guo et al., 2024).
"""

from configs.recipes import weak_to_strong

SECOND = {
  "finetune.terms.weak_to_strong.weight": 0.0,
  "finetune.terms.labelled.weight": 0.0,
  "finetune.terms.online.weight": 1.0,
  "finetune.num_steps": 400,
  "finetune.eval_every_steps": 50,
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, SECOND)
