"""One file of records: what is in it, and how it is written without TensorFlow."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.data import records
from rndpo_jax.runtime import files, preemption

# A record is a protocol buffer, of less than 2 GiB, with room for its masks, which are compressed.
_MAX_IMAGE_BYTES = 2**31 - 2**27
KEPT = "prepare: finished files are kept"


def features(source: records.Source) -> tfds.features.FeaturesDict:
  """What a record is made of.

  Pixels are bytes as they are, for ArrayRecord compresses every record, and sooner than zlib. Masks
  may be of no pixel, which TFDS cannot read as bytes. In the native mode the image is stored on the
  model's spacing alone, and the mask on both grids.
  """
  dims = source.spatial_dims
  grid = (None,) * dims
  more = {}
  if source.native is not None:
    more = {
      "mask_on_spacing": tfds.features.Tensor(shape=grid, dtype=np.uint8, encoding="zlib"),
      "box": tfds.features.Tensor(shape=(dims, 2), dtype=np.int32),
    }
  dtype = np.dtype(source.dtype if source.native is None else np.float32)
  return tfds.features.FeaturesDict({
    "image": tfds.features.Tensor(
      shape=(*grid, source.num_channels), dtype=dtype, encoding="bytes"
    ),
    "mask": tfds.features.Tensor(shape=grid, dtype=np.uint8, encoding="zlib"),
    "has_mask": tfds.features.Scalar(np.uint8),
    "record_id": tfds.features.Text(),
    "case_id": tfds.features.Text(),
    "group_id": tfds.features.Text(),
    "slice": tfds.features.Scalar(np.int32),
    "spacing": tfds.features.Tensor(shape=(dims,), dtype=np.float32),
    "affine": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
    **more,
  })  # fmt: skip


def examples(source: records.Source, span: tuple[int, int]) -> Iterator[dict]:
  """The source's records in its order, of one span, checked.

  Raises:
    records.DataError: whatever reading the source finds wrong.
    preemption.Preempted: after a signal.
  """
  start, end = span
  read = itertools.islice(source.read(start), end - start)
  for entry, pixels in zip(source.records[start:end], read, strict=True):
    preemption.check(KEPT)
    records.check_pixels(pixels, entry, source.num_classes)
    none = np.zeros((0,) * source.spatial_dims, np.uint8)
    own, more = pixels.on_spacing, {}
    if own is not None:
      more = {"mask_on_spacing": none if own.mask is None else own.mask, "box": own.box}
    image = pixels.image.astype(source.dtype, copy=False) if own is None else own.image
    _check_size(image, pixels.image_path)
    yield {
      "image": image,
      "mask": none if pixels.mask is None else pixels.mask,
      "has_mask": np.uint8(pixels.mask is not None),
      "record_id": entry["record_id"],
      "case_id": entry["case_id"],
      "group_id": entry["group_id"],
      "slice": np.int32(entry["slice"]),
      "spacing": np.asarray(entry["spacing"] or (0,) * source.spatial_dims, np.float32),
      "affine": pixels.affine.astype(np.float32),
      **more,
    }


def _check_size(image: np.ndarray, path: str) -> None:
  """Refuses an image that no record can hold, before it fails to be written."""
  if image.nbytes > _MAX_IMAGE_BYTES:
    raise errors.DataError(
      f"{path}: {image.shape} values of {image.dtype} are {image.nbytes:,} bytes, expected at most "
      f"{_MAX_IMAGE_BYTES:,} in a record; take a coarser config.data.spacing or "
      "config.data.spatial_dims=2, or crop the image"
    )


def write(path: epath.Path, features, examples: Iterable[dict]) -> dict[str, Any]:
  """Writes one file by rename; its summary.

  Args:
    path: of the file.
    features: from `features`.
    examples: from `examples`, or a part of them.

  Raises:
    OSError: if it cannot be written.
  """
  temporary = path.parent / f"{path.name}.tmp"
  with _named_writing(path):
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
  num_bytes, has_foreground, pixels, boxes = 0, False, hashlib.sha256(), []
  for example in examples:
    for name, value in sorted(example.items()):
      value = np.asarray(value)
      pixels.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    boxes += [example["box"].tolist()] if "box" in example else []
    has_foreground |= bool(((example["mask"] > 0) & (example["mask"] != types.IGNORED)).any())
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
    "pixels_fingerprint": pixels.hexdigest(),
    **({"boxes": boxes} if boxes else {}),
  }


@contextlib.contextmanager
def _named_writing(path: epath.Path) -> Iterator[None]:
  """Turns ArrayRecord's error into one that names the file and the remedy."""
  try:
    yield
  except RuntimeError as error:
    number = errno.ENOSPC if files.is_full_disk(error) else errno.EIO
    raise OSError(number, f"{path}: the prepared data cannot be written: {error}") from error


def try_some(source: records.Source, path: epath.Path, count: int, seconds: float) -> int:
  """Writes a file of the first `count` records, or of those that begin within `seconds`.

  Returns:
    How many.

  Raises:
    records.DataError: as `examples`.
  """
  written, end = [], time.monotonic() + seconds

  def some():
    for example in examples(source, (0, count)):
      written.append(example["record_id"])
      yield example
      if time.monotonic() > end:
        return

  write(path, features(source), some())
  return len(written)
