"""Harm accounting: how much of the gradient comes from pairs that are the wrong way round.

Of pairs whose truth is known, a pair is wrong if its rejected mask is truly better. Preference
training at a policy gives pair i a gradient on the logits whose L1 mass is, up to a factor that all
share, with h = margin(policy) - margin(base) summed over D and S the sigmoid,

    none   (DPO)      w |D| beta_none S(-beta_none h)
    region (RN-DPO)   w beta_region S(-beta_region h / |D|)

In a tile of a whole image's pair h and |D| are of the tile, and the pair weighs there what
`pair_batches.tile_weights` says: times 1 (none), or the tile's share of the image's D (region).

This is the slope of -log S; other objectives have another slope, and the same mass at step 0. The
two are compared at matched betas, beta_region = beta_none median |D|, so that they act alike on a
pair of the median size (Kalisch et al., "Region-Normalized DPO", 2026, say that region
normalization keeps large wrong regions from ruling the update: the shares by |D| test that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = ("region", "none")


def matched_betas(
  beta: float, normalization: str, exponent: float, median_size: float, floor: float = 1.0
) -> dict[str, float]:
  """Beta under each of KINDS that acts on a pair of the median size as `beta` does.

  Args:
    beta: of the run. normalization, exponent: of its objective, see `losses.objectives`.
    median_size: |D|, above 0, in the unit that the run's beta is for.
    floor: of power, in that unit.
  """
  power = {"none": 0.0, "region": 1.0, "power": exponent}[normalization]
  divided_by = max(median_size, floor) if normalization == "power" else median_size
  none = beta * divided_by**-power
  return {"none": none, "region": none * median_size}


def gradient_mass(h: np.ndarray, size: np.ndarray, beta: float, kind: str) -> np.ndarray:
  """The mass above with w = 1, f64[...], of one of KINDS.

  Args:
    h: in nats. size: |D|, above 0. Both in pixels, or both times what a pixel stands for.
    beta: of this kind.
  """
  scale = 1.0 if kind == "none" else 1.0 / size
  slope = beta * scale * np.exp(-np.logaddexp(0.0, beta * scale * h))
  return slope * size


def account(
  steps: Sequence[int],
  h: np.ndarray,
  size: np.ndarray,
  gain: np.ndarray,
  weight: np.ndarray,
  share: np.ndarray,
  *,
  edges: Sequence[int],
  beta: float,
  normalization: str,
  exponent: float = 0.5,
  floor: float = 1.0,
  voxel_volume: np.ndarray | float = 1.0,
) -> dict[str, Any]:
  """Adds up right and wrong.

  Args:
    steps: T checkpoints, the base (step 0) first.
    h: f[T, ...], of each pair at each checkpoint, in nats.
    size: i[...], |D| in pixels.
    gain: f[...], true Dice of the chosen mask minus that of the rejected one; pairs with 0 are
      neither right nor wrong, and left out.
    weight: f[...] >= 0, w; 0 if a slot has no pair.
    share: f[...] in 0..1, of a tile in the image's |D|; 1 if the pair is of all of it.
    edges: region sizes between bins, rising.
    beta: of the run. normalization, exponent, floor: of its objective.
    voxel_volume: what a pixel stands for in training, such as mm^2; shaped to broadcast with size.

  Returns:
    {"num_pairs", "wrong_share" (of the pairs), "median_region_size", "beta": {kind: beta},
    "bins": [{"from", "below" (None: no end), "num_pairs", "wrong_share"}, ...],
    "curve": [{"step", "h_per_pixel": {"right", "wrong"} (means of h / |D|),
    kind: {"wrong_mass": share of the mass that comes from wrong pairs, "bins": [{"mass",
    "wrong_mass"}, ...] shares of the whole mass}}, ...]}. What has no pair is None.
  """
  counted = (np.asarray(weight) > 0) & (np.asarray(gain) != 0) & (np.asarray(size) > 0)
  h = np.asarray(h, np.float64)[:, counted]
  volume = np.broadcast_to(np.asarray(voxel_volume, np.float64), counted.shape)[counted]
  size, gain, weight, share = (
    np.asarray(x, np.float64)[counted] for x in (size, gain, weight, share)
  )
  weights = {"region": weight * share, "none": weight}
  wrong, places = gain < 0, np.searchsorted(np.asarray(edges), size, side="right")
  median = float(np.median(size)) if size.size else None
  typical = float(np.median(size * volume)) if size.size else 1.0
  betas = matched_betas(beta, normalization, exponent, typical, floor)
  ends = [0, *edges, None]
  bins = [
    {"from": ends[b], "below": ends[b + 1], **_counts(wrong[places == b])}
    for b in range(len(ends) - 1)
  ]
  curve = []
  for step, margin in zip(steps, h, strict=True):
    per_pixel = margin / size
    point = {"step": int(step)}
    point["h_per_pixel"] = {"right": _mean(per_pixel[~wrong]), "wrong": _mean(per_pixel[wrong])}
    for kind in KINDS:
      mass = weights[kind] * gradient_mass(margin * volume, size * volume, betas[kind], kind)
      point[kind] = _shares(mass, wrong, places, len(bins))
    curve.append(point)
  return {
    **_counts(wrong),
    "median_region_size": median,
    "beta": betas,
    "bins": bins,
    "curve": curve,
  }


def _counts(wrong) -> dict[str, Any]:
  return {"num_pairs": int(wrong.size), "wrong_share": _mean(wrong)}


def _mean(values) -> float | None:
  return float(np.mean(values)) if values.size else None


def _shares(mass, wrong, places, num_bins) -> dict[str, Any]:
  """Of the whole mass: the wrong pairs' share, and each bin's."""
  whole = mass.sum()
  if not whole > 0:
    return {"wrong_mass": None, "bins": [{"mass": None, "wrong_mass": None}] * num_bins}
  inside = [np.bincount(places, m, num_bins) / whole for m in (mass, mass * wrong)]
  return {
    "wrong_mass": float(mass[wrong].sum() / whole),
    "bins": [{"mass": float(m), "wrong_mass": float(w)} for m, w in zip(*inside, strict=True)],
  }
