"""Resampling of volumes from one spacing to another by nnU-Net's rules.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, and its default_resampling.py. Pixels are
areas ('half-pixel' convention), values beyond the edge are those of the edge. Images are resampled
by cubic splines and clipped to the values that they had, masks and logits linearly. Where one axis
is far coarser than the others (`coarse_axis`), slices across it are resampled alone, and along it
the nearest slice is taken. Equal to `scipy.ndimage.zoom(grid_mode=True, mode='nearest')`, but axis
after axis: interpolation is a product over the axes, and so 12 products a voxel take the place of
64. nnU-Net's way is not `geometry.resize_linear`, which filters before it shrinks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import chex
import numpy as np
from scipy import ndimage

ANISOTROPY = 3.0  # above this ratio of spacings the coarsest axis is resampled apart
_BLOCK_VALUES = 2**22  # that are resampled at once
_PAD = 12  # edge values that the spline's filter runs over before the image, as in scipy


def resampled_shape(
  shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
  """The shape at another spacing: round(n * old / new) along each axis, halves to even.

  An axis keeps its length if its two spacings are equal; none gets shorter than 1.
  """
  rows = zip(shape, spacing, new_spacing, strict=True)
  return tuple(max(1, round(old / new * n)) for n, old, new in rows)


def coarse_axis(spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
  """The axis across which slices are resampled alone, None if there is no such.

  It is the coarsest of `spacing` if that is over `ANISOTROPY` times the finest, else of
  `new_spacing` by the same rule; if two axes are the coarsest there is none. Images of two axes
  have none.
  """
  for edges in (spacing, new_spacing):
    if len(edges) == 3 and max(edges) / min(edges) > ANISOTROPY:
      coarsest = [axis for axis, edge in enumerate(edges) if edge == max(edges)]
      return coarsest[0] if len(coarsest) == 1 else None
  return None


def resample_image(
  image: np.ndarray,
  new_shape: Sequence[int],
  *,
  spacing: Sequence[float],
  new_spacing: Sequence[float],
) -> np.ndarray:
  """Resamples an image by cubic splines.

  Args:
    image: f32[*S, I].
    new_shape: of `resampled_shape`.
    spacing: mm a pixel, one an axis of S.
    new_spacing: of the result.

  Returns:
    f32[*new_shape, I], no value beyond those of the same channel, or of the same slice across
    `coarse_axis`. The image itself where nothing changes.
  """
  _check(image, 1, new_shape, spacing, new_spacing)
  if image.shape[:-1] == tuple(new_shape):
    return image
  axis = coarse_axis(spacing, new_spacing)
  out = np.empty((*new_shape, image.shape[-1]), np.float32)
  for channel in range(image.shape[-1]):
    out[..., channel] = _resample_channel(image[..., channel], new_shape, axis)
  return out


def resample_mask(
  mask: np.ndarray,
  new_shape: Sequence[int],
  *,
  spacing: Sequence[float],
  new_spacing: Sequence[float],
  ids: Sequence[int],
) -> np.ndarray:
  """Resamples class ids, each as an image of zeros and ones, linearly.

  Args:
    mask: u8[*S].
    new_shape: of `resampled_shape`.
    spacing: mm a pixel, one an axis of S.
    new_spacing: of the result.
    ids: class ids that the mask may hold, in rising order.

  Returns:
    u8[*new_shape]: the last of `ids` of which a pixel holds at least half; 0 where there is none.
  """
  _check(mask, 0, new_shape, spacing, new_spacing)
  if mask.shape == tuple(new_shape):
    return mask
  taps = _all_taps(mask.shape, new_shape, coarse_axis(spacing, new_spacing))
  out = np.zeros(tuple(new_shape), np.uint8)
  for label in ids:
    share = mask == label
    for axis, own in taps:
      share = _of_lines(functools.partial(interpolate_axis, taps=own), share, axis)
    out[share >= 0.5] = label
  return out


def resample_logits(
  logits: np.ndarray,
  new_shape: Sequence[int],
  *,
  spacing: Sequence[float],
  new_spacing: Sequence[float],
) -> np.ndarray:
  """Resamples logits linearly.

  Args:
    logits: f32[*S, C].
    new_shape: of the image before it was resampled.
    spacing: mm a pixel of the logits, one an axis of S.
    new_spacing: of the result.

  Returns:
    f32[*new_shape, C]; the logits themselves where nothing changes.
  """
  _check(logits, 1, new_shape, spacing, new_spacing)
  axis = coarse_axis(spacing, new_spacing)
  return _interpolate(logits, _all_taps(logits.shape[:-1], new_shape, axis))


def linear_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
  """Linear interpolation along one axis: out[i] = sum over t of weight[t, i] * in[index[t, i]].

  Returns:
    (index i64[2, size_out], weight f64[2, size_out]); at the ends both indices are the edge's.
  """
  place = _places(size_in, size_out)
  low = np.floor(place)
  part = place - low
  index = np.stack([low, low + 1]).astype(np.int64)
  return np.clip(index, 0, size_in - 1), np.stack([1 - part, part])


def nearest_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
  """The nearest pixel, of two equally near the later, as `linear_taps` with one tap."""
  index = np.floor(_places(size_in, size_out) + 0.5).astype(np.int64)
  return np.clip(index, 0, size_in - 1)[None], np.ones((1, size_out))


def interpolate_axis(
  array: np.ndarray, axis: int, taps: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
  """Applies taps along one axis, in the array's dtype."""
  index, weight = taps
  shape = (-1, *(1,) * (array.ndim - axis - 1))
  total = None
  for place, factor in zip(index, weight.astype(array.dtype), strict=True):
    term = np.take(array, place, axis=axis)
    if len(index) > 1:
      term *= factor.reshape(shape)
    total = term if total is None else np.add(total, term, out=total)
  return total


