"""A TFDS data set of any source: ArrayRecord files, written without TensorFlow."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from rndpo_jax import files, preemption, progress
from rndpo_jax.data import reader, records

# Of a file's images and masks, before ArrayRecord compresses them.
_FILE_BYTES = 4 << 30


def build(source: records.Source, directory: epath.Path) -> None:
  """Reads every pixel of the source and writes it under `directory`, local or remote.

  The records go straight into the files. TFDS's own writer sorts them first: beyond 1 GB with the
  help of TensorFlow, and, as the order is ours, all of them at once in memory.

  A run that is killed, or that meets a broken image, leaves the files that it finished. The next
  one goes on after those that it would write again just so. Not in an object store.

  Raises:
    records.DataError: whatever reading the source finds wrong, or if no mask has foreground.
    OSError: where the files cannot be written, the disk being full for one.
  """
  if files.is_remote(directory):  # ArrayRecord writes local files alone
    if reader.folder(directory).exists():
      reader.folder(directory).rmtree()
    with tempfile.TemporaryDirectory() as here:
      build(source, epath.Path(here))
      files.copy(reader.folder(epath.Path(here)), reader.folder(directory))
    return
  target = reader.folder(directory) / reader.VERSION
  temporary = target.parent / f"{reader.VERSION}.incomplete"
  _take_up(target, temporary)
  counts = file_lengths(source)
  written = _write_all(source, temporary, counts)
  if not any(one["has_foreground"] for one in written):
    raise records.DataError(
      f"{source.name}: every mask is empty, there is nothing to learn; check the masks and "
      "config.data.num_classes"
    )
  template = tfds.core.ShardedFileTemplate(
    data_dir=temporary,
    dataset_name=reader.NAME,
    split=reader.SPLIT,
    filetype_suffix="array_record",
  )
  split = tfds.core.SplitInfo(
    name=reader.SPLIT,
    shard_lengths=counts,
    num_bytes=sum(one["num_bytes"] for one in written),
    filename_template=template,
  )
  with reader.quiet():
    tfds.folder_dataset.write_metadata(
      data_dir=temporary,
      features=_features(source),
      split_infos=[split],
      version=reader.VERSION,
      check_data=False,  # by TensorFlow
      disable_shuffling=True,
    )
  temporary.replace(target)


def _take_up(target: epath.Path, temporary: epath.Path) -> None:
  """Makes of what an earlier run left a folder to go on in; removes all else beside it."""
  if target.exists():  # it ended before it said what it had prepared
    if temporary.exists():
      temporary.rmtree()
    target.replace(temporary)
  temporary.mkdir(parents=True, exist_ok=True)
  for other in target.parent.iterdir():
    if other != temporary:
      other.rmtree() if other.is_dir() else other.unlink()


def _write_all(source, folder: epath.Path, counts: list[int]) -> list[dict[str, Any]]:
  """Writes the files that are not there yet, each by rename, then its summary.

  Returns:
    The summaries of all: `stamp`, bytes on disk, `num_bytes` before compression, and whether a mask
    has foreground.
  """
  ends = list(itertools.accumulate(counts))
  spans = list(zip([0, *ends[:-1]], ends, strict=True))
  paths = [
    folder / f"{reader.NAME}-{reader.SPLIT}.array_record-{number:05d}-of-{len(counts):05d}"
    for number in range(len(counts))
  ]
  written = _kept(source, paths, spans)
  keep = {name for path in paths[: len(written)] for name in (path.name, _summary(path).name)}
  for path in folder.iterdir():
    if path.name not in keep:
      path.unlink()
  features = _features(source)
  examples = _examples(source, sum(counts[: len(written)]))
  for path, span in list(zip(paths, spans, strict=True))[len(written) :]:
    stamp = _stamp(source, span)  # before the pixels are read, lest they change in between
    summary = _write(path, features, itertools.islice(examples, span[1] - span[0]))
    written.append({"stamp": stamp, **summary})
    files.write_json(_summary(path), written[-1])
  next(examples, None)  # ends its progress
  return written


def _summary(path: epath.Path) -> epath.Path:
  number = path.name.rpartition("record-")[2]
  return path.parent / f"summary-{number}.json"


def _kept(source, paths, spans) -> list[dict[str, Any]]:
  """Summaries of the first files, as far as they are what would be written now."""
  kept = []
  for path, span in zip(paths, spans, strict=True):
    try:
      summary = files.read_json(_summary(path))
    except (FileNotFoundError, files.FileError):
      break
    if not path.exists() or path.stat().length != summary["num_bytes_on_disk"]:
      break
    if summary["stamp"] != _stamp(source, span):
      break
    kept.append(summary)
  return kept


def _stamp(source: records.Source, span: tuple[int, int]) -> str:
  """SHA-256 of what a file is made from: its records, and the files that hold their pixels."""
  facts = [source.num_classes, source.num_channels, source.spatial_dims, source.dtype]
  content = hashlib.sha256(json.dumps(facts).encode())
  for index in range(*span):
    content.update(json.dumps([source.records[index], source.stamp(index)]).encode())
  return content.hexdigest()


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


def _examples(source: records.Source, start: int) -> Iterator[dict]:
  """The source's records in its order from `start` on, checked."""
  read = progress.track(
    source.read(start),
    total=len(source.records),
    description="prepare",
    unit="records",
    done=start,
  )
  for entry, pixels in zip(source.records[start:], read, strict=True):
    preemption.check("prepare: finished files are kept; the same command goes on from here")
    records.check_pixels(pixels, entry, source.num_classes)
    mask = pixels.mask
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


def _write(path: epath.Path, features, examples: Iterable[dict]) -> dict[str, Any]:
  """Writes one file; its summary.

  Raises:
    OSError: where it cannot be written.
  """
  temporary = path.parent / f"{path.name}.tmp"
  with _named_writing(path):
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
  num_bytes, has_foreground = 0, False
  for example in examples:
    has_foreground |= bool(example["mask"].any())
    record = features.serialize_example(example)
    with _named_writing(path):
      writer.write(record)
    num_bytes += len(record)
  with _named_writing(path):
    writer.close()
  files.flush(temporary)
  temporary.replace(path)
  return {
    "num_bytes": num_bytes,
    "num_bytes_on_disk": path.stat().length,
    "has_foreground": has_foreground,
  }


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
