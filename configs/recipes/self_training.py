"""Pseudo-labels of the frozen base, learned on strong views (Lee, 2013)."""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
  config.finetune.terms.pseudo.weight = 1.0
