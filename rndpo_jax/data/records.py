"""What a source hands over, and `records.json`, the table of what was prepared.

A record is one item on its own grid: an image or one slice of a volume where there are two
spatial dimensions, a volume where there are three. Records of one case are judged together;
cases of one group (a patient) never stand in two splits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.data import file_checks, record_table
from rndpo_jax.data.file_checks import extract as extract  # part of this module's interface
from rndpo_jax.runtime import files

FILE = "records.json"
_SOURCE_KEYS = (
  "num_classes", "class_names", "num_channels", "spatial_dims", "spacing_unit", "has_ignored",
)  # fmt: skip


class Native(NamedTuple):
  """How images come to the model's spacing in the native mode; see `data.native`.

  Attributes:
    spacing: mm a pixel of the model's grid, one an axis of a record.
    schemes: a name of `intensity.SCHEMES` for each channel.
    statistics: of each channel, what `intensity.ct` reads; None where its scheme reads nothing.
  """

  spacing: tuple[float, ...]
  schemes: tuple[str, ...]
  statistics: tuple[dict[str, float] | None, ...]


class OnSpacing(NamedTuple):
  """A record in the native mode: cropped, normalised and resampled.

  Attributes:
    image: f32[*M, I] on the model's spacing; a single pixel if the box is empty.
    mask: u8[*M], or None.
    box: i32[dims, 2], first pixel and the one after the last on the record's own grid; zeros for a
      slice in which all is zero.
  """

  image: np.ndarray
  mask: np.ndarray | None
  box: np.ndarray


class Pixels(NamedTuple):
  """What a source reads for one record.

  Attributes:
    image: uint8 or float32 [*S, I], as it came.
    mask: u8[*S] class ids or `types.IGNORED`, or None if the image has no mask.
    affine: f[4, 4], voxel indices to world; the identity if unknown.
    image_path: the image's file, for messages.
    mask_path: the mask's file, likewise.
    on_spacing: what is trained on in the native mode, else None.
  """

  image: np.ndarray
  mask: np.ndarray | None
  affine: np.ndarray
  image_path: str = "generated image"
  mask_path: str = "generated mask"
  on_spacing: OnSpacing | None = None


class Source(NamedTuple):
  """A data set as file names and headers tell it, before a pixel is read.

  Attributes:
    name: of the data set.
    num_classes: C, background among them.
    class_names: one a class, background first.
    num_channels: I.
    spatial_dims: 2 or 3.
    spacing_unit: 'mm', or 'voxel' if the spacing of any record is unknown.
    dtype: of the images, 'uint8' if all of them are and 'float32' otherwise.
    records: one `record(...)` each, in the order of `read`.
    read: start -> iterator of Pixels, one a record from that place on.
    fingerprint: place -> what changes when the pixels of that record do, without reading them.
    has_ignored: whether masks may hold `types.IGNORED`.
    notes: what a user should know of how the source was understood; said once when it is prepared.
    channel_names: one a channel, () if the source names none.
    native: set by `data.native`, whose `read` gives `Pixels.on_spacing`; None in the simple mode.
  """

  name: str
  num_classes: int
  class_names: list[str]
  num_channels: int
  spatial_dims: int
  spacing_unit: str
  dtype: str
  records: list[dict[str, Any]]
  read: Callable[[int], Iterator[Pixels]]
  fingerprint: Callable[[int], str]
  has_ignored: bool = False
  notes: tuple[str, ...] = ()
  channel_names: tuple[str, ...] = ()
  native: Native | None = None


def record(
  *,
  record_id: str,
  case_id: str,
  group_id: str,
  shape,
  has_mask: bool,
  slice_index=-1,
  spacing=None,
  slice_spacing=None,
) -> dict[str, Any]:
  """One entry of `records.json`.

  `spacing` is in mm along each axis of `shape`, `slice_spacing` between the slices of the case;
  None if unknown, or if there are no slices.
  """
  return {
    "record_id": record_id,
    "case_id": case_id,
    "group_id": group_id,
    "slice": int(slice_index),
    "shape": [int(n) for n in shape],
    "spacing": None if spacing is None else [float(s) for s in spacing],
    "slice_spacing": None if slice_spacing is None else float(slice_spacing),
    "has_mask": bool(has_mask),
  }


def file_fingerprint(*paths: os.PathLike) -> str:
  """Sizes and times of change of the files that hold a record's pixels."""
  stats = [(os.fspath(path), os.stat(path)) for path in paths]
  return json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def num_bytes(source: Source, entry: dict[str, Any]) -> int:
  """Bytes of a record's image and mask as the headers tell them, uncompressed."""
  channels = source.num_channels * np.dtype(source.dtype).itemsize
  return math.prod(entry["shape"]) * (channels + entry["has_mask"])


