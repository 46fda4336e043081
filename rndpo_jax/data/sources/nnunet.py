"""An nnU-Net raw folder: `dataset.json`, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`.

The layout is that of nnU-Net (Isensee et al., Nature Methods 2021), version 2 and 1, in the formats
of `cases.ENDINGS`. Channels CASE_0000, CASE_0001 ... are stacked; an RGB picture is three channels.
Cases without a label file, and those in `imagesTs`, are unlabelled. nnU-Net's `ignore` label, the
highest id, becomes `types.IGNORED`. If `dataset.json` lists the training cases' files under
`dataset`, those are taken and `imagesTr` and `labelsTr` are not looked at. With two spatial
dimensions each slice along a volume's last axis is a record.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from rndpo_jax import errors, types
from rndpo_jax.data import file_checks, records
from rndpo_jax.data.sources import case_source, folder
from rndpo_jax.data.sources import cases as cases_lib

_MAX_CLASSES = types.IGNORED  # masks are kept as u8
_IGNORE = "ignore"  # nnU-Net's name for pixels of unknown class
# Names of channels for which nnU-Net does not take the z-score.
_OWN_NORMALIZATION = ("ct", "nonorm", "rescale_to_0_1", "rgb_to_0_1")


def open_source(config) -> records.Source:
  """The nnU-Net folder `config.data.root`, from `dataset.json`, file names and headers.

  Raises:
    records.DataError: on a missing folder or file, a `dataset.json` that is not understood, a
      file without readable header, a label without image, a missing channel, sizes or affines
      that differ within a case, or dimensions that do not fit config.data.spatial_dims.
  """
  data = config.data
  if data.case_pattern:
    raise errors.DataError(
      f"config.data.case_pattern: found {data.case_pattern!r}, but an nnU-Net folder names its "
      "cases; leave it empty (group_pattern groups the cases of a patient)"
    )
  root = folder.check_root(data.root)
  info = records.read_json(root / "dataset.json", "expected nnU-Net's description of the data set")
  names, has_ignored = _class_names(root, info)
  if data.num_classes not in (0, len(names)):
    raise errors.DataError(
      f"config.data.num_classes: found {data.num_classes}, but {root / 'dataset.json'} lists "
      f"{len(names)} labels; set it to {len(names)}, or to 0 to take theirs"
    )
  channel_names = info.get("channel_names") or info.get("modality") or {"0": ""}
  if not isinstance(channel_names, (dict, list)):
    raise errors.DataError(
      f"{root / 'dataset.json'}: 'channel_names' is {channel_names!r}, expected an object of the "
      "channels' numbers and names"
    )
  files = _case_files(root, info, len(channel_names))
  cases = {name: cases_lib.open_case(*files[name], data.spatial_dims) for name in files}
  for case in cases.values():
    if case.num_channels != len(channel_names):
      raise errors.DataError(
        f"{case.channels[0]}: {case.num_channels} channels in {len(case.channels)} files of the "
        f"case, but {root / 'dataset.json'} lists {len(channel_names)}; expected as many (an RGB "
        "picture is three, a grey one is one)"
      )
  source = case_source.make_source(data, cases, names, has_ignored=has_ignored)
  notes = _notes_of_folder(root, channel_names, data, has_ignored)
  return source._replace(channel_names=_texts(channel_names), notes=(*notes, *source.notes))


def _texts(channel_names) -> tuple[str, ...]:
  """The names in the order of the channels' numbers."""
  if isinstance(channel_names, list):
    return tuple(map(str, channel_names))
  numbered = all(str(key).isdecimal() for key in channel_names)
  keys = sorted(channel_names, key=int) if numbered else channel_names
  return tuple(str(channel_names[key]) for key in keys)


def _notes_of_folder(root, channel_names, data, has_ignored: bool) -> Iterator[str]:
  """What of the folder's own description has another effect here than a reader might think."""
  if has_ignored:
    yield (
      f"{root / 'dataset.json'}: the label {_IGNORE!r} is no class: its pixels are in no loss and "
      "in no metric"
    )
  names = channel_names.values() if isinstance(channel_names, dict) else channel_names
  own = [str(name) for name in names if str(name).lower() in _OWN_NORMALIZATION]
  if own and not data.spacing:  # in the native mode it is done as nnU-Net does
    yield (
      f"{root / 'dataset.json'}: nnU-Net normalises the channel {own[0]!r} in its own way; here "
      f"every channel is normalised by config.data.normalization={data.normalization!r}"
    )
  folds = root / "splits_final.json"
  if folds.exists() and not data.split_file:
    yield (
      f"{folds}: not read; the splits are drawn from config.data.split_seed; to hold out what fold "
      f"0 does, set --config.data.split_file={folds} --config.data.split_fold=0"
    )


def _class_names(root: pathlib.Path, info: dict[str, Any]) -> tuple[list[str], bool]:
  """Names of the classes 0..C-1, and whether the id C is that of ignored pixels.

  From version 2's {name: id} or version 1's {id: name}.
  """
  path, labels = root / "dataset.json", info.get("labels")
  if not isinstance(labels, dict) or len(labels) < 2:
    raise errors.DataError(f"{path}: 'labels' is {labels!r}, expected two names and ids or more")
  if len([name for name in labels if str(name).lower() != _IGNORE]) > _MAX_CLASSES:
    raise errors.DataError(
      f"{path}: 'labels' lists {len(labels)} classes, expected at most {_MAX_CLASSES}, which a "
      "mask of 8 bits can hold beside the ignored pixels; join classes"
    )
  if all(str(key).isdecimal() for key in labels):
    labels = {str(name): int(key) for key, name in labels.items()}
  if sorted(map(str, labels.values())) != sorted(str(i) for i in range(len(labels))):
    raise errors.DataError(
      f"{path}: 'labels' has the ids {list(labels.values())}, expected 0..{len(labels) - 1}, each "
      "once; regions (lists of ids) are not supported, relabel the masks"
    )
  names = [
    file_checks.check_text(str(name), str(path))
    for name, _ in sorted(labels.items(), key=lambda item: int(item[1]))
  ]
  if _IGNORE not in map(str.lower, names):
    return names, False
  if names[-1].lower() != _IGNORE or len(names) < 3:
    raise errors.DataError(
      f"{path}: 'labels' is {labels!r}; expected two classes or more, and the highest id for "
      f"{_IGNORE!r}, as in nnU-Net"
    )
  return names[:-1], True


