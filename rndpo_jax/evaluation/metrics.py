"""Overlap and surface measures of a mask against a label.

Overlap (Dice, IoU) runs on the device, or from pixel counts on the host, where the slices of a
case simply add up. Surface distances run on the host (scipy.ndimage).

Empty masks, everywhere: both empty is a perfect result; exactly one empty is the worst one (Dice,
IoU and NSD 0, the image's diagonal as distance). Leaving such cases out would flatter a segmenter
that misses a structure, so they stay in, and the callers count them.

Ignored pixels of a label (`types.IGNORED`), everywhere: background in mask and label alike, so that
what was predicted there counts neither for nor against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from rndpo_jax import types
from rndpo_jax.types import Array

# Relative, of NSD's tolerance: more than the rounding of a float32 spacing (6e-8) makes.
_SLACK = 1e-6


class Metric(NamedTuple):
  """A row of the table; what computes it is `overlap`, or `surface_metrics` if `surface`.

  Attributes:
    title: in tables.
    surface: whether it is of surface distances, which are slow, and asked for by name.
    distance: whether it has the unit of the spacing, and lower is better; else it is in 0..1.
    options: keys of `config.evaluate` that it alone reads.
  """

  title: str
  surface: bool = False
  distance: bool = False
  options: tuple[str, ...] = ()


METRICS = {
  "dice": Metric("Dice"),
  "iou": Metric("IoU"),
  "hd95": Metric("HD95", surface=True, distance=True),
  "hd100": Metric("HD100", surface=True, distance=True),
  "assd": Metric("ASSD", surface=True, distance=True),
  "nsd": Metric("NSD", surface=True, options=("nsd_tolerance_mm",)),
}
SURFACE = tuple(name for name, row in METRICS.items() if row.surface)


def dice(masks: Array, labels: Array, num_classes: int, spatial_dims: int) -> jax.Array:
  """Dice overlap of each foreground class: 2 |A and B| / (|A| + |B|).

  Source: Dice, "Measures of the Amount of Ecologic Association Between Species", 1945.

  Args:
    masks: integers[..., *S] class ids.
    labels: integers[..., *S] of the same rank, class ids or IGNORED; leading axes may be 1 to
      broadcast.
    num_classes: C, background (0) among them.
    spatial_dims: how many trailing axes are S.

  Returns:
    f32[..., C - 1] in 0..1; 1 if both are empty, 0 if exactly one is.
  """
  intersection, total = _overlap(masks, labels, num_classes, spatial_dims)
  return jnp.where(total > 0, 2 * intersection / jnp.maximum(total, 1), 1).astype(jnp.float32)


def iou(masks: Array, labels: Array, num_classes: int, spatial_dims: int) -> jax.Array:
  """Intersection over union of each foreground class: |A and B| / |A or B|.

  Source: Jaccard, "The Distribution of the Flora in the Alpine Zone", 1912.

  Args and returns: as `dice`, and likewise 1 if both are empty, 0 if exactly one is.
  """
  intersection, total = _overlap(masks, labels, num_classes, spatial_dims)
  union = total - intersection
  return jnp.where(union > 0, intersection / jnp.maximum(union, 1), 1).astype(jnp.float32)


def _overlap(masks, labels, num_classes, spatial_dims):
  """Pixels of A and B, and of A plus B: two i32[..., C - 1]; integers, so exact."""
  masks, labels = jnp.asarray(masks), jnp.asarray(labels)
  if masks.ndim != labels.ndim or masks.shape[-spatial_dims:] != labels.shape[-spatial_dims:]:
    raise ValueError(
      f"masks {masks.shape} and labels {labels.shape}: expected the same rank and the same last "
      f"{spatial_dims} axes; insert axes of size 1 into labels"
    )
  axes = tuple(range(-spatial_dims, 0))
  known = labels != types.IGNORED
  intersection, total = [], []
  for c in range(1, num_classes):
    a, b = (masks == c) & known, labels == c
    intersection.append(jnp.sum(a & b, axis=axes, dtype=jnp.int32))
    total.append(jnp.sum(a, axis=axes, dtype=jnp.int32) + jnp.sum(b, axis=axes, dtype=jnp.int32))
  return jnp.stack(intersection, axis=-1), jnp.stack(total, axis=-1)


def entropy(logits: Array) -> jax.Array:
  """Entropy of a pixel's class distribution, in nats, mean over the pixels.

  Args:
    logits: f[B, *S, C], C >= 2.

  Returns:
    f32[B], 0 to log C.
  """
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -_pixel_mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))


def kl_divergence(logits: Array, reference_logits: Array) -> jax.Array:
  """KL(policy || reference) of a pixel's class distribution, in nats, mean over the pixels.

  Args:
    logits: f[B, *S, C], C >= 2, of the policy.
    reference_logits: likewise.

  Returns:
    f32[B], >= 0 but for rounding.
  """
  log_probs, reference = (
    jax.nn.log_softmax(z.astype(jnp.float32), axis=-1) for z in (logits, reference_logits)
  )
  return _pixel_mean(jnp.sum(jnp.exp(log_probs) * (log_probs - reference), axis=-1))


def _pixel_mean(values):
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def without_ignored(mask: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mask and label u8[*S] with background where the label is ignored."""
  ignored = label == types.IGNORED
  return (
    (np.where(ignored, 0, mask), np.where(ignored, 0, label)) if ignored.any() else (mask, label)
  )


