"""A folder of 2D images and masks: `images/ID.png` with `masks/ID.png`.

PNG, BMP, TIFF and JPEG (images alone, for it changes class ids); see `images` for what is taken.
Images without a mask file are unlabelled. Sizes may differ between cases.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks, records
from rndpo_jax.data.sources import cases, images, subfolders
from rndpo_jax.runtime import threads

_LOSSLESS = cases.PICTURES
_LOSSY = cases.LOSSY
# Overlooking one of these would drop a case without a word; other files may lie about.
_UNREADABLE = (".gif", ".webp", ".dcm", ".nii", ".gz", *cases.ITK, ".npy")


def open_source(config) -> records.Source:
  """The folder `config.data.root`, from file names and headers.

  Raises:
    records.DataError: on a missing or empty folder, a file without readable header, a mask
      without image, two files of one id, grey and RGB mixed, or sizes that differ in a case.
  """
  data = config.data
  _check_keys(data)
  root = check_root(data.root)
  image_files = _list(root / "images", (*_LOSSLESS, *_LOSSY), "images")
  mask_files = _list(root / "masks", _LOSSLESS, "masks")
  _check_masks(root, image_files, mask_files)
  ids = sorted(image_files, key=natural)
  headers = {name: images.header(image_files[name]) for name in ids}
  _check_channels(image_files, headers)
  entries = _entries(data, ids, headers, image_files, mask_files)

  def read(name: str) -> records.Pixels:
    mask_file = mask_files.get(name)
    return records.Pixels(
      image=images.read_image(image_files[name]),
      mask=None if mask_file is None else images.read_mask(mask_file, data.num_classes),
      affine=np.eye(4, dtype=np.float32),
      image_path=str(image_files[name]),
      mask_path=str(mask_file),
    )

  def fingerprint(place: int) -> str:
    name = ids[place]
    return records.file_fingerprint(
      *[table[name] for table in (image_files, mask_files) if name in table]
    )

  eight_bit = all(header.dtype == "uint8" for header in headers.values())
  return records.Source(
    name=data.name,
    num_classes=data.num_classes,
    class_names=class_names(data.num_classes),
    num_channels=headers[ids[0]].channels,
    spatial_dims=2,
    spacing_unit="voxel",
    dtype="uint8" if eight_bit else "float32",
    records=entries,
    read=lambda start: threads.in_order(read, ids[start:]),
    fingerprint=fingerprint,
    notes=(*_notes(image_files, headers), *([images.SPACING_NOTE] if data.spacing else [])),
  )


def _check_keys(data) -> None:
  """Checks what a folder cannot tell, or cannot hold."""
  if data.spatial_dims != 2:
    raise errors.DataError(
      f"config.data.spatial_dims: found {data.spatial_dims}, but a folder holds 2D images; set it "
      "to 2, or take volumes as NIfTI with config.data.source='nnunet'"
    )
  if data.num_classes < 2:
    raise errors.DataError(
      f"config.data.num_classes: found {data.num_classes}; a folder does not tell, set it"
    )


def _check_masks(root: pathlib.Path, image_files, mask_files) -> None:
  """Checks that each mask has an image."""
  orphans = sorted(set(mask_files) - set(image_files))
  if orphans:
    hint = (
      "; names as ID_0000 are nnU-Net's: config.data.source='nnunet' reads such files from "
      "imagesTr and labelsTr, beside a dataset.json"
    )
    raise errors.DataError(
      f"{mask_files[orphans[0]]}: mask without image; expected {root / 'images' / orphans[0]}"
      f".png (or .jpg, .tif); add it or remove the mask"
      f"{hint if f'{orphans[0]}_0000' in image_files else ''}"
    )


def class_names(num_classes: int) -> list[str]:
  """Names where the files tell none."""
  names = [f"class {c}" for c in range(1, num_classes)]
  return ["background", *(names if num_classes > 2 else ["foreground"])]


def _notes(files, headers) -> Iterator[str]:
  """Images that a viewer shows otherwise than they are taken."""
  turned = [name for name, header in headers.items() if header.orientation != 1]
  if turned:
    yield (
      f"{files[turned[0]]}: tagged with orientation {headers[turned[0]].orientation}, as are "
      f"{len(turned)} of {len(headers)} images; PNG and JPEG are taken as stored, TIFF as the tag "
      "turns it: make sure that the masks are alike"
    )


def check_root(root: str) -> pathlib.Path:
  """The folder of a source's files.

  Raises:
    records.DataError: if the key is not set, names a bucket, or there is no such folder.
  """
  if not root:
    raise errors.DataError("config.data.root: not set; give the folder, --config.data.root=DIR")
  if "://" in root:  # a path of one slash would be looked for, and be missing for another reason
    raise errors.DataError(
      f"config.data.root: a bucket cannot be read as a source, found {root!r}; mount it, for "
      "example with gcsfuse, and give that folder"
    )
  file_checks.check_text(root, "config.data.root")
  path = pathlib.Path(root).expanduser()
  if not path.is_dir():
    raise errors.DataError(f"{path}: no such folder; set config.data.root to the data's folder")
  return path


def natural(text: str) -> list:
  """Sorting key by which z2 comes before z10."""
  parts = re.split(r"([0-9]+)", text)
  return [(int(part), part) if i % 2 else part for i, part in enumerate(parts)]


def _list(folder: pathlib.Path, suffixes: tuple[str, ...], what: str) -> dict[str, pathlib.Path]:
  """File of each id in the folder."""
  if not folder.is_dir():
    raise errors.DataError(
      f"{folder}: no such folder; expected images/ID.png and masks/ID.png under config.data.root"
      f"{_hint(folder.parent)}"
    )
  files: dict[str, pathlib.Path] = {}
  for path in sorted(folder.iterdir()):
    suffix = path.suffix.lower()
    if path.name.startswith("."):
      continue
    if suffix not in suffixes:
      if path.is_dir():
        _check_no_images(path, suffixes)
        continue
      if suffix in (*_LOSSY, *_UNREADABLE):
        why = "JPEG changes class ids" if suffix in _LOSSY else "it would be overlooked"
        raise errors.DataError(
          f"{path}: not a format taken in {what} ({why}); expected {', '.join(suffixes)}; "
          "convert or remove it"
        )
      continue
    name = file_checks.check_text(path.stem, str(path))
    file_checks.check_regular(path)
    if name in files:
      raise errors.DataError(
        f"{path}: second file of the id {name!r}, beside {files[name].name}; keep one"
      )
    files[name] = path
  if not files:
    raise errors.DataError(f"{folder}: no {what}; expected files ID{'|'.join(suffixes)}")
  return files


def _check_no_images(place: pathlib.Path, suffixes: tuple[str, ...]) -> None:
  """Refuses a folder in that of the images, or masks, if it holds some."""
  if place.name.startswith(".") or not os.access(place, os.R_OK | os.X_OK):
    return
  for folder in (place, *(inner for _, inner in subfolders.below(place))):
    for path in sorted(folder.iterdir()):
      if path.suffix.lower() in suffixes and not path.name.startswith("."):
        raise errors.DataError(
          f"{path}: in a folder of its own, where it would be overlooked; bring all into "
          f"{place.parent}, named as {folder.name}_{path.name}, or remove it "
          "(config.data.group_pattern keeps a patient's images together)"
        )


def _hint(root: pathlib.Path) -> str:
  """The remedy for a folder that another source reads."""
  is_nnunet = (root / "dataset.json").exists() or (root / "imagesTr").is_dir()
  found = "; this looks like an nnU-Net raw folder, which config.data.source='nnunet' reads"
  return found if is_nnunet else ""


def _check_channels(files, headers) -> None:
  first = {}
  for name, header in headers.items():
    first.setdefault(header.channels, name)
  if len(first) > 1:
    raise errors.DataError(
      f"{files[first[1]]} is grey and {files[first[3]]} is RGB; expected all alike, convert one "
      "kind"
    )


def _entries(data, ids, headers, image_files, mask_files) -> list[dict]:
  cases = {name: records.extract(data.case_pattern, name, "case_pattern") for name in ids}
  first: dict[str, str] = {}
  count: dict[str, int] = {}
  entries = []
  for name in ids:
    case = cases[name]
    other = first.setdefault(case, name)
    if headers[name].shape != headers[other].shape:
      raise errors.DataError(
        f"{image_files[name]}: {headers[name].shape} pixels, but {image_files[other].name} of the "
        f"same case {case!r} has {headers[other].shape}; slices of a case have one size; fix "
        "config.data.case_pattern (config.data.group_pattern keeps a patient's cases together)"
      )
    entries.append(
      records.record(
        record_id=name,
        case_id=case,
        group_id=records.extract(data.group_pattern, case, "group_pattern"),
        slice_index=count.get(case, 0) if data.case_pattern else -1,
        shape=headers[name].shape,
        spacing=images.SPACING_MM if data.spacing else None,
        has_mask=name in mask_files,
      )
    )
    count[case] = count.get(case, 0) + 1
  return entries
