"""From an image's own grid to the model's and back: centre crop, then resize, axis by axis.

Pixels are areas: pixel i of n covers [i / n, (i + 1) / n] of the axis and its value stands at
the middle, on every grid ('half-pixel' convention), so that the way back undoes the way there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

OUTSIDE = 1e4  # logit of the background where the model saw nothing


@functools.lru_cache(maxsize=256)
def resize_matrix(size_in: int, size_out: int) -> np.ndarray:
  """Weights f32[size_out, size_in] of linear interpolation along one axis.

  A triangle of half-width max(1, size_in / size_out) input pixels about each output pixel's
  middle, rows normalised to one: plain linear interpolation upwards, low-pass filtered
  downwards. Beyond the ends the nearest pixels count more.
  """
  scale = size_in / size_out
  middle = (np.arange(size_out) + 0.5) * scale - 0.5
  distance = np.abs(middle[:, None] - np.arange(size_in)[None, :]) / max(1.0, scale)
  weights = np.maximum(0.0, 1.0 - distance)
  matrix = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
  matrix.flags.writeable = False
  return matrix


def resize_linear(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes f32[*S, I] to f32[*size, I]; axes of the right length are left alone."""
  image = np.asarray(image, np.float32)
  for axis, length in enumerate(size):
    if image.shape[axis] != length:
      matrix = resize_matrix(image.shape[axis], int(length))
      image = np.moveaxis(np.tensordot(matrix, image, axes=(1, axis)), 0, axis)
  return np.ascontiguousarray(image)


def resize_nearest(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes u8[*S] to u8[*size] without mixing classes."""
  for axis, length in enumerate(size):
    count = mask.shape[axis]
    if count != length:
      index = ((np.arange(length) + 0.5) * count / length).astype(np.int64)
      mask = np.take(mask, np.minimum(index, count - 1), axis=axis)
  return np.ascontiguousarray(mask)


def _overlap(count: int, crop: int) -> tuple[slice, slice]:
  """Where an axis of `count` pixels and its centre crop meet: (slice of it, slice of the crop)."""
  start = (count - crop) // 2  # below 0 where the axis is padded
  low, high = max(start, 0), min(start + crop, count)
  return slice(low, high), slice(low - start, high - start)


def center_crop(array: np.ndarray, crop: Sequence[int], fill) -> np.ndarray:
  """Centre crop of the leading axes, padded with `fill` where the array is smaller.

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
  lowest = image.min(axis=tuple(range(image.ndim - 1)))
  return resize_linear(center_crop(image, crop, lowest), size)


def mask_to_model(mask: np.ndarray, size: Sequence[int], crop: Sequence[int]) -> np.ndarray:
  """u8[*S] -> u8[*size]; padding is background."""
  return resize_nearest(center_crop(mask, crop, 0), size)


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
  # Cropping a window of `crop` to the native shape with padding is the exact inverse, but for
  # odd differences: the offsets must be the ones of the way there.
  out = np.empty((*map(int, native_shape), logits.shape[-1]), np.float32)
  out[...] = outside
  pairs = [_overlap(int(n), int(c)) for n, c in zip(native_shape, crop, strict=True)]
  out[tuple(outer for outer, _ in pairs)] = window[tuple(inside for _, inside in pairs)]
  return out


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
  flat = scale <= 1e-6 * np.maximum(1.0, np.abs(shift))
  scaled = (image - shift) / np.where(flat, 1.0, scale)
  return np.where(flat, 0.0, scaled).astype(np.float32)
