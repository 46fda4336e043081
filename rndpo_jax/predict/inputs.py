"""Which cases a folder or file holds, by names alone."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import NamedTuple

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources.folder import natural

NIFTI = (".nii.gz", ".nii")
IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
# Overlooking one of these would drop a case without a word; other files may lie about.
_UNREADABLE = (".bmp", ".gif", ".webp", ".dcm", ".gz", ".mha", ".mhd", ".nrrd", ".npy")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_MASK_ENDING = {".jpg": ".png", ".jpeg": ".png"}  # JPEG changes class ids


class Input(NamedTuple):
  """A case.

  Attributes:
    case_id: what its mask is named by.
    files: its channels in order; of a 2D image one file, which holds all.
    ending: of the files, as they spell it.
    problem: why it cannot be predicted; empty where nothing is known against it.
  """

  case_id: str
  files: tuple[pathlib.Path, ...]
  ending: str
  problem: str = ""

  @property
  def is_nifti(self) -> bool:
    return self.ending.lower() in NIFTI

  @property
  def mask_name(self) -> str:
    """Of the mask's file: the input's format, but PNG for JPEG."""
    return self.case_id + _MASK_ENDING.get(self.ending.lower(), self.ending)


def list_inputs(path: str, num_channels: int) -> list[Input]:
  """The cases of a folder, or that of one file, in natural order of their ids.

  NIfTI files are channels, as nnU-Net names them (`ID_0000.nii.gz`), if all of the folder are
  named so; else each is a case.

  Args:
    path: `--input`.
    num_channels: I of the network.

  Raises:
    errors.DataError: if there is nothing, or two files are of one id.
  """
  if "://" in path:
    raise errors.DataError(
      f"--input: a bucket cannot be read, found {path!r}; mount it and give that folder"
    )
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    found = _listed(sorted(place.iterdir()))
  elif place.is_file():
    found = _listed([place])
    match = _CHANNEL.fullmatch(next(iter(found))[0]) if found else None
    if match and found[0][1].lower() in NIFTI:  # with the other channels of its case
      same = [name for name in sorted(place.parent.iterdir()) if _is_channel(name, match[1])]
      found = [entry for entry in _listed(same) if entry[1] == found[0][1]]
  else:
    raise errors.DataError(f"--input: {place}: no such folder or file; give that of the images")
  if not found:
    raise errors.DataError(
      f"--input: {place}: no images; expected files {', '.join((*NIFTI, *IMAGES))}{_hint(place)}"
    )
  volumes = [entry for entry in found if entry[1].lower() in NIFTI]
  inputs = [
    Input(stem, (file,), ending, problem)
    for stem, ending, file, problem in found
    if ending.lower() not in NIFTI
  ]
  if all(_CHANNEL.fullmatch(entry[0]) for entry in volumes):
    inputs += _channels(volumes, num_channels)
  else:
    inputs += [Input(stem, (file,), ending) for stem, ending, file, _ in volumes]
  _check_ids(inputs)
  return sorted(inputs, key=lambda one: natural(one.case_id))


def stamp(one: Input) -> str:
  """Names, sizes and times of change of a case's files: what changes when its pixels do.

  Raises:
    errors.DataError: if a file is gone.
  """
  try:
    stats = [(file.name, os.stat(file)) for file in one.files]
  except OSError as error:
    raise errors.DataError(f"{error.filename}: {error.strerror}; bring it back") from error
  return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _is_channel(path: pathlib.Path, case_id: str) -> bool:
  match = _CHANNEL.fullmatch(_split(path.name)[0])
  return match is not None and match[1] == case_id


def _split(name: str) -> tuple[str, str]:
  """(stem, ending), '.nii.gz' being one ending."""
  ending = next((e for e in NIFTI if name.lower().endswith(e)), pathlib.Path(name).suffix)
  return (name[: -len(ending)], name[-len(ending) :]) if ending else (name, "")


def _listed(paths: list[pathlib.Path]) -> list[tuple[str, str, pathlib.Path, str]]:
  """(stem, ending, path, problem) of each file that is an image by its name."""
  found = []
  for path in paths:
    stem, ending = _split(path.name)
    kind = ending.lower()
    if path.name.startswith(".") or path.is_dir():
      continue
    if kind in (*NIFTI, *IMAGES):
      found.append((file_checks.check_text(stem, str(path)), ending, path, ""))
    elif kind in _UNREADABLE:
      taken = ", ".join((*NIFTI, *IMAGES))
      problem = f"{path}: not a format that is read; expected {taken}; convert or remove it"
      found.append((file_checks.check_text(stem, str(path)), ending, path, problem))
  return found


def _channels(volumes, num_channels: int) -> list[Input]:
  cases: dict[tuple[str, str], dict[int, pathlib.Path]] = {}
  for stem, ending, file, _ in volumes:
    match = _CHANNEL.fullmatch(stem)
    cases.setdefault((match[1], ending), {})[int(match[2])] = file
  inputs = []
  for (name, ending), of_number in cases.items():
    numbers, problem = sorted(of_number), ""
    first = of_number[numbers[0]]
    if numbers != list(range(num_channels)):
      found = ", ".join(f"{n:04d}" for n in numbers)
      problem = (
        f"{first}: case {name!r} has the channels {found}, but the network was trained on "
        f"{num_channels}, expected 0000 to {num_channels - 1:04d}; add or remove files (where the "
        "four digits are no channel, rename: ID.nii.gz, or ID_0000.nii.gz)"
      )
    inputs.append(Input(name, tuple(of_number[n] for n in numbers), ending, problem))
  return inputs


def _check_ids(inputs: list[Input]) -> None:
  first: dict[str, Input] = {}
  for one in inputs:
    other = first.setdefault(one.case_id, one)
    if other is not one:
      raise errors.DataError(
        f"{one.files[0]}: second file of the id {one.case_id!r}, beside {other.files[0].name}; "
        "their masks would have one name, keep or rename one"
      )


def _hint(place: pathlib.Path) -> str:
  inside = [name for name in ("imagesTs", "imagesTr", "images") if (place / name).is_dir()]
  return f"; give {place / inside[0]}" if inside else ""
