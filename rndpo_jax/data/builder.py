"""A TFDS data set of any source: ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from rndpo_jax import files, preemption, progress
from rndpo_jax.data import records

SPLIT = "cases"  # TFDS reserves 'all'
_NAME = "cases"
_VERSION = "1.0.0"
# Of a file's images and masks, before ArrayRecord compresses them.
_FILE_BYTES = 4 << 30


def folder(directory: epath.Path) -> epath.Path:
  """Where `build` puts the files."""
  return epath.Path(directory) / _NAME


def build(source: records.Source, directory: epath.Path) -> None:
  """Reads every pixel of the source and writes it under `directory`, local or remote.

  The records go straight into the files. TFDS's own writer sorts them first: beyond 1 GB with the
  help of TensorFlow, and, as the order is ours, all of them at once in memory.

  Raises:
    records.DataError: whatever reading the source finds wrong, or if no mask has foreground.
    OSError: where the files cannot be written, the disk being full for one.
  """
  if files.is_remote(directory):  # ArrayRecord writes local files alone
    with tempfile.TemporaryDirectory() as here:
      build(source, epath.Path(here))
      files.copy(folder(epath.Path(here)), folder(directory))
    return
  target = folder(directory) / _VERSION
  temporary = target.parent / f"{_VERSION}.incomplete"
  temporary.mkdir(parents=True)
  features, counts = _features(source), file_lengths(source)
  examples, num_bytes = _examples(source), 0
  for number, count in enumerate(counts):
    path = temporary / f"{_NAME}-{SPLIT}.array_record-{number:05d}-of-{len(counts):05d}"
    encoded = map(features.serialize_example, itertools.islice(examples, count))
    num_bytes += _write(path, encoded)
  next(examples, None)  # what is checked after the last record
  template = tfds.core.ShardedFileTemplate(
    data_dir=temporary, dataset_name=_NAME, split=SPLIT, filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name=SPLIT, shard_lengths=counts, num_bytes=num_bytes, filename_template=template
  )
  with _quiet():
    tfds.folder_dataset.write_metadata(
      data_dir=temporary,
      features=features,
      split_infos=[split],
      version=_VERSION,
      check_data=False,  # by TensorFlow
      disable_shuffling=True,
    )
  temporary.replace(target)


def file_lengths(source: records.Source) -> list[int]:
  """Records of each file, in their order: up to 4 GiB of pixels, or a single one."""
  counts, used = [], _FILE_BYTES
  for entry in source.records:
    size = records.num_bytes(source, entry)
    if used + size > _FILE_BYTES:
      counts.append(0)
      used = 0
    counts[-1] += 1
    used += size
  return counts


def _features(source: records.Source) -> tfds.features.FeaturesDict:
  """What a record is made of.

  Pixels are bytes as they are, for ArrayRecord compresses every record, and sooner than zlib. Masks
  may be of no pixel, which TFDS cannot read as bytes.
  """
  dims = source.spatial_dims
  grid = (None,) * dims
  return tfds.features.FeaturesDict({
    "image": tfds.features.Tensor(
      shape=(*grid, source.num_channels), dtype=np.dtype(source.dtype), encoding="bytes"
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


def _examples(source: records.Source) -> Iterator[dict]:
  """The source's records in its order, checked."""
  foreground = False
  read = progress.track(
    source.read(), total=len(source.records), description="prepare", unit="records"
  )
  for entry, pixels in zip(source.records, read, strict=True):
    preemption.check("prepare: it starts anew")
    records.check_pixels(pixels, entry, source.num_classes)
    mask = pixels.mask
    foreground |= mask is not None and bool(mask.any())
    yield {
      "image": pixels.image.astype(source.dtype, copy=False),
      "mask": np.zeros((0,) * source.spatial_dims, np.uint8) if mask is None else mask,
      "has_mask": np.uint8(mask is not None),
      "record_id": entry["record_id"],
      "case_id": entry["case_id"],
      "group_id": entry["group_id"],
      "slice": np.int32(entry["slice"]),
      "spacing": np.asarray(entry["spacing"] or (0,) * source.spatial_dims, np.float32),
      "affine": pixels.affine.astype(np.float32),
    }
  if not foreground:
    raise records.DataError(
      f"{source.name}: every mask is empty, there is nothing to learn; check the masks and "
      "config.data.num_classes"
    )


def _write(path: epath.Path, encoded: Iterable[bytes]) -> int:
  """Writes one file and returns the bytes of its records, before compression.

  Raises:
    OSError: where it cannot be written.
  """
  with _named_writing(path):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  num_bytes = 0
  for record in encoded:
    with _named_writing(path):
      writer.write(record)
    num_bytes += len(record)
  with _named_writing(path):
    writer.close()
  files.flush(path)
  return num_bytes


@contextlib.contextmanager
def _named_writing(path: epath.Path) -> Iterator[None]:
  """Turns ArrayRecord's error into one that names the file and the remedy."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(
      errno.ENOSPC,
      f"{path}: the prepared data cannot be written ({error}); free space on that disk, then run "
      "the stage 'prepare' again",
    ) from error


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
    files.FileError: where this host does not let a process open so many files.
  """

  def __init__(self, directory: epath.Path, local: epath.Path, with_labels: bool):
    self._from = directory, local, with_labels
    with _named(directory), _quiet():
      builder = tfds.builder_from_directory(local / _VERSION)
      skip = None if with_labels else {"mask": tfds.decode.SkipDecoding()}
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
    if isinstance(error, (records.DataError, files.FileError)):
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
