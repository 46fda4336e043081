"""What of a DICOM file's header places and scales its pixels, read with pydicom."""

from __future__ import annotations

import pathlib
import struct
import types
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks

_TAGS = (
  "SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing",
  "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
  "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "ModalityLUTSequence",
  "SOPClassUID",
)  # fmt: skip
# What pydicom raises on damaged files.
BROKEN = (
  OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, struct.error,
  NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip
# Segmentation Storage, Label Map Segmentation Storage.
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")


class Slice(NamedTuple):
  """A file's header: what of it places and scales its pixels."""

  path: pathlib.Path
  series: str
  size: tuple[int, int]  # columns, rows
  spacing: tuple[float, ...] | None  # mm between columns, between rows
  directions: tuple[float, ...] | None  # of growing column, of growing row
  position: tuple[float, ...] | None  # mm, of the first pixel
  slope: float
  intercept: float


def read(path: pathlib.Path, tags: Sequence[str] = ()):
  """The pydicom data set of a file without its pixels, of some tags or, without `tags`, of all.

  Raises:
    errors.DataError: if pydicom is missing, or the file cannot be read.
  """
  library = import_pydicom(path)
  file_checks.check_regular(path)
  try:
    return library.dcmread(path, stop_before_pixels=True, specific_tags=list(tags) or None)
  except (*BROKEN, library.errors.InvalidDicomError) as error:
    raise errors.DataError(
      f"{path}: no readable DICOM header ({cause(error)}); replace or remove it"
    ) from error


def import_pydicom(path: pathlib.Path) -> types.ModuleType:
  """The library, set to take what scanners write.

  Raises:
    errors.DataError: naming `path` and the remedy, if it is missing.
  """
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


def read_slice(path: pathlib.Path) -> Slice:
  """Reads the header of a file that holds one grey slice.

  Raises:
    errors.DataError: if it cannot be read, or is of something else.
  """
  found = read(path, _TAGS)
  try:
    spacing = _numbers(found, "PixelSpacing", 2) or _numbers(found, "ImagerPixelSpacing", 2)
    if "Rows" not in found or "Columns" not in found:
      raise ValueError("no Rows or no Columns")
    one = Slice(
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
  except BROKEN as error:
    raise errors.DataError(
      f"{path}: no readable DICOM header of an image ({cause(error)}{_kind(found)}); replace or "
      "remove it"
    ) from error
  if found.get("SOPClassUID") in SEGMENTATIONS:
    raise errors.DataError(
      f"{path}: a DICOM segmentation, expected an image; bring it to masks/ID.dcm, or remove it"
    )
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


def cause(error: Exception) -> str:
  """What pydicom says of an error, without what it asks of a programmer."""
  return file_checks.one_line(error).split(" Use force")[0][:200]


def _kind(found) -> str:
  """What a file is by its SOP class, where that is said."""
  uid = found.get("SOPClassUID")
  return f"; it is of the kind {uid.name}" if uid else ""


def _numbers(found, name: str, count: int) -> tuple[float, ...] | None:
  """A tag's finite numbers, None if it is missing or empty."""
  values = found.get(name)
  if values is None or values == "":
    return None
  numbers = tuple(float(value) for value in ([values] if count == 1 else values))
  if len(numbers) != count or not np.isfinite(numbers).all():
    raise ValueError(f"{name} is {numbers}, expected {count} finite numbers")
  return numbers
