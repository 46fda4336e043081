"""From an image's own grid to the model's and back: centre crop, then resize, axis by axis.

Pixels are areas: pixel i of n covers [i / n, (i + 1) / n] of the axis and its value stands at
the middle, on every grid ('half-pixel' convention), so that the way back undoes the way there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

OUTSIDE = 1e4  # logit of the background where the model saw nothing


@functools.lru_cache(maxsize=256)
def resize_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
  """Linear interpolation along one axis: out[i] = sum over t of weight[t, i] * in[index[t, i]].

  A triangle of half-width max(1, size_in / size_out) input pixels about each output pixel's
  middle, normalised to one: plain linear interpolation upwards, low-pass filtered downwards.
  At the ends the triangle is cut off.

  Returns:
    (index i64[T, size_out], weight f32[T, size_out]), T taps an output pixel.
  """
  scale = size_in / size_out
  width = max(1.0, scale)
  middle = (np.arange(size_out) + 0.5) * scale - 0.5
  taps = np.arange(math.floor(2 * width) + 1)
  index = np.ceil(middle - width).astype(np.int64)[None, :] + taps[:, None]
  weight = np.maximum(0.0, 1.0 - np.abs(index - middle[None, :]) / width)
  weight *= (index >= 0) & (index < size_in)
  weight = (weight / weight.sum(axis=0, keepdims=True)).astype(np.float32)
  return np.clip(index, 0, size_in - 1), weight


def resize_linear(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes f32[*S, I] to f32[*size, I]; axes of the right length are left alone.

  Few taps a pixel and no matrix product, which would set threads of BLAS against the training.
  """
  image = np.asarray(image, np.float32)
  for axis, length in enumerate(size):
    if image.shape[axis] == length:
      continue
    index, weight = resize_taps(image.shape[axis], int(length))
    shape = (-1, *(1,) * (image.ndim - axis - 1))
    image = sum(
      np.take(image, i, axis=axis) * w.reshape(shape) for i, w in zip(index, weight, strict=True)
    )
  return np.ascontiguousarray(image)


