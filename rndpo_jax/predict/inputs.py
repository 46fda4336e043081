"""Which cases a folder or file holds, by names, and of pictures by the first one's colours."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import NamedTuple

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources import cases, dicom, subfolders
from rndpo_jax.data.sources.folder import natural

ENDINGS = (*cases.ENDINGS, *cases.LOSSY)
# Overlooking one of these would drop a case without a word; other files may lie about.
_UNREADABLE = (".gif", ".webp", ".jp2", ".gz", ".nhdr", ".hdr", ".mgz", ".mgh", ".mnc", ".npy")
SETTINGS = "predict.json"  # of a folder that prediction writes into
_CHANNEL = re.compile(r"(.+)_(\d{4})")
_SERIES = ""  # ending of a folder
# JPEG changes class ids; .mhd is two files; DICOM has no plain mask.
_MASK_ENDING = {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha", _SERIES: ".nii.gz"}


class Input(NamedTuple):
  """A case.

  Attributes:
    case_id: what its mask is named by.
    files: its channels in order, of an RGB image in one file; the folder of a DICOM series.
    ending: of the files, as they spell it; empty for a series.
    problem: why it cannot be predicted; empty where nothing is known against it.
  """

  case_id: str
  files: tuple[pathlib.Path, ...]
  ending: str
  problem: str = ""

  @property
  def is_picture(self) -> bool:
    return _is_picture(self.ending)

  @property
  def is_series(self) -> bool:
    return self.ending == _SERIES

  @property
  def mask_ending(self) -> str:
    """Of the mask's file: the input's, but PNG for JPEG, .mha for .mhd, NIfTI for a series."""
    return _MASK_ENDING.get(self.ending.lower(), self.ending)

  @property
  def mask_name(self) -> str:
    return self.case_id + self.mask_ending


def list_inputs(path: str, num_channels: int) -> list[Input]:
  """The cases of a folder, or that of one file, in natural order of their ids.

  Volumes' files are channels, as nnU-Net names them (`ID_0000.nii.gz`), if all of the folder are
  named so; else each is a case. Pictures' files are channels if, further, each case has the numbers
  from 0000 on and no more than the network's channels, and the first file does not hold them all,
  as one in colour: `slice_0001.png` is a name like any other.
  A folder with DICOM files in it is a case, be it `path` itself or below it at any depth, but for
  those that prediction wrote; its id is the folders' names from `path` on, joined by '_'. Other
  images are taken from `path` alone.
  What lies beside a file decides on its name's meaning, be it asked for alone or with the folder.

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
  place = pathlib.Path(os.path.abspath(os.path.expanduser(path)))
  if place.is_dir():
    inputs = _in_folder(place, num_channels, _not_written(place))
    _check_ids(inputs)
  elif place.is_file():
    beside = _in_folder(place.parent, num_channels, [])
    inputs = [one for one in beside if place in (*one.files, *_slices(one))]
  else:
    raise errors.DataError(f"--input: {place}: no such folder or file; give that of the images")
  if not inputs:
    raise errors.DataError(
      f"--input: {place}: no images; expected files {', '.join(ENDINGS)} or folders of "
      f"DICOM series{_hint(place)}"
    )
  return sorted(inputs, key=lambda one: natural(one.case_id))


def overlooked(path: str) -> list[pathlib.Path]:
  """The images in folders below `path`, which `list_inputs` does not take: they may be of anything,
  such as labels or earlier versions. Those that prediction wrote do not count."""
  place = pathlib.Path(path).expanduser()
  folders = _not_written(place) if place.is_dir() else []
  return [file for _, folder in folders for _, _, file, _ in _listed(sorted(folder.iterdir()))]


