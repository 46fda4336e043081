"""The entries of `records.json`, held by columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_ID_KEYS = ("record_id", "case_id", "group_id")


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
