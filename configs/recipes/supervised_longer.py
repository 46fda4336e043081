"""The base's own training, on labelled images alone, as many steps more."""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