def _not_written(place: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """`subfolders.below`, but for what prediction wrote."""
  found, written = [], []
  for name, folder in subfolders.below(place):
    if (folder / SETTINGS).exists():
      written.append(folder)
    if not any(folder.is_relative_to(other) for other in written):
      found.append((name, folder))
  return found


def _in_folder(
  place: pathlib.Path, num_channels: int, folders: list[tuple[str, pathlib.Path]]
) -> list[Input]:
  """The cases of a folder, and of folders below it with DICOM files, in any order."""
  found = _listed(sorted(place.iterdir()))
  pictures = [entry for entry in found if _is_picture(entry[1])]
  readable = [entry for entry in found if entry[1].lower() in ENDINGS]
  volumes = [entry for entry in readable if not _is_picture(entry[1])]
  inputs = [
    Input(stem, (file,), ending, problem) for stem, ending, file, problem in found if problem
  ]
  for part in (volumes, pictures):
    joined = _channels(part, num_channels)
    if part is pictures and (any(one.problem for one in joined) or _fills(joined, num_channels)):
      joined = []
    inputs += joined or [Input(stem, (file,), ending) for stem, ending, file, _ in part]
  own = (file_checks.check_text(place.name, str(place)), place)
  inputs += [
    Input(n, (folder,), _SERIES) for n, folder in (own, *folders) if dicom.files_of(folder)
  ]
  return inputs


def _fills(joined: list[Input], num_channels: int) -> bool:
  """Whether the first file of cases has all channels of a network of several, as RGB has."""
  if num_channels == 1 or not joined:
    return False
  try:
    return cases.open_file(joined[0].files[0]).num_channels == num_channels
  except errors.DataError:  # reading the case names it
    return False


def _slices(one: Input) -> list[pathlib.Path]:
  return dicom.files_of(one.files[0]) if one.is_series else []


def _is_picture(ending: str) -> bool:
  return ending.lower() in (*cases.PICTURES, *cases.LOSSY)


def stamp(one: Input) -> str:
  """Names, sizes and times of change of a case's files: what changes when its pixels do.

  Raises:
    errors.DataError: if a file is gone.
  """
  files = [part for file in one.files for part in cases.files_of(file)]
  try:
    stats = [(file.name, os.stat(file)) for file in files]
  except OSError as error:
    raise errors.DataError(f"{error.filename}: {error.strerror}; bring it back") from error
  return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _listed(paths: list[pathlib.Path]) -> list[tuple[str, str, pathlib.Path, str]]:
  """(stem, ending, path, problem) of each file that is an image by its name."""
  found = []
  for path in paths:
    stem, ending = cases.split_name(path.name)
    kind = ending.lower()
    if path.name.startswith(".") or path.is_dir():
      continue
    if kind in ENDINGS:
      found.append((file_checks.check_text(stem, str(path)), ending, path, ""))
    elif kind in _UNREADABLE:
      taken = ", ".join(ENDINGS)
      problem = f"{path}: not a format that is read; expected {taken}; convert or remove it"
      found.append((file_checks.check_text(stem, str(path)), ending, path, problem))
  return found


def _channels(found, num_channels: int) -> list[Input]:
  """The files as channels of cases; nothing if one is not named so."""
  named = [_CHANNEL.fullmatch(stem) for stem, *_ in found]
  if not all(named):
    return []
  of_case: dict[tuple[str, str], dict[int, pathlib.Path]] = {}
  for match, (_, ending, file, _) in zip(named, found, strict=True):
    of_case.setdefault((match[1], ending), {})[int(match[2])] = file
  inputs = []
  for (name, ending), of_number in of_case.items():
    numbers, problem = sorted(of_number), ""
    first = of_number[numbers[0]]
    # A picture's file may hold several.
    count = min(len(numbers), num_channels) if _is_picture(ending) else num_channels
    if numbers != list(range(count)):
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
        f"{one.files[0]}: second file of the id {one.case_id!r}, beside {other.files[0]}; "
        "their masks would have one name, keep or rename one"
      )


def _hint(place: pathlib.Path) -> str:
  inside = [name for name in ("imagesTs", "imagesTr", "images") if (place / name).is_dir()]
  if inside:
    return f"; give {place / inside[0]}"
  images = overlooked(str(place))
  if not images:
    return ""
  return (
    f"; of folders in it DICOM alone is taken, and there are {len(images)} images such as "
    f"{images[0]}: give one folder after the other, each with an --output of its own, or bring the "
    f"images into one folder, named as {images[0].parent.name}_{images[0].name}"
  )
