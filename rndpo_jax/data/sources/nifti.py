"""One NIfTI file, read with nibabel, the field's standard reader.

It knows the header's scaling, units and axes. The spacing is pixdim's, for volumes as for stacks of
slices, in mm if the header names no unit: as nnU-Net and ITK have it.
"""

from __future__ import annotations

import contextlib
import gzip
import pathlib
import zlib

import nibabel
import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources import volume

MM = {"mm": 1.0, "meter": 1e3, "micron": 1e-3, "unknown": 1.0}
_BROKEN = (
  OSError,  # gzip's BadGzipFile among them
  EOFError,
  ValueError,
  zlib.error,
  nibabel.filebasedimages.ImageFileError,
  nibabel.spatialimages.HeaderDataError,
)


def open_file(path: pathlib.Path) -> volume.Volume:
  """Reads a file's header.

  Raises:
    errors.DataError: if there is none, or it announces something that is refused.
  """
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
  volume.check_shape(path, shape)
  is_plain = (image.dataobj.slope, image.dataobj.inter) == (1, 0)
  return volume.Volume(
    shape=shape,
    affine=np.asarray(image.affine, np.float64),
    spacing=_spacing(image, len(shape)),
    eight_bit=bool(kind == np.uint8) and is_plain,
    read=lambda as_bytes: _voxels(path, image, as_bytes).reshape(shape),
    unit=_unit(image),
  )


def _spacing(image, dims: int) -> tuple[float, ...] | None:
  """mm an axis by pixdim, None if that is no number above 0; its sign counts for nothing."""
  zooms = [float(zoom) for zoom in image.header.get_zooms()[:dims]]
  if 1.0 in zooms:  # nibabel reads 0 as 1
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
      header = type(image.header).from_fileobj(file, check=False)
    zooms = [abs(float(edge)) for edge in header["pixdim"][1 : dims + 1]]
  if not all(np.isfinite(z) and z > 0 for z in zooms):
    return None
  return tuple(zoom * MM[_unit(image)] for zoom in zooms)


def _unit(image) -> str:
  """The header's unit of length, 'unknown' if it is none of `MM`."""
  try:
    unit = image.header.get_xyzt_units()[0]
  except KeyError:  # a code that the format does not have
    return "unknown"
  return unit if unit in MM else "unknown"


def _voxels(path: pathlib.Path, image, as_bytes: bool) -> np.ndarray:
  """Scaled voxels: bytes as they are if asked for, float32 otherwise."""
  try:
    with contextlib.ExitStack() as stack:
      file = None
      if path.suffix.lower() == ".gz":
        file = stack.enter_context(gzip.open(path))
        image = type(image).from_stream(file)
      if as_bytes and image.get_data_dtype() == np.uint8:
        array = np.asarray(image.dataobj)
      else:
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
      # gzip's checksum stands behind the last voxel; without it damage is wrong voxels, no error.
      while file is not None and file.read(2**20):
        pass
      return array
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: truncated or damaged, its voxels cannot be read ({file_checks.one_line(error)}); "
      "replace or remove it"
    ) from error
