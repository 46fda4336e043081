"""weak_to_strong, its judge's top proposals as labels, then RN-DPO on pairs that lie far apart."""

from configs.recipes import weak_to_strong, weak_to_strong_rn_dpo, weak_to_strong_top1

THIRD = {
  **weak_to_strong_rn_dpo.SECOND,
  "finetune.terms.chosen.weight": 0.0,
  "finetune.strong": False,
  "mine.rule": "top_vs_bottom",
}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = ({}, weak_to_strong_top1.SECOND, THIRD)
