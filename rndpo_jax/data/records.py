"""What a source hands over, and `records.json`, the table of what was prepared.

A record is one item on its own grid: an image or one slice of a volume where there are two
spatial dimensions, a volume where there are three. Records of one case are judged together;
cases of one group (a patient) never stand in two splits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.data import file_checks
from rndpo_jax.runtime import files

FILE = "records.json"
_SOURCE_KEYS = (
  "num_classes", "class_names", "num_channels", "spatial_dims", "spacing_unit", "has_ignored",
)  # fmt: skip
_MATCH_SECONDS = 2.0  # for one name
_ID_KEYS = ("record_id", "case_id", "group_id")


class Pixels(NamedTuple):
  """What a source reads for one record.

  Attributes:
    image: uint8 or float32 [*S, I], as it came.
    mask: u8[*S] class ids or `types.IGNORED`, or None if the image has no mask.
    affine: f[4, 4], voxel indices to world; the identity if unknown.
    image_path: the image's file, for messages.
    mask_path: the mask's file, likewise.
  """

  image: np.ndarray
  mask: np.ndarray | None
  affine: np.ndarray
  image_path: str = "generated image"
  mask_path: str = "generated mask"


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


def extract(pattern: str, text: str, key: str) -> str:
  """Group 1 of `pattern` found in `text`, or the whole text if the pattern is empty.

  Raises:
    DataError: if the pattern is not found; `key` is the config key that it came from.
  """
  if not pattern:
    return text
  try:
    with _time_limit():
      match = re.search(pattern, text)
  except TimeoutError as error:
    raise errors.DataError(
      f"config.data.{key}: {pattern!r} takes more than {_MATCH_SECONDS} s on {text!r}; write it "
      "without a repetition inside a repetition, as in (a+)+"
    ) from error
  if match is None or not match.group(1):
    raise errors.DataError(
      f"config.data.{key}: {pattern!r} finds nothing in {text!r}; fix the pattern, or remove "
      "the file"
    )
  return match.group(1)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
  """Raises TimeoutError in the main thread after `_MATCH_SECONDS`; `re` looks at signals itself."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(*_):
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, _MATCH_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


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


class Table(Sequence):
  """Entries as `record` makes them, held by columns: some 30 bytes each, where a dict takes 600.

  Args:
    columns: from `to_columns`.
  """

  def __init__(self, columns: dict[str, list]):
    self._grids = columns["grids"]
    numbers = {name: np.array(columns[name], np.int32) for name in ("grid", "slice", "has_mask")}
    ids = {name: None if columns[name] is None else _encode(columns[name]) for name in _ID_KEYS}
    if len({len(x) for x in (*numbers.values(), *ids.values()) if x is not None}) > 1:
      raise ValueError("columns of different lengths")
    self._numbers, self._ids = numbers, ids

  def __len__(self) -> int:
    return len(self._numbers["grid"])

  def __getitem__(self, index: int) -> dict[str, Any]:
    grid = self._grids[self._numbers["grid"][index]]
    ids = {name: self.ids(name)[index].decode() for name in _ID_KEYS}
    return {
      **ids,
      "slice": int(self._numbers["slice"][index]),
      "shape": list(grid["shape"]),
      "spacing": grid["spacing"] and list(grid["spacing"]),
      "slice_spacing": grid["slice_spacing"],
      "has_mask": bool(self._numbers["has_mask"][index]),
    }

  def ids(self, name: str) -> np.ndarray:
    """UTF-8 S[N] of `record_id`, `case_id` or `group_id`."""
    found = self._ids[name]
    return self.ids(_ID_KEYS[_ID_KEYS.index(name) - 1]) if found is None else found


def _encode(ids: Sequence[str]) -> np.ndarray:
  return np.array([one.encode() for one in ids], np.bytes_)


def to_columns(entries: Sequence[dict[str, Any]]) -> dict[str, list]:
  """What a `Table` holds, for JSON.

  Returns:
    `record_id`; `case_id` and `group_id`, None if all are those of the column before; `slice`;
    `has_mask`, 0 or 1; `grid`, each a place in `grids`, the different {shape, spacing,
    slice_spacing}.
  """
  ids = [[entry[name] for entry in entries] for name in _ID_KEYS]
  before = [None, *ids]
  grids: dict[tuple, int] = {}
  grid = []
  for entry in entries:
    spacing = entry["spacing"] and tuple(entry["spacing"])
    key = tuple(entry["shape"]), spacing, entry["slice_spacing"]
    grid.append(grids.setdefault(key, len(grids)))
  return {
    **{
      name: None if one == other else one
      for name, one, other in zip(_ID_KEYS, ids, before, strict=False)
    },
    "slice": [entry["slice"] for entry in entries],
    "has_mask": [int(entry["has_mask"]) for entry in entries],
    "grid": grid,
    "grids": [
      dict(zip(("shape", "spacing", "slice_spacing"), values, strict=True)) for values in grids
    ],
  }


def write(directory: epath.Path, source: Source, fingerprint: str, splits_sha256: str) -> None:
  """Writes `records.json` into the directory, whole or not at all.

  Args:
    directory: of the prepared data.
    source: whose records were prepared.
    fingerprint: SHA-256 of all that training reads; what is made of the data keeps it.
    splits_sha256: of the splits that belong to it.
  """
  content = {key: getattr(source, key) for key in _SOURCE_KEYS}
  content |= {"fingerprint": fingerprint, "splits_sha256": splits_sha256}
  content["records"] = to_columns(source.records)
  files.write_text(directory / FILE, json.dumps(content, allow_nan=False))


def read(directory: epath.Path) -> dict[str, Any]:
  """Reads `records.json`; its `records` are a `Table`.

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
      content["records"] = Table(content["records"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    remedy = f"remove it and run the stage 'prepare' again ({error})"
    raise errors.DataError(f"{path}: lacks records that can be read; {remedy}") from error
  if missing:
    raise errors.DataError(
      f"{path}: lacks {missing[0]!r}; remove it and run the stage 'prepare' again"
    )
  return content


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
