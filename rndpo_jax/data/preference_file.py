"""Preferences that a user already has: `image,chosen,rejected`, paths relative to the CSV file.

Each line says which of two masks of an image a reader took for the better one. The name of `image`
without its ending, and without the channel `_0000`, is the image's id; the id alone will do too.
See `mask_files` for the masks.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import csv_rows, file_checks, mask_files
from rndpo_jax.data.sources import cases
from rndpo_jax.runtime import threads

NAME = "preferences"  # in place of the judge, the rule and the mix of mined pairs
SPLITS = ("unlabelled", "labelled")  # whose images may have preferences: all others are held out
_COLUMNS = ("image", "chosen", "rejected")


class Preference(NamedTuple):
  """A line: `image` is an id, `where` the file and line."""

  image: str
  chosen: pathlib.Path
  rejected: pathlib.Path
  where: str


def read(
  config, entries: Sequence[Mapping[str, Any]], split_of: Mapping[str, str]
) -> tuple[list[Preference], dict[str, mask_files.Grid]]:
  """Reads `config.data.preferences` and looks for its files.

  Args:
    config: the whole config.
    entries: of `records.json`.
    split_of: case id -> its split.

  Returns:
    (preferences in the order of the file, image id -> grid).

  Raises:
    DataError: with file and line, on an image that is unknown or held out, or a mask that is no
      file, of no format that is taken, or the same on both sides.
  """
  path = pathlib.Path(config.data.preferences).expanduser()
  grids = mask_files.grids(entries)
  found = []
  for row in csv_rows.read(path, _COLUMNS):
    image = _image(row, grids)
    split = split_of.get(entries[grids[image].first]["case_id"], "none")
    if split not in SPLITS:
      raise errors.DataError(
        f"{row.where}: the image {image!r} is in the split {split!r}; expected one of "
        f"{', '.join(SPLITS)}, for the others are not trained on: remove the line, or set "
        "config.data.split_file"
      )
    masks = [_mask(row, name, path.parent) for name in _COLUMNS[1:]]
    if masks[0].resolve() == masks[1].resolve():
      raise errors.DataError(
        f"{row.where}: chosen and rejected are the same file, {masks[0]}; expected two masks: "
        "correct or remove the line"
      )
    found.append(Preference(image, *masks, row.where))
  return found, grids


def _image(row: csv_rows.Row, grids: Mapping[str, mask_files.Grid]) -> str:
  cell = row.cells["image"]
  name = pathlib.PurePath(cell).name
  stem = cases.split_name(name)[0]
  for candidate in (cell, name, stem, stem.removesuffix("_0000")):
    if candidate in grids:
      return candidate
  raise errors.DataError(
    f"{row.where}: the data set has no image {stem!r}; ids there look like {min(grids)!r}: correct "
    "or remove the line"
  )


def _mask(row: csv_rows.Row, name: str, folder: pathlib.Path) -> pathlib.Path:
  path = folder / pathlib.Path(row.cells[name]).expanduser()
  if not os.path.isfile(path):  # which takes a name that is too long as well
    raise errors.DataError(
      f"{row.where}: {name}: {path}: no such file; expected the path of a mask, relative to the "
      "folder of the CSV file"
    )
  if mask_files.stem(path.name) is None:
    raise errors.DataError(
      f"{row.where}: {name}: {path}: not a format that masks are taken in; expected "
      f"{', '.join(cases.ENDINGS)}; convert it"
    )
  file_checks.check_regular(path)
  return path


def check(
  preferences: Sequence[Preference],
  grids: Mapping[str, mask_files.Grid],
  num_classes: int,
  affine_of: Callable[[int], np.ndarray] | None = None,
) -> None:
  """Reads every pair of masks, each process its share, as `mask_files.check`.

  Raises:
    DataError: naming the file and its line, also if both masks are equal.
  """

  def one(item: Preference) -> None:
    chosen, rejected = (
      mask_files.check(path, grids[item.image], num_classes, affine_of, item.where)
      for path in (item.chosen, item.rejected)
    )
    if np.array_equal(chosen, rejected):
      raise errors.DataError(
        f"{item.where}: {item.chosen} and {item.rejected} hold the same mask, so nothing is "
        "preferred; remove the line"
      )

  own = preferences[jax.process_index() :: jax.process_count()]
  for _ in threads.in_order(one, own):
    pass


def fingerprint(preferences: Sequence[Preference]) -> str:
  """SHA-256 of the images' ids and the bytes of all masks, in the order of the lines."""
  paths = [path for item in preferences for path in (item.chosen, item.rejected)]
  return mask_files.fingerprint(paths, repr([item.image for item in preferences]))