def check_pixels(pixels: Pixels, entry: dict[str, Any], num_classes: int) -> None:
  """Refuses pixels that cannot be trained on.

  Raises:
    DataError: on a shape other than the header's, NaN or infinite values, a mask of another
      size, or a class id outside 0..C-1.
  """
  shape = tuple(entry["shape"])
  if pixels.image.shape[:-1] != shape:
    raise errors.DataError(
      f"{pixels.image_path}: holds {pixels.image.shape[:-1]} pixels, its header says {shape}; "
      "replace or remove it"
    )
  if pixels.image.dtype != np.uint8 and not np.isfinite(pixels.image).all():
    count = int((~np.isfinite(pixels.image)).sum())
    raise errors.DataError(
      f"{pixels.image_path}: {count} NaN or infinite values ({entry['record_id']}); expected "
      "finite ones, replace them or remove the image"
    )
  if pixels.mask is None:
    return
  if pixels.mask.shape != shape:
    raise errors.DataError(
      f"{pixels.mask_path}: a mask of {pixels.mask.shape} pixels for an image of {shape}; expected "
      "the same size"
    )
  wrong = pixels.mask[(pixels.mask >= num_classes) & (pixels.mask != types.IGNORED)]
  if wrong.size:
    raise errors.DataError(
      f"{pixels.mask_path}: the mask holds class {int(wrong.max())}, expected "
      f"0..{num_classes - 1}; fix the mask or set config.data.num_classes"
    )


def write(
  directory: epath.Path,
  source: Source,
  fingerprint: str,
  splits_sha256: str,
  boxes: Sequence = (),
) -> None:
  """Writes `records.json` into the directory, whole or not at all.

  Args:
    directory: of the prepared data.
    source: whose records were prepared.
    fingerprint: SHA-256 of all that training reads; what is made of the data keeps it.
    splits_sha256: of the splits that belong to it.
    boxes: in the native mode `OnSpacing.box` of each record.
  """
  content = {key: getattr(source, key) for key in _SOURCE_KEYS}
  content |= {"fingerprint": fingerprint, "splits_sha256": splits_sha256}
  content["records"] = record_table.to_columns(source.records)
  if source.native is not None:
    content["native"] = {**source.native._asdict(), "boxes": boxes}
  files.write_text(directory / FILE, json.dumps(content, allow_nan=False))


def read(directory: epath.Path) -> dict[str, Any]:
  """Reads `records.json`; `records` are a `record_table.Table`.

  `native` is a `Native` and `boxes` i32[N, dims, 2]; in the simple mode both are None.

  Raises:
    DataError: if it is missing, is no JSON, or lacks a key.
  """
  path = directory / FILE
  content = read_json(path, "run the stage 'prepare' again")
  missing = [
    key for key in (*_SOURCE_KEYS, "fingerprint", "splits_sha256", "records") if key not in content
  ]
  try:
    if not missing:
      content["records"] = record_table.Table(content["records"])
      content |= _native(content)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    remedy = f"remove it and run the stage 'prepare' again ({error})"
    raise errors.DataError(f"{path}: lacks records that can be read; {remedy}") from error
  if missing:
    raise errors.DataError(
      f"{path}: lacks {missing[0]!r}; remove it and run the stage 'prepare' again"
    )
  return content


def _native(content: dict[str, Any]) -> dict[str, Any]:
  found = content.get("native")
  if found is None:
    return {"native": None, "boxes": None}
  boxes = np.array(found["boxes"], np.int32).reshape(-1, content["spatial_dims"], 2)
  if len(boxes) != len(content["records"]):
    raise ValueError(f"{len(boxes)} boxes of {len(content['records'])} records")
  return {"native": Native(*(tuple(found[name]) for name in Native._fields)), "boxes": boxes}


def read_json(path: epath.Path, remedy: str, kind: type = dict) -> Any:
  """Reads a JSON object, or a list if `kind` is that.

  Raises:
    DataError: if the file is missing or is no such JSON; `remedy` ends the message.
  """
  file_checks.check_regular(path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.DataError(f"{path}: no such file; {remedy}") from None
  except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError among them
    raise errors.DataError(
      f"{path}: cannot be read as JSON ({file_checks.one_line(error)}); {remedy}"
    ) from error
  if not isinstance(content, kind):
    expected = {dict: "an object", list: "a list"}[kind]
    raise errors.DataError(
      f"{path}: holds a {type(content).__name__}, expected {expected}; {remedy}"
    )
  return content
