"""A case of several files, of any format: headers checked to be of one grid, spacing, pixels.

A reader of a format is one row of `_READERS`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import geometry, records
from rndpo_jax.data.sources import dicom, dicom_seg, images, itk, nifti, volume

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd", ".gipl")
PICTURES = (".png", ".bmp", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")  # images alone: JPEG changes class ids
ENDINGS = (*NIFTI, *ITK, *PICTURES)  # of images and labels
MASKS = (*ENDINGS, *dicom_seg.ENDINGS)  # that a user brings beside images of any format
_READERS: dict[str, Callable[[pathlib.Path], volume.Volume]] = {
  **dict.fromkeys(NIFTI, nifti.open_file),
  **dict.fromkeys(ITK, itk.open_file),
  **dict.fromkeys((*PICTURES, *LOSSY), images.open_file),
}
# Voxels that two files of a case may lie apart: more than the rounding of a header's float32
# numbers makes of a large image, and less than training would notice.
_MAX_SHIFT = 0.25


class Case(NamedTuple):
  """A case, its headers read.

  Attributes:
    channels: its files, in order.
    label: the file of its mask, if there is one.
    shape: S, of 2 or 3 axes.
    num_channels: I, of all files together.
    spacing: mm an axis, None if a header holds no positive number.
    affine: f64[4, 4], of the first file.
    unit: of the first header.
    eight_bit: whether all images are bytes.
  """

  channels: list[pathlib.Path]
  label: pathlib.Path | None
  shape: tuple[int, ...]
  num_channels: int
  spacing: tuple[float, ...] | None
  affine: np.ndarray
  unit: str
  eight_bit: bool


def split_name(name: str) -> tuple[str, str]:
  """(stem, ending) of a file's name, '.nii.gz' being one ending."""
  ending = next((e for e in NIFTI if name.lower().endswith(e)), pathlib.Path(name).suffix)
  return (name[: -len(ending)], name[-len(ending) :]) if ending else (name, "")


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold an image or label: itself, of .mhd that of its voxels, a series' slices.

  Raises:
    errors.DataError: if one is missing.
  """
  if path.is_dir():
    return dicom.files_of(path)
  return itk.data_files(path) if split_name(path.name)[1].lower() in ITK else [path]


def open_file(path: pathlib.Path) -> volume.Volume:
  """Reads a file's header, or those of a folder with a DICOM series.

  Raises:
    errors.DataError: if its name's ending is of no format that is read, or its header cannot be
      used.
  """
  reader = _READERS.get(split_name(path.name)[1].lower())
  if reader is None and path.is_dir():
    return dicom.open_series(path)
  if reader is None:
    raise errors.DataError(
      f"{path}: not a format that is read; expected {', '.join(_READERS)}; convert or remove it"
    )
  return reader(path)


def open_mask(path: pathlib.Path, shape: tuple[int, ...], affine: np.ndarray) -> volume.Volume:
  """`open_file` of a mask, which may be a DICOM segmentation as well.

  Args:
    path: of the mask.
    shape, affine: of its image; a segmentation is brought to them, of others they may differ.
  """
  if path.suffix.lower() in dicom_seg.ENDINGS and not path.is_dir():
    return dicom_seg.open_mask(path, shape, affine)
  return open_file(path)


def open_case(channels, label, spatial_dims: int) -> Case:
  """Reads the headers of a case's files, and checks that they are of one grid.

  Args:
    channels: files of its images, in order.
    label: file of its mask, or None.
    spatial_dims: of a record; a volume's slices are records of 2 dimensions.

  Raises:
    errors.DataError: naming the file, what was found and the remedy.
  """
  opened = [open_file(path) for path in channels]
  first = opened[0]
  found = f"{channels[0]}: {len(first.shape)} dimensions, {first.shape}"
  if len(first.shape) not in (2, 3):
    raise errors.DataError(
      f"{found}; expected an image or a volume: split time points or channels into files of their "
      "own"
    )
  if len(first.shape) < spatial_dims:
    raise errors.DataError(
      f"{found}; config.data.spatial_dims={spatial_dims} takes volumes, change it or the files"
    )
  if label is not None and split_name(label.name)[1].lower() in LOSSY:
    raise errors.DataError(f"{label}: JPEG changes class ids; expected a mask as PNG")
  others = list(zip(channels[1:], opened[1:], strict=True))
  labels = [(label, open_mask(label, first.shape, first.affine))] if label else []
  for path, other in [*others, *labels]:
    _check_grid(path, other, channels[0], first)
  return Case(
    channels=channels,
    label=label,
    shape=first.shape,
    num_channels=sum(one.num_channels for one in opened),
    spacing=first.spacing,
    affine=first.affine,
    unit=first.unit,
    eight_bit=all(one.eight_bit for one in opened),
  )


def _check_grid(path, found: volume.Volume, first, expected: volume.Volume) -> None:
  """Refuses a file that is not on the grid of its case's first channel."""
  remedy = f"resample one of the two to the other's grid, or take {path.name} away"
  if found.shape != expected.shape:
    raise errors.DataError(
      f"{path}: {found.shape} voxels, but {first} has {expected.shape}; expected the same, {remedy}"
    )
  shift = geometry.grid_shift(expected.affine, found.affine, expected.shape)
  if shift <= _MAX_SHIFT:
    return
  pairs = zip(_describe(found.affine), _describe(expected.affine), strict=True)
  words = [f"{here} against {there}" for here, there in pairs if here != there]
  raise errors.DataError(
    f"{path}: its header places voxels up to {shift:.3g} voxels away from where {first} places "
    f"them ({', '.join(words)}), expected the same; {remedy}, or, if the voxels do match and "
    "one header is wrong, copy the affine of the right one"
  )


