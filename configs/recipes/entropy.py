"""Entropy minimisation on unlabelled images (Grandvalet and Bengio, 2004)."""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
  config.finetune.terms.entropy.weight = 0.1
