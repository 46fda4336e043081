"""NIfTI files of a case: headers checked to be of one grid, spacing in mm, voxels.

Read with nibabel, the field's standard reader: it knows the header's scaling, units and axes.
"""

from __future__ import annotations

import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import nibabel
import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import file_checks, geometry, records
from rndpo_jax.data.sources import images

# Voxels that two files of a case may lie apart: more than the rounding of a header's float32
# numbers makes of a large image, and less than training would notice.
_MAX_SHIFT = 0.25
_MAX_VOXELS = 2**28  # such as 512 x 512 x 1024
_MM = {"mm": 1.0, "meter": 1e3, "micron": 1e-3, "unknown": 1.0}
_BROKEN = (
  OSError,  # gzip's BadGzipFile among them
  EOFError,
  ValueError,
  zlib.error,
  nibabel.filebasedimages.ImageFileError,
  nibabel.spatialimages.HeaderDataError,
)


class Case(NamedTuple):
  channels: list[pathlib.Path]
  label: pathlib.Path | None
  shape: tuple[int, ...]  # of 2 or 3 axes
  spacing: tuple[float, ...] | None  # mm an axis, None if the header holds no positive number
  affine_spacing: tuple[float, ...]  # the same of the affine, in the header's unit
  unit: str  # of the header
  eight_bit: bool


def notes_of_headers(cases: list[Case]) -> Iterator[str]:
  """What the headers leave open or contradict, each once with its first file."""
  unitless = [case for case in cases if case.unit == "unknown" and case.spacing is not None]
  if unitless:
    yield (
      f"{unitless[0].channels[0]}: the header names no unit ({len(unitless)} of {len(cases)} "
      "cases); taken as mm, as nnU-Net and ITK do"
    )
  unknown = [case for case in cases if case.spacing is None]
  if unknown:
    yield (
      f"{unknown[0].channels[0]}: the header gives no spacing ({len(unknown)} of {len(cases)} "
      "cases); distances of the whole data set are in voxels"
    )
  differ = [case for case in cases if not _agree(case)]
  if differ:
    case = differ[0]
    mm = _MM.get(case.unit, 1.0)
    there = [round(edge * mm, 6) for edge in case.affine_spacing]
    yield (
      f"{case.channels[0]}: pixdim gives the spacing {list(case.spacing)} mm, the affine {there} "
      f"({len(differ)} of {len(cases)} cases); pixdim is taken, as ITK does"
    )


def _agree(case: Case) -> bool:
  """Whether pixdim and the affine give the same spacing, up to the rounding of a header."""
  edges = np.array(case.affine_spacing) * _MM.get(case.unit, 1.0)
  return case.spacing is None or np.allclose(case.spacing, edges, rtol=1e-3)


def _open(path: pathlib.Path):
  """The image of a file, header read and checked; its shape without trailing ones."""
  file_checks.check_regular(path)
  try:
    image = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    kind = image.get_data_dtype()
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: no readable NIfTI header ({file_checks.one_line(error)}); replace or remove it"
    ) from error
  while len(shape) > 3 and shape[-1] == 1:
    shape = shape[:-1]
  if kind.fields is not None or kind.kind not in "iuf":
    raise errors.DataError(f"{path}: voxels of type {kind}; expected one real number a voxel")
  if math.prod(shape) == 1:
    raise errors.DataError(f"{path}: one voxel; expected more, replace or remove the file")
  if min(shape) < 1:
    raise errors.DataError(f"{path}: shape {shape} holds no voxel; replace or remove the file")
  if math.prod(shape) > _MAX_VOXELS:
    raise errors.DataError(
      f"{path}: shape {shape} holds more than {_MAX_VOXELS:,} voxels; crop or split it"
    )
  return image, shape


