"""Large records of the native mode as plain files, of which a patch reads no more than it needs.

ArrayRecord compresses a record as a whole: a patch of a CT volume of 512 x 512 x 300 took 2.1 CPU
seconds to read, and takes 3 ms from a mapped file. Files are written at the first read, beside the
prepared data and under their fingerprint; later runs and other processes use them.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import files

MIN_BYTES = 2**24  # of an image; smaller ones are soon read whole
_HEADER_BYTES = 128  # of a .npy file
_FREE_SHARE = 4  # files are written if the disk has room for so many times the record


def folder(local: epath.Path, fingerprint: str) -> epath.Path:
  """Where the files are.

  Args:
    local: folder of the prepared data on this host.
    fingerprint: of the prepared data.
  """
  return local.parent / f"unpacked-{fingerprint[:16]}"


def is_large(shape: Sequence[int], num_channels: int) -> bool:
  """Whether an image f32[*shape, num_channels] is written to a file."""
  return 4 * math.prod(shape) * num_channels >= MIN_BYTES


def num_bytes(shape: Sequence[int], num_channels: int, *, with_labels: bool) -> int:
  """Of a record's files: none if it is small.

  Args:
    shape: M of the image on the model's spacing.
    num_channels: I.
    with_labels: whether its label u8[*M] is written too.
  """
  if not is_large(shape, num_channels):
    return 0
  sizes = [4 * math.prod(shape) * num_channels, *[math.prod(shape)] * with_labels]
  return sum(size + _HEADER_BYTES for size in sizes)


def load(
  place: epath.Path, index: int, names: tuple[str, ...], read: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Arrays of a record, mapped from its files; where none can be written, what is read.

  Args:
    place: of `folder`.
    index: of the record.
    names: of the arrays.
    read: () -> the arrays by name, the record being unpacked for it.

  Raises:
    errors.DataError: if a file is there and is no array.
  """
  paths = {name: place / f"{index}-{name}.npy" for name in names}
  if not all(path.exists() for path in paths.values()):
    arrays = read()
    if not _has_written(arrays, paths):
      return arrays
  return {name: _map(path) for name, path in paths.items()}


def _has_written(arrays: dict[str, np.ndarray], paths: dict[str, epath.Path]) -> bool:
  place = next(iter(paths.values())).parent
  try:
    place.mkdir(exist_ok=True)
    if shutil.disk_usage(place).free < _FREE_SHARE * sum(arrays[name].nbytes for name in paths):
      return False
    for name, path in paths.items():
      temporary = place / f".{uuid.uuid4().hex}.tmp"  # several threads may write the same
      try:
        with temporary.open("wb") as file:
          np.save(file, arrays[name])
        files.flush(temporary)
        temporary.replace(path)
      finally:
        temporary.unlink(missing_ok=True)
  except OSError:  # a disk that is full, or that may only be read: it is slower without, no more
    return False
  return True


def _map(path: epath.Path) -> np.ndarray:
  try:
    return np.load(os.fspath(path), mmap_mode="r")
  except (OSError, EOFError, ValueError) as error:
    raise errors.DataError(
      f"{path}: cannot be read ({error}); remove {path.parent}, it is written again"
    ) from error
