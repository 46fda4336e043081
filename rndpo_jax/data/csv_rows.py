"""Rows of a CSV file that a user wrote, each with its line for messages."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rndpo_jax import errors
from rndpo_jax.data import file_checks


class Row(NamedTuple):
  """A row.

  Attributes:
    where: its file and line, as messages begin.
    cells: column -> text without spaces around it, in Unicode's composed form; never empty.
  """

  where: str
  cells: dict[str, str]


def read(path: os.PathLike | str, columns: Sequence[str]) -> list[Row]:
  """Reads a CSV file in UTF-8 whose first line names its columns; empty lines are left out.

  Args:
    path: of the file.
    columns: that must be there, in any order; others are not read.

  Raises:
    DataError: naming the file and, of a row, its line: if the file is missing or no text, a column
      is missing or there twice, a cell is empty, a line has more cells than there are columns, or
      there is no row.
  """
  path = pathlib.Path(path)
  head = ",".join(columns)
  file_checks.check_regular(path)
  try:
    with path.open(encoding="utf-8-sig", newline="") as file:
      rows = list(_rows(file, path, columns, head))
  except FileNotFoundError:
    raise errors.DataError(
      f"{path}: no such file; expected a CSV file with the columns {head}"
    ) from None
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise errors.DataError(
      f"{path}: cannot be read as CSV in UTF-8 ({file_checks.one_line(error)}); save it as such, "
      f"with the columns {head}"
    ) from error
  if not rows:
    raise errors.DataError(f"{path}: no row under the column names; expected the columns {head}")
  return rows


def _rows(file, path: pathlib.Path, columns: Sequence[str], head: str) -> Iterator[Row]:
  reader = csv.reader(file, strict=True, skipinitialspace=True)
  names = [name.strip() for name in next(reader, [])]
  wrong = [name for name in columns if names.count(name) != 1]
  if wrong:
    raise errors.DataError(
      f"{path}, line 1: found {names.count(wrong[0])} columns {wrong[0]!r} among "
      f"{', '.join(map(ascii, names[:8])) or 'none'}; expected one each of {head}"
    )
  places = {name: names.index(name) for name in columns}
  for cells in reader:
    where = f"{path}, line {reader.line_num}"
    if not any(cell.strip() for cell in cells):
      continue
    if len(cells) > len(names):
      raise errors.DataError(
        f"{where}: {len(cells)} cells under {len(names)} column names; expected {head}: write "
        "numbers with a point, and quote a name that holds a comma"
      )
    found = {name: cells[at].strip() if at < len(cells) else "" for name, at in places.items()}
    empty = [name for name, cell in found.items() if not cell]
    if empty:
      raise errors.DataError(f"{where}: no {empty[0]}; expected {head}: fill the cell in")
    yield Row(where, {name: file_checks.check_text(cell, where) for name, cell in found.items()})
