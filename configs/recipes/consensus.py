"""The mean of the proposals' probabilities as a soft label, on strong views.

Sees only images of which mining makes a pair, so none on which all proposals are equal.
"""

from configs.recipes import without_pairs


def apply(config):
  without_pairs(config)
  config.finetune.augment = True
  config.finetune.strong = True
  config.finetune.terms.consensus.weight = 1.0