def _places(size_in: int, size_out: int) -> np.ndarray:
  """Where the middles of the new pixels are among the old ones."""
  return (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5


def _all_taps(shape, new_shape, coarse: int | None) -> list[tuple[int, tuple]]:
  """(axis, taps) of each axis that changes, those that shrink most first."""
  changed = [axis for axis, (n, m) in enumerate(zip(shape, new_shape, strict=True)) if n != m]
  return [
    (axis, (nearest_taps if axis == coarse else linear_taps)(shape[axis], new_shape[axis]))
    for axis in sorted(changed, key=lambda axis: new_shape[axis] / shape[axis])
  ]


def _interpolate(array: np.ndarray, taps) -> np.ndarray:
  for axis, own in taps:
    array = interpolate_axis(array, axis, own)
  return array


def _resample_channel(values: np.ndarray, new_shape, coarse: int | None) -> np.ndarray:
  """f[*S] -> f[*new_shape]."""
  within = tuple(axis for axis in range(values.ndim) if axis != coarse)
  changed = [axis for axis in within if values.shape[axis] != new_shape[axis]]
  out = values
  for axis in sorted(changed, key=lambda axis: new_shape[axis] / values.shape[axis]):
    out = _of_lines(functools.partial(_spline_axis, size=new_shape[axis]), out, axis)
  if changed:  # a spline overshoots
    low, high = (get(values, axis=within, keepdims=True) for get in (np.min, np.max))
    np.clip(out, low, high, out=out)
  if coarse is not None and values.shape[coarse] != new_shape[coarse]:
    out = interpolate_axis(out, coarse, nearest_taps(values.shape[coarse], new_shape[coarse]))
  return out


def _of_lines(function: Callable, values: np.ndarray, axis: int) -> np.ndarray:
  """function(f64 values, axis), which sees lines along the axis alone, of some lines at a time:
  f64 copies of a volume, of which it makes several, would take many times the volume's memory."""
  across = 1 if axis == 0 else 0
  length = values.shape[across]
  count = max(1, _BLOCK_VALUES * length // values.size)
  out = None
  for low in range(0, length, count):
    block = (slice(None),) * across + (slice(low, low + count),)
    found = function(values[block].astype(np.float64), axis)
    if out is None:
      shape = [*found.shape]
      shape[across] = length
      out = np.empty(shape, np.float64)
    out[block] = found
  return out


def _spline_axis(values: np.ndarray, axis: int, size: int) -> np.ndarray:
  """Cubic interpolation along one axis."""
  pads = [(0, 0)] * values.ndim
  pads[axis] = (_PAD, _PAD)
  padded = np.pad(values, pads, mode="edge")
  coefficients = ndimage.spline_filter1d(padded, 3, axis=axis, mode="nearest")
  place = _places(values.shape[axis], size) + _PAD
  low = np.floor(place)
  t = place - low
  index = low.astype(np.int64) + np.arange(-1, 3)[:, None]
  weight = [(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]
  return interpolate_axis(coefficients, axis, (index, np.stack(weight) / 6))


def _check(array, trailing: int, new_shape, spacing, new_spacing) -> None:
  chex.assert_rank(array, {2 + trailing, 3 + trailing})
  dims = array.ndim - trailing
  for name, values in (
    ("new_shape", new_shape), ("spacing", spacing), ("new_spacing", new_spacing),
  ):  # fmt: skip
    if len(values) != dims:
      raise ValueError(f"{name} is {tuple(values)}, expected {dims} numbers, one an axis")
