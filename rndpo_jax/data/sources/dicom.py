"""One DICOM series, a folder of slices, read with pydicom, the extra `dicom`.

Slices are ordered by their position along the normal of the image plane, and values are rescaled
slice by slice (slope, intercept). Axes are (column, row, slice) and the grid is that of ITK's
reader, so a mask drawn on what SimpleITK or 3D Slicer make of the series fits. Intensities are
taken as they are stored, MONOCHROME1 among them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data.sources import dicom_header, volume

_ENDINGS = (".dcm", ".dicom", ".ima")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_SHIFT = 0.25  # voxels that a slice may lie away from its place on an even grid
_GAP = 1.5  # times the usual distance of slices: one is missing
_ROUNDING = 1e-3  # of spacing and directions between slices


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
  slices, step = _slices(folder)
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
    read=lambda _: _voxels(slices).reshape(shape),
  )


def slice_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a series, in the order of its slices in `open_series`.

  Raises:
    errors.DataError: as `open_series` does.
  """
  return [one.path for one in _slices(folder)[0]]


def modality(folder: pathlib.Path) -> str:
  """What a series was taken with, as 'CT' or 'MR', of its first file; empty if it is not said.

  Raises:
    errors.DataError: if the file cannot be read.
  """
  return str(dicom_header.read(files_of(folder)[0], ["Modality"]).get("Modality") or "")


def _slices(folder: pathlib.Path) -> tuple[list[dicom_header.Slice], np.ndarray | None]:
  """The slices in order, and the mm from one to the next, f64[3], None if there is one alone."""
  dicom_header.import_pydicom(folder)
  slices = [dicom_header.read_slice(path) for path in files_of(folder)]
  if not slices:
    raise errors.DataError(
      f"{folder}: no DICOM files in this folder; expected the slices of one series"
    )
  _check_alike(slices)
  return (slices, None) if len(slices) == 1 else _in_order(slices)


def _check_alike(slices: Sequence[dicom_header.Slice]) -> None:
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


def _in_order(slices: Sequence[dicom_header.Slice]) -> tuple[list[dicom_header.Slice], np.ndarray]:
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


def _check_gaps(slices: Sequence[dicom_header.Slice], gaps: np.ndarray) -> None:
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


def _affine(first: dicom_header.Slice, step: np.ndarray | None) -> np.ndarray:
  spacing = first.spacing or (1.0, 1.0)
  directions = first.directions or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
  affine = np.eye(4)
  affine[:3, 0] = np.array(directions[:3]) * spacing[0]
  affine[:3, 1] = np.array(directions[3:]) * spacing[1]
  affine[:3, 2] = np.cross(directions[:3], directions[3:]) if step is None else step
  affine[:3, 3] = first.position or (0.0, 0.0, 0.0)
  return _LPS_TO_RAS @ affine


def _voxels(slices: Sequence[dicom_header.Slice]) -> np.ndarray:
  """Rescaled values, f32[columns, rows, slices]."""
  library = dicom_header.import_pydicom(slices[0].path)
  found = np.empty((*slices[0].size, len(slices)), np.float32, order="F")
  for place, one in enumerate(slices):
    try:
      pixels = library.dcmread(one.path).pixel_array.T
    except (*dicom_header.BROKEN, library.errors.InvalidDicomError) as error:
      raise errors.DataError(
        f"{one.path}: its pixels cannot be read ({dicom_header.cause(error)}); replace or "
        "remove it, or, if a decoder is missing, pip install python-gdcm"
      ) from error
    if pixels.shape != one.size:
      raise errors.DataError(
        f"{one.path}: holds {pixels.shape} pixels, its header says {one.size}; replace it"
      )
    found[:, :, place] = pixels * one.slope + one.intercept
  return found
