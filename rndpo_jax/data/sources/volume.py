"""What a reader of one format says of one file, and the checks that all formats share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors

# Metrics count |A| + |B| voxels in int32. Whole-body CT has 512 x 512 x 1300 and more.
_MAX_VOXELS = 2**30 - 1


class Volume(NamedTuple):
  """A file (of DICOM a folder), its header read and checked, its voxels not read yet.

  Attributes:
    shape: S, of 2 or 3 axes, (x, y, z) or (H, W); of more axes where `cases` shall refuse it.
    affine: f64[4, 4], voxel indices to mm, right, anterior and superior being positive, as NIfTI
      has it; the identity if the format knows none.
    spacing: mm an axis, None if the header holds no positive number.
    eight_bit: whether voxels are bytes that mean themselves.
    read: (whether to keep bytes) -> uint8 or float32 [*S], or [*S, I] if I channels share it.
    num_channels: I.
    unit: of NIfTI's header; 'mm' where a format knows no other.
    read_ids: number of ids -> u8[*S] class ids, where a label is not read as an image is.
  """

  shape: tuple[int, ...]
  affine: np.ndarray
  spacing: tuple[float, ...] | None
  eight_bit: bool
  read: Callable[[bool], np.ndarray]
  num_channels: int = 1
  unit: str = "mm"
  read_ids: Callable[[int], np.ndarray] | None = None


def check_shape(path: os.PathLike, shape: tuple[int, ...]) -> None:
  """Refuses sizes that hold nothing, or more than fits, before voxels are read.

  Raises:
    errors.DataError: naming the file and the shape.
  """
  if math.prod(shape) == 1:
    raise errors.DataError(f"{path}: one voxel; expected more, replace or remove the file")
  if min(shape) < 1:
    raise errors.DataError(f"{path}: shape {shape} holds no voxel; replace or remove the file")
  if math.prod(shape) > _MAX_VOXELS:
    raise errors.DataError(
      f"{path}: shape {shape} holds more than {_MAX_VOXELS:,} voxels; crop or split it"
    )
