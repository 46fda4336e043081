"""weak_to_strong_affine, then RN-DPO on pairs mined from it."""

from configs.recipes import weak_to_strong, weak_to_strong_affine, weak_to_strong_rn_dpo


def apply(config):
  weak_to_strong.apply(config)
  config.phases = (weak_to_strong_affine.FIRST, weak_to_strong_rn_dpo.SECOND)
