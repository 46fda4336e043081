"""Folders in folders, as archives of DICOM leave them: PATIENT/STUDY/SERIES/."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from rndpo_jax.data import file_checks


def below(place: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
  """The folders below one, at any depth, each before those in it.

  Hidden folders, those that may not be read (lost+found), and links to a folder on the way down to
  them are left out.

  Yields:
    (names from `place` on, joined by '_', folder).
  """
  yield from _below(place, (), (place.resolve(),))


def _below(place: pathlib.Path, names: tuple[str, ...], above: tuple[pathlib.Path, ...]):
  for path in sorted(place.iterdir()):
    if path.name.startswith(".") or not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
      continue
    real = path.resolve()
    if real in above:  # a link that would never end
      continue
    own = (*names, file_checks.check_text(path.name, str(path)))
    yield "_".join(own), path
    yield from _below(path, own, (*above, real))
