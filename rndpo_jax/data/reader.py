"""Random access to prepared data: where its files are, and reading them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import files

NAME = SPLIT = "cases"  # TFDS reserves 'all' as a split
VERSION = "1.0.0"


def folder(directory: epath.Path) -> epath.Path:
  """Where the files of the prepared data are."""
  return epath.Path(directory) / NAME


def open_source(directory: epath.Path, *, with_labels: bool) -> Opened:
  """Random access to what was built; without labels, the masks' bytes are never decoded.

  Raises:
    records.DataError: if it cannot be opened.
  """
  with _named(directory):
    return Opened(directory, files.local_copy(folder(directory)), with_labels)


class Opened:
  """The records, read on access; worker processes open the files again.

  Raises:
    records.DataError: if a record cannot be read (any more), also in a worker.
    files.FileError: if this host does not let a process open so many files.
  """

  def __init__(self, directory: epath.Path, local: epath.Path, with_labels: bool):
    self._from = directory, local, with_labels
    with _named(directory), quiet():
      builder = tfds.builder_from_directory(local / VERSION)
      masks = [name for name in ("mask", "mask_on_spacing") if name in builder.info.features]
      skip = None if with_labels else dict.fromkeys(masks, tfds.decode.SkipDecoding())
      # Twice, for there is a reader with labels and one without.
      files.allow_open(2 * builder.info.splits[SPLIT].num_shards, folder(directory))
      self._opened = builder.as_data_source(split=SPLIT, decoders=skip)
      self._opened[0]  # the file is opened at the first read

  def __reduce__(self):
    return Opened, self._from

  def __len__(self) -> int:
    return len(self._opened)

  def __getitem__(self, index: int):
    with _named(self._from[0]):
      return self._opened[index]


@contextlib.contextmanager
def _named(directory: epath.Path) -> Iterator[None]:
  """Turns an error of reading into one that names the data and the remedy."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ArrayRecord's own
    if isinstance(error, (errors.DataError, errors.FileError)):
      raise
    raise errors.DataError(
      f"{folder(directory)}: cannot be read ({error}); remove {directory} and run the stage "
      "'prepare' again"
    ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps TFDS's own progress bars, log lines and warnings off the terminal."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  tfds.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      yield
    finally:
      logger.setLevel(level)
