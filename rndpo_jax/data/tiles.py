"""Fixed tiles of prepared images in the native mode: what is mined, validated on, and in pairs.

The tiles of a record cover it with as little overlap as that needs. They are numbered once for the
whole data set, so that a pair says by a number which pixels it is of, whatever devices or batches
there were.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native, patches
from rndpo_jax.evaluation import sliding_window

_STEP = 1.0  # of a patch, at most, from tile to tile
_KEEP_RECORDS = 4  # tiles of a record are mostly read one after another


class Tiles(Sequence):
  """Entries of tiles, as `records.record` makes them: of a record each, with a patch's shape.

  Args:
    whole: the data set by records.
  """

  def __init__(self, whole: dataset_lib.Dataset):
    self.whole = whole
    self.record, self._start = _positions(whole)
    self._kept: dict[tuple[int, bool], dict] = {}

  def __len__(self) -> int:
    return len(self.record)

  def __getitem__(self, index: int) -> dict[str, Any]:
    entry = self.whole.records[self.record[index]]
    place = ",".join(map(str, self._start[index]))
    return {
      **entry,
      "record_id": f"{entry['record_id']}@{place}",
      "shape": list(self.whole.size),
      "spacing": list(self.whole.native.spacing),
    }

  def load(self, index: int, *, with_labels: bool) -> dict[str, np.ndarray]:
    """As `dataset.load_example`: image f32[*size, I], label u8[*size], index i32[] of the tile."""
    whole = self._whole(int(self.record[index]), with_labels)
    example = patches.cut_example(whole, self._start[index], self.whole.size)
    if not with_labels:
      example["label"] = np.zeros(self.whole.size, np.uint8)
    return {**example, "index": np.int32(index)}

  def cut(self, index: int, array: np.ndarray) -> np.ndarray:
    """The tile [*size, ...] of an array [*M, ...] of its record, zeros beyond."""
    return patches.cut(array, self._start[index], self.whole.size)

  def _whole(self, record: int, with_labels: bool) -> dict[str, np.ndarray]:
    """A record on the model's spacing, the last few kept; of two threads both may read it."""
    key = record, with_labels
    found = self._kept.get(key)
    if found is None:
      found = dataset_lib.load_on_spacing(self.whole, record, with_labels=with_labels)
      self._kept[key] = found
      for old in list(self._kept)[:-_KEEP_RECORDS]:
        self._kept.pop(old, None)
    return found


def view(dataset: dataset_lib.Dataset) -> dataset_lib.Dataset:
  """The data set by tiles: `records` and `splits` are of tiles, and `load_example` gives one.

  In the simple mode, or of a view, the data set itself.
  """
  if dataset.native is None or dataset.tiles is not None:
    return dataset
  found = Tiles(dataset)
  parts = {
    name: np.flatnonzero(np.isin(found.record, indices)) for name, indices in dataset.splits.items()
  }
  return dataset._replace(records=found, splits=parts, tiles=found)


def whole(dataset: dataset_lib.Dataset) -> dataset_lib.Dataset:
  """The data set by records: what `view` was made of, or the data set itself."""
  return dataset if dataset.tiles is None else dataset.tiles.whole


def record_of(dataset: dataset_lib.Dataset, index: int) -> int:
  """The record that an index of the data set is of, by records or by tiles."""
  return int(index if dataset.tiles is None else dataset.tiles.record[index])


def part_of(dataset: dataset_lib.Dataset, index: int, array: np.ndarray) -> np.ndarray:
  """What an index of the data set sees of its record: all of it, or a tile [*size, ...].

  Args:
    dataset: by records or by tiles.
    index: of it.
    array: [*M, ...] of the record on the model's spacing; zeros are where a tile goes beyond.
  """
  return array if dataset.tiles is None else dataset.tiles.cut(index, array)


def starts(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, ...]]:
  """First pixels of the tiles of an image; none if it is empty.

  Args:
    shape: M of the image.
    size: of a tile; a shorter image is in the middle of its one tile.
  """
  if not all(shape):
    return []
  padded = [max(n, m) for n, m in zip(shape, size, strict=True)]
  before = [patches.clamp(0, n, m) for n, m in zip(shape, size, strict=True)]
  places = sliding_window.positions(padded, size, _STEP)
  return [tuple(p + b for p, b in zip(place, before, strict=True)) for place in places]


def _positions(dataset: dataset_lib.Dataset) -> tuple[np.ndarray, np.ndarray]:
  """(record i32[T], first pixel i32[T, dims]) of all tiles."""
  of_shape = functools.cache(lambda shape: starts(shape, dataset.size))
  found = []
  for index, box in enumerate(dataset.boxes):
    spacing = dataset.records[index]["spacing"]
    shape = native.model_shape(box, spacing, dataset.native.spacing)
    found += [(index, *start) for start in of_shape(shape)]
  table = np.array(found, np.int32).reshape(-1, 1 + dataset.spatial_dims)
  return table[:, 0], table[:, 1:]
