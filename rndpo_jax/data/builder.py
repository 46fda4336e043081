"""The TFDS builder: any source as ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import errno
import logging
import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from rndpo_jax import files, preemption, progress
from rndpo_jax.data import records

SPLIT = "cases"  # TFDS reserves 'all'
_FOLDER = "cases"  # TFDS names it after the class below


class Cases(tfds.core.GeneratorBasedBuilder):
  """All records of a source, in its order, in one TFDS split."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, source: records.Source, data_dir: str):
    self._source = source
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _log_download_bytes(self):
    pass  # TFDS announces a download; there is none

  def _log_download_done(self):
    pass

  def _info(self) -> tfds.core.DatasetInfo:
    dims = self._source.spatial_dims
    grid = (None,) * dims
    features = tfds.features.FeaturesDict({
      "image": tfds.features.Tensor(
        shape=(*grid, self._source.num_channels),
        dtype=np.dtype(self._source.dtype),
        encoding="zlib",
      ),
      "mask": tfds.features.Tensor(shape=grid, dtype=np.uint8, encoding="zlib"),
      "has_mask": tfds.features.Scalar(np.uint8),
      "record_id": tfds.features.Text(),
      "case_id": tfds.features.Text(),
      "group_id": tfds.features.Text(),
      "slice": tfds.features.Scalar(np.int32),
      "spacing": tfds.features.Tensor(shape=(dims,), dtype=np.float32),
      "affine": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
    })  # fmt: skip
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {SPLIT: self._generate_examples()}

  def _generate_examples(self):
    source = self._source
    foreground = False
    read = progress.track(
      source.read(), total=len(source.records), description="prepare", unit="records"
    )
    for index, (entry, pixels) in enumerate(zip(source.records, read, strict=True)):
      preemption.check("prepare: it starts anew")
      records.check_pixels(pixels, entry, source.num_classes)
      mask = pixels.mask
      foreground |= mask is not None and bool(mask.any())
      yield (
        index,
        {
          "image": pixels.image.astype(source.dtype, copy=False),
          "mask": np.zeros((0,) * source.spatial_dims, np.uint8) if mask is None else mask,
          "has_mask": np.uint8(mask is not None),
          "record_id": entry["record_id"],
          "case_id": entry["case_id"],
          "group_id": entry["group_id"],
          "slice": np.int32(entry["slice"]),
          "spacing": np.asarray(entry["spacing"] or (0,) * source.spatial_dims, np.float32),
          "affine": pixels.affine.astype(np.float32),
        },
      )
    if not foreground:
      raise records.DataError(
        f"{source.name}: every mask is empty, there is nothing to learn; check the masks and "
        "config.data.num_classes"
      )


def folder(directory: epath.Path) -> epath.Path:
  """Where `build` puts the files."""
  return epath.Path(directory) / _FOLDER


def build(source: records.Source, directory: epath.Path) -> None:
  """Reads every pixel of the source and writes it under `directory`, local or remote.

  Raises:
    records.DataError: whatever reading the source finds wrong, or if no mask has foreground.
    OSError: where the files cannot be written, the disk being full for one.
  """
  if files.is_remote(directory):  # ArrayRecord writes local files alone
    with tempfile.TemporaryDirectory() as here:
      build(source, epath.Path(here))
      files.copy(folder(epath.Path(here)), folder(directory))
    return
  downloads = folder(directory) / "downloads"  # TFDS makes one, and nothing is downloaded
  with _quiet():
    cases = Cases(source=source, data_dir=str(directory))
    try:
      cases.download_and_prepare(download_dir=str(downloads))
    except RuntimeError as error:  # ArrayRecord's, when it cannot write
      raise OSError(
        errno.ENOSPC,
        f"{directory}: the prepared data cannot be written ({error}); free space on that disk, "
        "then run the stage 'prepare' again",
      ) from error
  if downloads.exists():
    downloads.rmtree()


def open_source(directory: epath.Path, *, with_labels: bool) -> Opened:
  """Random access to what `build` wrote; without labels, the masks' bytes are never decoded.

  Raises:
    records.DataError: where it cannot be opened.
  """
  with _named(directory):
    return Opened(directory, files.local_copy(folder(directory)), with_labels)


class Opened:
  """The records, read on access; worker processes open the files anew.

  Raises:
    records.DataError: where a record cannot be read (any more), also in a worker.
  """

  def __init__(self, directory: epath.Path, local: epath.Path, with_labels: bool):
    self._from = directory, local, with_labels
    with _named(directory), _quiet():
      builder = tfds.builder_from_directory(local / str(Cases.VERSION))
      skip = None if with_labels else {"mask": tfds.decode.SkipDecoding()}
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
    if isinstance(error, records.DataError):
      raise
    raise records.DataError(
      f"{folder(directory)}: cannot be read ({error}); remove {directory} and run the stage "
      "'prepare' again"
    ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
