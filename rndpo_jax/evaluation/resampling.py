"""Bootstrap over groups of cases: those of one patient say much the same, so they stay together.

A group is what the splits never cut, `group_id` of a record: the case itself unless
`config.data.group_pattern` says else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def places(group_ids: Sequence[str]) -> np.ndarray:
  """The number of each case's group, i64[n], groups numbered as they first appear."""
  names = np.asarray(group_ids, dtype=str)
  _, first, of_sorted = np.unique(names, return_index=True, return_inverse=True)
  return np.argsort(np.argsort(first))[of_sorted]


def ratios(
  above: np.ndarray,
  below: np.ndarray | float,
  group_ids: Sequence[str],
  *,
  num_resamples: int,
  seed: int,
) -> np.ndarray:
  """sum(above) / sum(below) of resamples of the groups, f64[num_resamples].

  Args:
    above: f64[n], one a case, n >= 1.
    below: f64[n], or 1 for a mean over cases.
    group_ids: n, the group of each case.
    num_resamples: each draws as many groups as there are, with replacement.
    seed: of the draws.
  """
  place = places(group_ids)
  weights = above, np.broadcast_to(below, np.shape(above))
  tops, bottoms = (np.bincount(place, weights=values) for values in weights)
  draws = np.random.default_rng(seed).integers(0, len(tops), (num_resamples, len(tops)))
  return tops[draws].sum(axis=1) / bottoms[draws].sum(axis=1)