def open_case(channels, label, spatial_dims: int) -> Case:
  opened = [_open(path) for path in channels]
  image, shape = opened[0]
  if len(shape) not in (2, 3) or len(shape) < spatial_dims:
    raise errors.DataError(
      f"{channels[0]}: {len(shape)} dimensions, {shape}; config.data.spatial_dims={spatial_dims} "
      f"takes {'images or volumes, slice by slice' if spatial_dims == 2 else 'volumes'}; split "
      "time points or channels into files of their own, or change spatial_dims"
    )
  others = list(zip(channels[1:], opened[1:], strict=True))
  for path, other in [*others, *([(label, _open(label))] if label else [])]:
    _check_grid(path, *other, channels[0], image.affine, shape)
  scales = [(one.dataobj.slope, one.dataobj.inter) for one, _ in opened]
  kinds = [one.get_data_dtype() for one, _ in opened]
  return Case(
    channels=channels,
    label=label,
    shape=shape,
    spacing=_spacing(image, len(shape)),
    affine_spacing=tuple(np.linalg.norm(image.affine[:3, : len(shape)], axis=0).tolist()),
    unit=_unit(image),
    eight_bit=all(k == np.uint8 for k in kinds) and all(s == (1, 0) for s in scales),
  )


def _check_grid(path, image, shape, first, affine, expected) -> None:
  """Refuses a file that is not on the grid of its case's first channel."""
  remedy = f"resample one of the two to the other's grid, or take {path.name} away"
  if shape != expected:
    raise errors.DataError(
      f"{path}: {shape} voxels, but {first} has {expected}; expected the same, {remedy}"
    )
  shift = geometry.grid_shift(affine, image.affine, shape)
  if shift <= _MAX_SHIFT:
    return
  pairs = zip(_describe(image.affine), _describe(affine), strict=True)
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


def _spacing(image, dims: int) -> tuple[float, ...] | None:
  """mm an axis by pixdim, None if that is no number above 0; its sign counts for nothing."""
  zooms = [float(zoom) for zoom in image.header.get_zooms()[:dims]]
  if 1.0 in zooms:  # nibabel reads 0 as 1
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
      header = type(image.header).from_fileobj(file, check=False)
    zooms = [abs(float(edge)) for edge in header["pixdim"][1 : dims + 1]]
  if not all(np.isfinite(z) and z > 0 for z in zooms):
    return None
  return tuple(zoom * _MM[_unit(image)] for zoom in zooms)


def _unit(image) -> str:
  """The header's unit of length, 'unknown' if it is none of `_MM`."""
  try:
    unit = image.header.get_xyzt_units()[0]
  except KeyError:  # a code that the format does not have
    return "unknown"
  return unit if unit in _MM else "unknown"


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
  image = np.stack([_voxels(path, case) for path in case.channels], axis=-1)
  mask = None
  if case.label is not None:
    ids = images.class_ids(_voxels(case.label, case), num_classes + has_ignored, str(case.label))
    mask = np.where(ids == num_classes, np.uint8(types.IGNORED), ids) if has_ignored else ids
    if (mask == types.IGNORED).all():
      raise errors.DataError(
        f"{case.label}: every voxel is ignored, so the case has no truth; take the file away, "
        "which makes the case unlabelled"
      )
  affine = np.asarray(_open(case.channels[0])[0].affine, np.float64)
  paths = (str(case.channels[0]), str(case.label))
  if len(case.shape) == spatial_dims:
    yield records.Pixels(image, mask, affine, *paths)
    return
  for z in range(case.shape[2]):
    origin = affine.copy()
    origin[:, 3] += z * affine[:, 2]  # voxel (i, j) of this slice
    part = None if mask is None else np.ascontiguousarray(mask[:, :, z])
    yield records.Pixels(np.ascontiguousarray(image[:, :, z]), part, origin, *paths)


def _voxels(path: pathlib.Path, case: Case) -> np.ndarray:
  """Scaled voxels: uint8 if the whole case is, float32 otherwise."""
  image, _ = _open(path)
  try:
    if case.eight_bit and image.get_data_dtype() == np.uint8:
      array = np.asarray(image.dataobj)
    else:
      array = image.get_fdata(dtype=np.float32, caching="unchanged")
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: truncated or damaged, its voxels cannot be read ({file_checks.one_line(error)}); "
      "replace or remove it"
    ) from error
  return array.reshape(case.shape)
