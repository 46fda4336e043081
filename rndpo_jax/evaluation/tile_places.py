"""Where the tiles of an image stand, and how their pixels are weighted."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_SIGMA = 1 / 8  # of the Gaussian, in patches


def positions(size: Sequence[int], patch: Sequence[int], step: float = 0.5) -> list[tuple]:
  """Where tiles start: evenly spread, at most `step` patches from one to the next.

  Args:
    size: of the image, no axis shorter than the patch.
    patch: of the network.
    step: above 0, at most 1.

  Returns:
    A start an axis for each tile, those of the last axis changing fastest.

  Raises:
    ValueError: if the image is smaller than the patch.
  """
  return list(itertools.product(*starts(size, patch, step)))


def starts(size: Sequence[int], patch: Sequence[int], step: float) -> list[list[int]]:
  """The starts of `positions` along each axis; a patch of 1 sees every place."""
  found = []
  for n, p in zip(size, patch, strict=True):
    if n < p:
      raise ValueError(f"an image of size {tuple(size)} is smaller than the patch {tuple(patch)}")
    count = n if p == 1 else math.ceil((n - p) / (p * step)) + 1
    gap = (n - p) / max(count - 1, 1)
    found.append([round(gap * i) for i in range(count)])
  return found


def weights(patch: Sequence[int]) -> np.ndarray:
  """The weight of a tile's pixels, f32[*patch]: a Gaussian, 1 at patch // 2, never 0."""
  return functools.reduce(np.multiply.outer, map(weights_of_axis, patch)).astype(np.float32)


@functools.lru_cache(maxsize=64)
def weights_of_axis(length: int) -> np.ndarray:
  """A Gaussian about length // 2, 1 there; f64[length]."""
  middle = np.zeros(length)
  middle[length // 2] = 1
  found = ndimage.gaussian_filter1d(middle, length * _SIGMA, mode="constant")
  return found / found.max()


def total_weights(starts: Sequence[int], size: int, patch: int) -> np.ndarray:
  """The sum of tiles' weights along one axis, f64[size]; those of all axes are multiplied."""
  total = np.zeros(size)
  for start in starts:
    total[start : start + patch] += weights_of_axis(patch)
  return total
