"""A rule of `pair_rules` as a function of scores and region sizes, by the config.

Neither depends on the size of the masks, so that proposals scored on the host, or of whole images,
can be paired without their masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rndpo_jax import config as config_lib
from rndpo_jax import types
from rndpo_jax.mining import overlap, pair_rules


class Ranked(NamedTuple):
  """What a rule needs of proposals that were scored elsewhere.

  Attributes:
    index: i32[b], as in `types.Batch`.
    sizes: i32[b, K, K], of `make_sizes`.
    scores: f32[b, K].
    present: bool[b, K], as in `types.Proposals`.
  """

  index: types.Array
  sizes: types.Array
  scores: types.Array
  present: types.Array | None


def make_sizes(config, dataset) -> Callable:
  """Masks u8[b, K, *S] -> |D| of each two of an image, i32[b, K, K]."""
  classes = config_lib.region_classes(config)
  return lambda masks: overlap.pairwise_region_size(masks, dataset.num_classes, classes)


def make_rule(config) -> Callable:
  """(keys [b, 3], sizes, scores, present) -> `types.Pairs`, by `config.mine`."""
  options = {
    "rule": config.mine.rule,
    "pairs_per_image": config.mine.pairs_per_image,
    "min_score_gap": config.mine.min_score_gap,
    "min_region_size": config.mine.min_region_size,
    "max_region_size": config.mine.max_region_size,
  }

  def rule(keys, sizes, scores, present=None) -> types.Pairs:
    return pair_rules.mine(scores, sizes, keys[:, 2], present=present, **options)

  return rule


def make_rule_ranked(config) -> Callable:
  """(None, keys, Ranked) -> `types.Pairs`: the rule, for a judge on the host."""
  rule = make_rule(config)
  return lambda weights, keys, ranked: rule(keys, *ranked[1:])