def _describe(affine) -> list[str]:
  """Origin, spacing and direction cosines of an affine, as text."""
  edges = np.linalg.norm(affine[:3, :3], axis=0)
  cosines = affine[:3, :3] / np.where(edges > 0, edges, 1)
  parts = {"origin": affine[:3, 3], "spacing": edges, "directions": cosines.T}
  return [f"{name} {(np.round(value, 4) + 0.0).tolist()}" for name, value in parts.items()]


def read_case(
  case: Case, spatial_dims: int, num_classes: int, has_ignored: bool
) -> Iterator[records.Pixels]:
  """Reads every file of a case once, and yields its records.

  Args:
    case: from `open_case`.
    spatial_dims: of a record.
    num_classes: C.
    has_ignored: whether the id C in the label's file means `types.IGNORED`.

  Raises:
    DataError: if a file cannot be read, or the label holds other values or no class at all.
  """
  image = np.concatenate([_pixels(path, case) for path in case.channels], axis=-1)
  mask = None
  if case.label is not None:
    ids = _class_ids(case, num_classes + has_ignored)
    mask = np.where(ids == num_classes, np.uint8(types.IGNORED), ids) if has_ignored else ids
    if (mask == types.IGNORED).all():
      raise errors.DataError(
        f"{case.label}: every voxel is ignored, so the case has no truth; take the file away, "
        "which makes the case unlabelled"
      )
  paths = (str(case.channels[0]), str(case.label))
  if len(case.shape) == spatial_dims:
    yield records.Pixels(image, mask, case.affine, *paths)
    return
  for z in range(case.shape[2]):
    origin = case.affine.copy()
    origin[:, 3] += z * case.affine[:, 2]  # voxel (i, j) of this slice
    part = None if mask is None else np.ascontiguousarray(mask[:, :, z])
    yield records.Pixels(np.ascontiguousarray(image[:, :, z]), part, origin, *paths)


def _pixels(path: pathlib.Path, case: Case) -> np.ndarray:
  """[*S, I of the file]: uint8 if the whole case is, float32 otherwise."""
  found = open_file(path)
  _check_shape_again(path, found, case)
  return found.read(case.eight_bit and found.eight_bit).reshape(*case.shape, found.num_channels)


def _class_ids(case: Case, num_ids: int) -> np.ndarray:
  found = open_mask(case.label, case.shape, case.affine)
  _check_shape_again(case.label, found, case)
  if found.read_ids is not None:
    return found.read_ids(num_ids)
  return images.class_ids(found.read(False), num_ids, str(case.label))


def _check_shape_again(path: pathlib.Path, found: volume.Volume, case: Case) -> None:
  if found.shape != case.shape:
    raise errors.DataError(
      f"{path}: {found.shape} voxels now, {case.shape} when it was listed; let the files rest, and "
      "run the same command again"
    )