def pixel_counts(mask: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts the pixels of each class; the counts of a case's slices add up to the case's.

  Args:
    mask: u8[*S] class ids below `num_classes`.
    label: u8[*S], likewise, or IGNORED.
    num_classes: C, background (0) among them.

  Returns:
    i64[3, C]: pixels of the class in mask and label alike, in the mask, in the label; ignored
    pixels are in none.
  """
  if mask.shape != label.shape:
    raise ValueError(f"mask {mask.shape} and label {label.shape}: expected the same shape")
  known = label != types.IGNORED
  joint = label[known].astype(np.int64) * num_classes + mask[known]
  confusion = np.bincount(joint, minlength=num_classes**2).reshape(num_classes, num_classes)
  return np.stack([np.diagonal(confusion), confusion.sum(axis=0), confusion.sum(axis=1)])


def overlap(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Dice and IoU of each foreground class from `pixel_counts` (formulas of `dice` and `iou`).

  Args:
    counts: i64[3, C], of one image, or summed over the slices of a case.

  Returns:
    "dice" and "iou" f64[C - 1] (1 if both are empty, 0 if exactly one is), and
    "mask_empty" and "label_empty" bool[C - 1].
  """
  intersection, mask, label = counts[:, 1:]
  total = mask + label
  union = total - intersection
  return {
    "dice": np.where(total > 0, 2 * intersection / np.maximum(total, 1), 1.0),
    "iou": np.where(total > 0, intersection / np.maximum(union, 1), 1.0),
    "mask_empty": mask == 0,
    "label_empty": label == 0,
  }


def surface_metrics(
  mask: np.ndarray, label: np.ndarray, spacing: Sequence[float] | None, tolerance: float
) -> dict[str, float]:
  """Surface distances of one class, in the unit of `spacing`.

  A boundary is the set of pixels of a mask that its erosion by the cross-shaped element removes;
  beyond the image everything is background, so a mask touching the image's edge has a boundary
  there. With A, B the boundaries of mask and label, d(a, B) = min over b in B of |a - b| between
  pixel centres, and every boundary pixel counting alike (not weighted by surface area):

      hd95 = max(95th percentile of d(a, B) over A, 95th percentile of d(b, A) over B)
      hd100 = the same of the largest distances: the Hausdorff distance itself
      assd = (sum over A of d(a, B) + sum over B of d(b, A)) / (|A| + |B|)
      nsd  = (#{a : d(a, B) <= t} + #{b : d(b, A) <= t}) / (|A| + |B|),  t = tolerance (1 + 1e-6)

  A distance that equals the tolerance counts as within it: spacings are float32 in the files, so
  that 5 voxels of 0.4 mm come out above 2 mm, which the 1e-6 makes up for. hd95 takes the larger of
  the two directed percentiles (linear interpolation), not the percentile of both sets together;
  tools differ in this. Sources: Huttenlocher et al., "Comparing Images Using the Hausdorff
  Distance", 1993; Heimann et al., "Comparison and Evaluation of Methods for Liver Segmentation From
  CT Datasets", 2009 (ASSD); Nikolov et al., "Deep Learning to Achieve Clinically Applicable
  Segmentation of Head and Neck Anatomy for Radiotherapy", 2018 (NSD, the surface Dice at a
  tolerance: they weigh by surface area, while here, as in MONAI, each boundary pixel counts 1).

  Args:
    mask: bool[*S], 2D or 3D.
    label: bool[*S].
    spacing: size of a pixel along each axis, in mm; None counts in voxels (1 each).
    tolerance: of nsd, in the same unit.

  Returns:
    "hd95", "hd100", "assd" and "nsd". Both empty: 0, 0, 0, 1. Exactly one empty: the image's
    diagonal (sqrt of the sum of (pixels * spacing)^2) for the three distances, and 0.
  """
  if mask.shape != label.shape:
    raise ValueError(f"mask {mask.shape} and label {label.shape}: expected the same shape")
  spacing = np.ones(mask.ndim) if spacing is None else np.asarray(spacing, np.float64)
  if spacing.shape != (mask.ndim,) or not (spacing > 0).all():
    raise ValueError(f"spacing {spacing}: expected {mask.ndim} values above 0 for {mask.shape}")
  mask_empty, label_empty = not mask.any(), not label.any()
  if mask_empty and label_empty:
    return {"hd95": 0.0, "hd100": 0.0, "assd": 0.0, "nsd": 1.0}
  if mask_empty or label_empty:
    diagonal = float(np.linalg.norm(np.asarray(mask.shape) * spacing))
    return {"hd95": diagonal, "hd100": diagonal, "assd": diagonal, "nsd": 0.0}
  # Nothing outside the union's bounding box can be on a boundary or closer to one.
  box = ndimage.find_objects((mask | label).astype(np.uint8))[0]
  boundary_a, boundary_b = _boundary(mask[box]), _boundary(label[box])
  to_b = ndimage.distance_transform_edt(~boundary_b, sampling=spacing)[boundary_a]
  to_a = ndimage.distance_transform_edt(~boundary_a, sampling=spacing)[boundary_b]
  both = np.concatenate([to_b, to_a])
  return {
    "hd95": float(max(np.percentile(to_b, 95), np.percentile(to_a, 95))),
    "hd100": float(both.max()),
    "assd": float(both.mean()),
    "nsd": float((both <= tolerance * (1 + _SLACK)).mean()),
  }


def _boundary(mask: np.ndarray) -> np.ndarray:
  return mask & ~ndimage.binary_erosion(mask)
