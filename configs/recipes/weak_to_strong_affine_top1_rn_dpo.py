"""weak_to_strong_affine, its judge's top proposals as labels, then RN-DPO."""

from configs.recipes import (
  weak_to_strong,
  weak_to_strong_affine,
  weak_to_strong_top1,
  weak_to_strong_top1_rn_dpo,
)


def apply(config):
  weak_to_strong.apply(config)
  config.phases = (
    weak_to_strong_affine.FIRST,
    weak_to_strong_top1.SECOND,
    weak_to_strong_top1_rn_dpo.THIRD,
  )
