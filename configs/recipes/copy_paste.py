"""Boxes of labelled images in unlabelled ones and the other way round (Bai et al., 2023)."""

from configs.recipes import average, without_pairs


def apply(config):
  without_pairs(config)
  average(config)
  config.finetune.terms.labelled.weight = 0.0
  config.finetune.terms.copy_paste.weight = 1.0
