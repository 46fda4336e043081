"""The judge's top proposal as a label, on strong views, beside the labelled images.

Of images of which mining makes a pair: those on which all proposals are equal are not seen.
"""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
  config.finetune.augment = True
  config.finetune.strong = True
  config.finetune.terms.chosen.weight = 1.0
