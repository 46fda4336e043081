"""What a mined pair weighs in training: by its size, and by how often such pairs are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def gradient_mass(
  size: np.ndarray,
  *,
  normalizations: Sequence[str],
  weights: Sequence[float],
  exponent: float,
  floor: float,
  voxel_volume: np.ndarray | float = 1.0,
) -> np.ndarray:
  """L1 mass of a pair's gradient on the logits at step 0, up to a factor that all pairs share.

  There h = 0, so an objective has one slope d loss / d(s h) for every pair, and the gradient is
  that times s on each of the |D| pixels: mass = s |D|, which is |D| under none, 1 under region and
  |D| / max(|D|, floor)^exponent under power. Of several objectives it is the sum of their weights
  times theirs, their slopes taken as equal.

  Args:
    size: i[...], |D| in pixels.
    normalizations: of each objective, names of `objectives.NORMALIZATIONS`.
    weights: of each objective.
    exponent: of power. floor: of power, in the unit of size * voxel_volume.
    voxel_volume: f, broadcastable to `size`; what a pixel stands for.

  Returns:
    f64, like `size`; 0 where |D| = 0.
  """
  size = np.asarray(size, np.float64) * voxel_volume
  mass = {
    "none": size,
    "region": (size > 0).astype(np.float64),
    "power": size / np.maximum(size, floor) ** exponent,
  }
  return sum(w * mass[name] for name, w in zip(normalizations, weights, strict=True))


def worth_of_pairs(
  gap: np.ndarray, calibration: dict | None, *, kind: str, min_probability: float = 0.0
) -> np.ndarray:
  """The weight of pairs in training, by the gap between their scores.

  With a the share of pairs of such a gap that the judge had right on validation: `none` 1,
  `score_gap` the gap, `reliability` max(2 a - 1, 0); and 0 if a is below `min_probability`.

  Args:
    gap: f[...], score gaps.
    calibration: of `calibration`; None unless `reads_calibration`.
    kind: `config.finetune.pair_weight`.
    min_probability: `config.finetune.min_pair_probability`.

  Returns:
    f64, like `gap`.
  """
  gap = np.asarray(gap, np.float64)
  if not reads_calibration(kind, min_probability):
    return gap if kind == "score_gap" else np.ones_like(gap)
  right = _share_right(gap, calibration)
  worth = {"none": 1.0, "score_gap": gap, "reliability": np.maximum(2.0 * right - 1.0, 0.0)}[kind]
  return np.where(right >= min_probability, worth, 0.0)


def smoothing_of_pairs(gap: np.ndarray, calibration: dict) -> np.ndarray:
  """The probability that a pair is the wrong way round, by the gap between its scores.

      e = 1 - max(a, 1/2)

  with a the share of pairs of such a gap that the judge had right on validation. It is the label
  smoothing of `objectives.cdpo` (Mitchell, "A note on DPO with noisy preferences", 2023), which
  then has its minimum where the policy prefers the chosen mask with probability a. No pair is
  turned round: where the judge is right less often than not, e is 1/2 and holds h at 0.

  Args:
    gap: f[...], score gaps.
    calibration: of `calibration`.

  Returns:
    f64 in 0..1/2, like `gap`.
  """
  return 1.0 - np.maximum(_share_right(np.asarray(gap, np.float64), calibration), 0.5)


def _share_right(gap, calibration):
  """Of the pairs of such gaps, f64 like `gap`."""
  place = np.searchsorted(np.array(calibration["gap_edges"]), gap)
  return np.array(calibration["accuracy"], np.float64)[place]


def reads_calibration(kind: str, min_probability: float) -> bool:
  """Whether `worth_of_pairs` needs to know how often the judge is right."""
  return kind == "reliability" or min_probability > 0


def calibration(scores: np.ndarray, truth: np.ndarray, *, num_bins: int = 4) -> dict:
  """How often a judge is right, by the gap between its two scores.

  Pairs that differ in truth and in score are put into bins of equal count by score gap.

  Args:
    scores: f[N, K], the judge's.
    truth: f[N, K], the true scores.
    num_bins: wanted; fewer if there are fewer distinct gaps. None is empty.

  Returns:
    {"gap_edges": the inner edges, ascending, "accuracy": share of pairs right of each bin, one
    more than edges}; without any pair one bin with accuracy 0.5.
  """
  scores, truth = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
  first, second = np.triu_indices(scores.shape[1], 1)
  gap, true_gap = scores[:, first] - scores[:, second], truth[:, first] - truth[:, second]
  usable = np.isfinite(gap) & (gap != 0) & (true_gap != 0)
  gap, right = np.abs(gap[usable]), (gap * true_gap > 0)[usable]
  if not gap.size:
    return {"gap_edges": [], "accuracy": [0.5]}
  edges = np.unique(np.quantile(gap, np.arange(1, num_bins) / num_bins))
  # Equal gaps can leave a bin empty, of which nothing is known: the one below takes it in.
  counts = np.bincount(np.searchsorted(edges, gap), minlength=len(edges) + 1)
  edges = edges[counts[1:] > 0]
  bins = np.searchsorted(edges, gap)
  accuracy = np.bincount(bins, weights=right) / np.bincount(bins)
  return {"gap_edges": edges.tolist(), "accuracy": accuracy.tolist()}
