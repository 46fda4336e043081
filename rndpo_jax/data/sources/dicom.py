"""One DICOM series, a folder of slices, read with pydicom, the extra `dicom`.

Slices are ordered by their position along the normal of the image plane, and values are rescaled
slice by slice (slope, intercept). Axes are (column, row, slice) and the grid is that of ITK's
reader, so a mask drawn on what SimpleITK or 3D Slicer make of the series fits. Intensities are
taken as they are stored, MONOCHROME1 among them.
"""

from __future__ import annotations

import pathlib
import struct
import types
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources import volume

_ENDINGS = (".dcm", ".dicom", ".ima")
_TAGS = (
  "SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing",
  "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
  "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "ModalityLUTSequence",
)  # fmt: skip
_BROKEN = (
  OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, struct.error,
  NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_SHIFT = 0.25  # voxels that a slice may lie away from its place on an even grid
_GAP = 1.5  # times the usual distance of slices: one is missing
_ROUNDING = 1e-3  # of spacing and directions between slices


class _Slice(NamedTuple):
  """A file's header: what of it places and scales its pixels."""

  path: pathlib.Path
  series: str
  size: tuple[int, int]  # columns, rows
  spacing: tuple[float, ...] | None  # mm between columns, between rows
  directions: tuple[float, ...] | None  # of growing column, of growing row
  position: tuple[float, ...] | None  # mm, of the first pixel
  slope: float
  intercept: float


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """The DICOM files that lie in a folder: by their ending or, without one, by their first bytes.

  Of names without one those of nothing but zeros are among them, where others are DICOM: they are
  what a copy that was cut off leaves, and reading their header says so.
  """
  paths = sorted(folder.iterdir())
  found = {path for path in paths if _is_dicom(path)}
  if any(not _has_ending(path) for path in found):
    found |= {path for path in paths if _is_blank(path)}
  return sorted(found)


def _has_ending(path: pathlib.Path) -> bool:
  ending = path.suffix[1:]
  return bool(ending) and not ending.isdecimal()  # names may be UIDs


def _is_blank(path: pathlib.Path) -> bool:
  if path.name.startswith(".") or _has_ending(path) or not path.is_file():
    return False
  with path.open("rb") as file:
    return not file.read(132).strip(b"\0")


def _is_dicom(path: pathlib.Path) -> bool:
  ending = path.suffix.lower()
  if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or path.is_dir():
    return False
  if ending in _ENDINGS:
    return True
  if _has_ending(path) or not path.is_file():
    return False
  try:
    with path.open("rb") as file:
      return file.read(132)[128:] == b"DICM"
  except OSError:
    return True  # reading its header says why


def open_series(folder: pathlib.Path) -> volume.Volume:
  """Reads the headers of a folder's slices; a single one is a 2D image.

  Raises:
    errors.DataError: if pydicom is missing, a header cannot be used, there are several series,
      sizes, spacings or orientations, or slices are missing, doubled or shifted.
  """
  library = _library(folder)
  slices = [_header(library, path) for path in files_of(folder)]
  if not slices:
    raise errors.DataError(
      f"{folder}: no DICOM files in this folder; expected the slices of one series"
    )
  _check_alike(slices)
  slices, step = (slices, None) if len(slices) == 1 else _in_order(slices)
  first = slices[0]
  shape = first.size if step is None else (*first.size, len(slices))
  volume.check_shape(folder, shape)
  spacing = first.spacing
  if spacing is not None and step is not None:
    spacing = (*spacing, float(np.linalg.norm(step)))
  return volume.Volume(
    shape=shape,
    affine=_affine(first, step),
    spacing=spacing,
    eight_bit=False,
    read=lambda _: _voxels(library, slices).reshape(shape),
  )


def modality(folder: pathlib.Path) -> str:
  """What a series was taken with, as 'CT' or 'MR', of its first file; empty if it is not said.

  Raises:
    errors.DataError: if the file cannot be read.
  """
  library, path = _library(folder), files_of(folder)[0]
  try:
    found = library.dcmread(path, stop_before_pixels=True, specific_tags=["Modality"])
    return str(found.get("Modality") or "")
  except (*_BROKEN, library.errors.InvalidDicomError) as error:
    raise errors.DataError(
      f"{path}: no readable DICOM header ({file_checks.one_line(error)}); replace or remove it"
    ) from error


def _library(path: pathlib.Path) -> types.ModuleType:
  try:
    import pydicom
  except ImportError as error:
    raise errors.DataError(
      f"{path}: DICOM is read with pydicom, which is not installed; run "
      "pip install 'rndpo_jax[dicom]', or convert the series to NIfTI"
    ) from error
  # Scanners' small offences would be a warning a slice.
  pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
  return pydicom


def _header(library: types.ModuleType, path: pathlib.Path) -> _Slice:
  file_checks.check_regular(path)
  try:
    found = library.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
    spacing = _numbers(found, "PixelSpacing", 2) or _numbers(found, "ImagerPixelSpacing", 2)
    if "Rows" not in found or "Columns" not in found:
      raise ValueError("no Rows or no Columns")
    one = _Slice(
      path=path,
      series=str(found.get("SeriesInstanceUID", "")),
      size=(int(found.Columns), int(found.Rows)),
      spacing=spacing and spacing[::-1],  # DICOM: between rows, between columns
      directions=_numbers(found, "ImageOrientationPatient", 6),
      position=_numbers(found, "ImagePositionPatient", 3),
      slope=(_numbers(found, "RescaleSlope", 1) or (1.0,))[0] or 1.0,  # 0 is 1 to ITK too
      intercept=(_numbers(found, "RescaleIntercept", 1) or (0.0,))[0],
    )
    frames, samples = int(found.get("NumberOfFrames") or 1), int(found.get("SamplesPerPixel") or 1)
  except (*_BROKEN, library.errors.InvalidDicomError) as error:
    cause = file_checks.one_line(error).split(" Use force")[0]
    raise errors.DataError(
      f"{path}: no readable DICOM header of an image ({cause}); replace or remove it"
    ) from error
  kind = str(found.get("PhotometricInterpretation") or "MONOCHROME2")
  has_table = "ModalityLUTSequence" in found
  if frames != 1 or samples != 1 or has_table or not kind.startswith("MONOCHROME"):
    raise errors.DataError(
      f"{path}: {frames} frame{'s' * (frames > 1)} of {samples} sample{'s' * (samples > 1)} a pixel"
      f", {kind}{', with a table of values' * has_table}; expected one grey slice a file, convert "
      "the series (for example with dcm2niix)"
    )
  if one.spacing is not None and min(one.spacing) <= 0:
    raise errors.DataError(
      f"{path}: pixels of {one.spacing} mm; expected numbers above 0, fix or remove the file"
    )
  return one


def _numbers(found, name: str, count: int) -> tuple[float, ...] | None:
  """A tag's finite numbers, None if it is missing or empty."""
  values = found.get(name)
  if values is None or values == "":
    return None
  numbers = tuple(float(value) for value in ([values] if count == 1 else values))
  if len(numbers) != count or not np.isfinite(numbers).all():
    raise ValueError(f"{name} is {numbers}, expected {count} finite numbers")
  return numbers


def _check_alike(slices: Sequence[_Slice]) -> None:
  """Refuses slices of several series or grids."""
  first = slices[0]
  for one in slices[1:]:
    if one.series != first.series:
      raise errors.DataError(
        f"{one.path}: of the series {one.series or '(none)'}, but {first.path.name} is of "
        f"{first.series or '(none)'}; a folder holds one series, move each into a folder of its own"
      )
    for name in ("size", "spacing", "directions"):
      here, there = getattr(one, name), getattr(first, name)
      if (here is None) != (there is None) or (
        here is not None and not np.allclose(here, there, rtol=_ROUNDING, atol=_ROUNDING)
      ):
        raise errors.DataError(
          f"{one.path}: {name} {here}, but {first.path.name} has {name} {there}; the slices of a "
          "series have one grid, take away those that are of another kind (a localizer?)"
        )


def _in_order(slices: Sequence[_Slice]) -> tuple[list[_Slice], np.ndarray]:
  """The slices by their position along the normal, and the mm from one to the next, f64[3]."""
  for one in slices:
    if one.position is None or one.directions is None or one.spacing is None:
      raise errors.DataError(
        f"{one.path}: no ImagePositionPatient, ImageOrientationPatient or PixelSpacing, so its "
        "place among the slices is unknown; give single images a folder each, or convert the series"
      )
  normal = np.cross(slices[0].directions[:3], slices[0].directions[3:])
  if abs(np.linalg.norm(normal) - 1) > 0.01:
    raise errors.DataError(
      f"{slices[0].path}: the directions {slices[0].directions} are not of length 1 and at right "
      "angles; fix the file, or take the series away"
    )
  normal = normal / np.linalg.norm(normal)
  slices = sorted(slices, key=lambda one: float(np.dot(one.position, normal)))
  positions = np.array([one.position for one in slices])
  _check_gaps(slices, np.diff(positions @ normal))
  step = (positions[-1] - positions[0]) / (len(slices) - 1)
  length = float(step @ normal)
  places = np.arange(len(slices))[:, None]
  shifts = positions - positions[0] - places * length * normal
  along = np.abs(shifts @ normal) / length
  across = np.linalg.norm(shifts - (shifts @ normal)[:, None] * normal, axis=1)
  across = across / min(slices[0].spacing)
  for amount, what in ((along, "unevenly spaced"), (across, "shifted sideways (a tilted gantry?)")):
    worst = int(amount.argmax())
    if amount[worst] > _MAX_SHIFT:
      raise errors.DataError(
        f"{slices[worst].path}: {amount[worst]:.2f} voxels away from its place, the slices are "
        f"{what}; resample the series to an even grid (for example with dcm2niix)"
      )
  return slices, length * normal


def _check_gaps(slices: Sequence[_Slice], gaps: np.ndarray) -> None:
  """Refuses slices that lie on each other or are missing."""
  usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
  for place, gap in enumerate(gaps.tolist()):
    before, after = slices[place], slices[place + 1]
    if gap <= 0.01 * usual:
      raise errors.DataError(
        f"{after.path}: at the same position as {before.path.name}; expected one slice a position "
        "(time points, echoes or copies are series of their own), move it to another folder"
      )
    if gap > _GAP * usual:
      raise errors.DataError(
        f"{after.path}: {gap:.3g} mm beyond {before.path.name}, where slices are {usual:.3g} mm "
        "apart: some are missing; bring them back or take the series away"
      )


def _affine(first: _Slice, step: np.ndarray | None) -> np.ndarray:
  spacing = first.spacing or (1.0, 1.0)
  directions = first.directions or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
  affine = np.eye(4)
  affine[:3, 0] = np.array(directions[:3]) * spacing[0]
  affine[:3, 1] = np.array(directions[3:]) * spacing[1]
  affine[:3, 2] = np.cross(directions[:3], directions[3:]) if step is None else step
  affine[:3, 3] = first.position or (0.0, 0.0, 0.0)
  return _LPS_TO_RAS @ affine


def _voxels(library: types.ModuleType, slices: Sequence[_Slice]) -> np.ndarray:
  """Rescaled values, f32[columns, rows, slices]."""
  found = np.empty((*slices[0].size, len(slices)), np.float32, order="F")
  for place, one in enumerate(slices):
    try:
      pixels = library.dcmread(one.path).pixel_array.T
    except (*_BROKEN, library.errors.InvalidDicomError) as error:
      raise errors.DataError(
        f"{one.path}: its pixels cannot be read ({file_checks.one_line(error)[:200]}); replace or "
        "remove it, or, if a decoder is missing, pip install python-gdcm"
      ) from error
    if pixels.shape != one.size:
      raise errors.DataError(
        f"{one.path}: holds {pixels.shape} pixels, its header says {one.size}; replace it"
      )
    found[:, :, place] = pixels * one.slope + one.intercept
  return found