def resize_classes(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes class ids u8[*S] to u8[*size]: the class with the largest share of a pixel.

  Shares are those of `resize_linear`, so that a mask stays in place on its image; picking the
  nearest pixel would shift it by up to half a source pixel. Equal shares go to the lower class.
  """
  if mask.shape == tuple(size):
    return np.ascontiguousarray(mask)
  classes = np.unique(mask)
  best = np.full(tuple(size), classes[0], np.uint8)
  largest = np.zeros(tuple(size), np.float32)
  for label in classes if len(classes) > 1 else ():  # one at a time, for volumes are large
    share = resize_linear((mask == label)[..., None], size)[..., 0]
    ahead = share > largest + 1e-6  # equal but for rounding is equal
    best[ahead], largest[ahead] = label, share[ahead]
  return best


def _overlap(count: int, crop: int) -> tuple[slice, slice]:
  """Where an axis of `count` pixels and its centre crop meet: (slice of it, slice of the crop)."""
  start = (count - crop) // 2  # below 0 if the axis is padded
  low, high = max(start, 0), min(start + crop, count)
  return slice(low, high), slice(low - start, high - start)


def center_crop(array: np.ndarray, crop: Sequence[int], fill) -> np.ndarray:
  """Centre crop of the leading axes, padded with `fill` if the array is smaller.

  Args:
    array: [*S, ...].
    crop: one length an axis of S; () returns the array as it is.
    fill: value, or one value for each entry of the trailing axes.
  """
  if not len(crop):
    return array
  pairs = [_overlap(n, int(c)) for n, c in zip(array.shape, crop, strict=False)]
  out = np.empty((*map(int, crop), *array.shape[len(crop) :]), array.dtype)
  out[...] = fill
  out[tuple(inside for _, inside in pairs)] = array[tuple(outer for outer, _ in pairs)]
  return out


def image_to_model(image: np.ndarray, size: Sequence[int], crop: Sequence[int]) -> np.ndarray:
  """[*S, I] -> f32[*size, I]; padding takes each channel's minimum."""
  padded = any(c > n for n, c in zip(image.shape, crop, strict=False))
  lowest = image.min(axis=tuple(range(image.ndim - 1))) if padded else 0
  return resize_linear(center_crop(image, crop, lowest), size)


def mask_to_model(mask: np.ndarray, size: Sequence[int], crop: Sequence[int]) -> np.ndarray:
  """u8[*S] -> u8[*size]; padding is background."""
  return resize_classes(center_crop(mask, crop, 0), size)


def to_native(logits: np.ndarray, native_shape: Sequence[int], crop: Sequence[int]) -> np.ndarray:
  """Brings logits back to the image's own grid, undoing `image_to_model`.

  Args:
    logits: f32[*size, C], or f32[*size, 1] with one logit a pixel.
    native_shape: S of the image.
    crop: as in the config; () for none.

  Returns:
    f32[*native_shape, C]; outside the crop the background is certain.
  """
  logits = np.asarray(logits, np.float32)
  window = resize_linear(logits, crop if len(crop) else native_shape)
  if not len(crop):
    return window
  outside = np.zeros(logits.shape[-1], np.float32)
  outside[0] = OUTSIDE if logits.shape[-1] > 1 else -OUTSIDE
  # Not center_crop: an odd difference would shift the window by a pixel against the way there.
  out = np.empty((*map(int, native_shape), logits.shape[-1]), np.float32)
  out[...] = outside
  pairs = [_overlap(int(n), int(c)) for n, c in zip(native_shape, crop, strict=True)]
  out[tuple(outer for outer, _ in pairs)] = window[tuple(inside for _, inside in pairs)]
  return out


def voxel_volume(
  spacing: Sequence[float], native_shape: Sequence[int], size: Sequence[int], crop: Sequence[int]
) -> float:
  """What a pixel of the model's grid stands for.

  Args:
    spacing: mm of a source pixel, one an axis.
    native_shape: S of the source.
    size: the model's grid.
    crop: as in the config; () for none.

  Returns:
    mm^2 for two axes, mm^3 for three.
  """
  window = crop if len(crop) else native_shape
  return math.prod(mm * n / m for mm, n, m in zip(spacing, window, size, strict=True))


def normalize(image: np.ndarray, how: str) -> np.ndarray:
  """Normalises f32[*S, I], each channel alone; a constant channel becomes zero.

  Args:
    image: finite values.
    how: 'zscore', (x - mean) / standard deviation, or 'minmax', (x - min) / (max - min).
  """
  axes = tuple(range(image.ndim - 1))
  image = image.astype(np.float64)  # 16-bit and CT values lose digits in float32 sums
  if how == "zscore":
    shift, scale = image.mean(axes), image.std(axes)
  else:
    shift = image.min(axes)
    scale = image.max(axes) - shift
  flat = scale <= 1e-6 * np.abs(shift)  # relative, for some units give tiny values
  scaled = (image - shift) / np.where(flat, 1.0, scale)
  return np.where(flat, 0.0, scaled).astype(np.float32)


def grid_shift(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
  """How far apart two affines place the same voxel: at most this many voxels, over a whole image.

  Both maps are affine, so the largest distance is at a corner of the grid.

  Args:
    affine: f[4, 4], voxel indices to world; `other` likewise.
    shape: S, of two or three axes.

  Returns:
    The distance over the shortest edge of a voxel of `affine`; infinite for an edge of no length; 0
    if the two are equal, whatever they hold.
  """
  if np.array_equal(affine, other, equal_nan=True):  # also if they place voxels nowhere
    return 0.0
  axes = [(0, n - 1) for n in shape] + [(0,)] * (3 - len(shape)) + [(1,)]
  corners = np.array(list(itertools.product(*axes)), np.float64)
  difference = np.asarray(affine, np.float64) - np.asarray(other, np.float64)
  distance = np.linalg.norm(corners @ difference.T, axis=1).max()
  edge = np.linalg.norm(np.asarray(affine)[:3, : len(shape)], axis=0).min()
  return float(distance / edge) if edge > 0 else math.inf
