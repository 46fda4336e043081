"""DICOM series and masks: `images/ID/`, a folder with one series, and `masks/ID.nii.gz` or ID.dcm.

Series may lie deeper, as in `images/PATIENT/STUDY/SERIES/`: then ID is PATIENT_STUDY_SERIES.

Series without a mask are unlabelled. Masks are DICOM segmentations (SEG, see `dicom_seg`), whose
segments' numbers are the class ids, or NIfTI, .mha, .mhd, .nrrd or .gipl on the grid of their
series, see `dicom`. With two spatial dimensions each slice is a record.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from rndpo_jax import errors
from rndpo_jax.data import file_checks, records
from rndpo_jax.data.sources import case_source, dicom, dicom_seg, folder, subfolders
from rndpo_jax.data.sources import cases as cases_lib

_MASKS = (*cases_lib.NIFTI, *cases_lib.ITK, *dicom_seg.ENDINGS)


def open_source(config) -> records.Source:
  """The folder `config.data.root`, from file names and headers.

  Raises:
    records.DataError: on a missing or empty folder, a series or mask that cannot be used, a mask
      without series or on another grid.
  """
  data = config.data
  if data.num_classes < 2:
    raise errors.DataError(
      f"config.data.num_classes: found {data.num_classes}; a folder does not tell, set it"
    )
  root = folder.check_root(data.root)
  series, masks = _series(root / "images"), _masks(root / "masks")
  orphans = sorted(set(masks) - set(series))
  if orphans:
    raise errors.DataError(
      f"{masks[orphans[0]]}: mask without series; expected a folder "
      f"{root / 'images' / orphans[0]}; add it or remove the mask"
    )
  cases = {
    name: cases_lib.open_case([series[name]], masks.get(name), data.spatial_dims)
    for name in sorted(series, key=folder.natural)
  }
  source = case_source.make_source(data, cases, _class_names(masks, data.num_classes))
  modalities = {dicom.modality(place) for place in series.values()}
  # As nnU-Net's name of the channel, which chooses its normalisation.
  return source._replace(channel_names=tuple(modalities) if len(modalities) == 1 else ())


def _series(place: pathlib.Path) -> dict[str, pathlib.Path]:
  """Folder of each case."""
  if not place.is_dir():
    raise errors.DataError(
      f"{place}: no such folder; expected images/ID/, each a folder of one DICOM series, and "
      "masks/ID.nii.gz under config.data.root"
    )
  found = {}
  for path in sorted(place.iterdir()):
    if path.name.startswith("."):
      continue
    if not path.is_dir():
      raise errors.DataError(
        f"{path}: a file; expected a folder for each series, with its slices; move or remove it"
      )
  for name, path in subfolders.below(place):
    # Without series in it at any depth it is an empty case, which reading it names.
    is_top = path.parent == place
    if not dicom.files_of(path) and (not is_top or _has_series(path)):
      continue
    if name in found:
      raise errors.DataError(
        f"{path}: second series of the id {name!r}, beside {found[name]}; rename one of the folders"
      )
    found[name] = path
  if not found:
    raise errors.DataError(f"{place}: no series; expected a folder for each, with its slices")
  return found


def _class_names(masks: Mapping[str, pathlib.Path], num_classes: int) -> list[str]:
  """Names of the classes, those of segments where the masks have such."""
  first: dict[int, tuple[str, pathlib.Path]] = {}
  for path in masks.values():
    named = dicom_seg.labels(path) if path.suffix.lower() in dicom_seg.ENDINGS else {}
    for number, label in sorted(named.items()):
      there, other = first.setdefault(number, (label, path))
      if label != there:
        raise errors.DataError(
          f"{path}: segment {number} is {label!r}, but in {other} it is {there!r}; expected each "
          "class under one number in all files, export them again, or as NIfTI"
        )
      if number >= num_classes:
        raise errors.DataError(
          f"{path}: segment {number} ({label!r}); expected numbers below {num_classes}, set "
          "config.data.num_classes or take the segment away"
        )
  names = folder.class_names(num_classes)
  for number, (label, path) in first.items():
    label = file_checks.check_text(label.strip(), str(path))
    if label and label not in names:
      names[number] = label
  return names


def _has_series(place: pathlib.Path) -> bool:
  return any(dicom.files_of(path) for _, path in subfolders.below(place))


def _masks(place: pathlib.Path) -> dict[str, pathlib.Path]:
  """File of each case's mask."""
  found: dict[str, pathlib.Path] = {}
  for path in sorted(place.iterdir()) if place.is_dir() else ():
    stem, ending = cases_lib.split_name(path.name)
    if path.name.startswith(".") or ending.lower() in (".raw", ".zraw"):  # voxels of .mhd
      continue
    if ending.lower() not in _MASKS:
      raise errors.DataError(
        f"{path}: not a format taken for masks; expected {', '.join(_MASKS)}; convert or remove it"
      )
    name = file_checks.check_text(stem, str(path))
    if name in found:
      raise errors.DataError(f"{path}: second mask of {name!r}, beside {found[name]}; keep one")
    found[name] = path
  return found