def _case_files(root, info: dict[str, Any], num_channels: int) -> dict[str, tuple[list, Any]]:
  """(channel files, label file or None) of each case, in natural order of the case ids."""
  ending = info.get("file_ending", ".nii.gz")
  if ending not in cases_lib.ENDINGS:
    raise errors.DataError(
      f"{root / 'dataset.json'}: file_ending {ending!r}; expected one of "
      f"{', '.join(cases_lib.ENDINGS)}: convert the files to one of them"
    )
  listed = "dataset" in info
  cases, labels = _listed_files(root, info["dataset"]) if listed else ({}, {})
  taken = {file.resolve() for channels in cases.values() for file in channels.values()}
  if not listed:
    labels = dict(_files(root / "labelsTr", ending))
  for part in ("imagesTs",) if listed else ("imagesTr", "imagesTs"):
    for name, path in _files(root / part, ending):
      if path.resolve() in taken:
        continue
      match = re.fullmatch(r"(.+)_([0-9]{4})", name)
      if match is None:
        raise errors.DataError(f"{path}: expected CASE_0000{ending}, with a channel; rename it")
      channels = cases.setdefault(match[1], {})
      if int(match[2]) in channels or any(
        other.parent != path.parent for other in channels.values()
      ):
        raise errors.DataError(
          f"{path}: second image of the case {match[1]!r}, beside "
          f"{next(iter(channels.values()))}; keep one"
        )
      channels[int(match[2])] = path
  if not cases:
    raise errors.DataError(f"{root / 'imagesTr'}: no images; expected files CASE_0000{ending}")
  for name, channels in cases.items():
    count = len(channels) if ending in cases_lib.PICTURES else num_channels  # several in one file
    if sorted(channels) != list(range(count)):
      raise errors.DataError(
        f"{next(iter(channels.values()))}: case {name!r} has the channels {sorted(channels)}, "
        f"dataset.json lists {num_channels}; expected each of 0..{num_channels - 1}"
      )
  orphans = sorted(set(labels) - set(cases))
  if orphans:
    raise errors.DataError(
      f"{labels[orphans[0]]}: mask without image; expected "
      f"{root / 'imagesTr' / orphans[0]}_0000{ending}; add it or remove the mask"
    )
  order = sorted(cases, key=folder.natural)
  return {n: ([file for _, file in sorted(cases[n].items())], labels.get(n)) for n in order}


def _listed_files(root: pathlib.Path, listed: Any) -> tuple[dict, dict]:
  """Channel files and label files by case id, from `dataset` in `dataset.json`.

  Paths are relative to the folder unless they are absolute, and may hold environment variables,
  as nnU-Net reads them.
  """
  path = root / "dataset.json"
  if not isinstance(listed, dict) or not listed:
    raise errors.DataError(
      f"{path}: 'dataset' is {type(listed).__name__}, expected an object of case ids, each with "
      "'images' (a list of paths) and 'label' (a path)"
    )
  cases, labels, owners = {}, {}, {}
  for name, entry in listed.items():
    name = file_checks.check_text(name, str(path))
    files = entry.get("images") if isinstance(entry, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
      raise errors.DataError(
        f"{path}: the case {name!r} of 'dataset' has the images {files!r}, expected a list of paths"
      )
    if not files:
      raise errors.DataError(
        f"{path}: the case {name!r} has no images in 'dataset'; list them, or take it out"
      )
    label = entry.get("label")
    if label is not None and not isinstance(label, str):
      raise errors.DataError(
        f"{path}: the case {name!r} of 'dataset' has the label {label!r}, expected a path"
      )
    cases[name] = dict(enumerate(root / os.path.expandvars(file) for file in files))
    if label is not None:
      labels[name] = root / os.path.expandvars(label)
    for file in cases[name].values():
      owner = owners.setdefault(file.resolve(), name)
      if owner != name or len({other.resolve() for other in cases[name].values()}) < len(files):
        raise errors.DataError(
          f"{path}: {file} is listed twice, for the cases {owner!r} and {name!r}; one image in two "
          "cases might be trained on and tested on, take one out"
        )
  missing = [
    file
    for files in (*(case.values() for case in cases.values()), labels.values())
    for file in files
    if not file.is_file()
  ]
  if missing:
    raise errors.DataError(
      f"{missing[0]}: no such file, but 'dataset' in {path} lists it ({len(missing)} such files); "
      "bring it back, or take its case out"
    )
  return cases, labels


def _files(directory: pathlib.Path, ending: str) -> list[tuple[str, pathlib.Path]]:
  """The files with this ending, each with its name without it, as `check_text` gives it."""
  if not directory.is_dir():
    if directory.name == "imagesTs":
      return []
    raise errors.DataError(
      f"{directory}: no such folder; an nnU-Net raw folder holds dataset.json, imagesTr, labelsTr"
    )
  names = sorted(directory.iterdir())
  found = [p for p in names if p.name.endswith(ending) and not p.name.startswith(".")]
  return [(file_checks.check_text(p.name.removesuffix(ending), str(p)), p) for p in found]
