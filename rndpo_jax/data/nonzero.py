"""The part of an image that is not zero, to which nnU-Net crops before it normalises."""

from __future__ import annotations

import chex
import numpy as np
from scipy import ndimage


def mask(image: np.ndarray) -> np.ndarray:
  """Where any channel is not zero, holes filled.

  A hole is closed on all sides in three dimensions. So a picture has none, as with nnU-Net, which
  takes it for a volume of one slice.

  Args:
    image: [*S, I].

  Returns:
    bool[*S].
  """
  chex.assert_rank(image, {3, 4})
  found = _any_channel(image)
  return ndimage.binary_fill_holes(found) if found.ndim == 3 else found


def box(image: np.ndarray) -> tuple[slice, ...]:
  """The smallest box around all that is not zero; the whole image if all of it is.

  Args:
    image: [*S, I].

  Returns:
    A slice an axis of S. Filling holes would not change it.
  """
  chex.assert_rank(image, {3, 4})
  found = _any_channel(image)
  slices = []
  for axis in range(found.ndim):
    others = tuple(n for n in range(found.ndim) if n != axis)
    places = np.flatnonzero(found.any(axis=others))
    first, last = (places[0], places[-1]) if len(places) else (0, found.shape[axis] - 1)
    slices.append(slice(int(first), int(last) + 1))
  return tuple(slices)


def _any_channel(image: np.ndarray) -> np.ndarray:
  found = image[..., 0] != 0
  for channel in range(1, image.shape[-1]):
    found |= image[..., channel] != 0
  return found
