"""One MetaImage (.mha, .mhd), NRRD or GIPL file, read and written with SimpleITK, the extra `itk`.

Axes are (x, y, z), as nibabel has them, and world coordinates NIfTI's: a file converted to NIfTI by
SimpleITK gives the same voxels, spacing and affine. A header without a spacing means 1 mm to ITK.
GIPL has no directions: they are those of the axes, to ITK as here.
"""

from __future__ import annotations

import math
import pathlib
import re
import tempfile
import types
import zlib

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources import volume

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_HEADER = 2**16  # bytes looked through for the name of a file of voxels
_META_DATA_FILE = re.compile(rb"^ElementDataFile *= *([^\r\n]*)", re.MULTILINE)
_OBJECT = re.compile(r"\w+\(0x[0-9a-f]+\): ")
_COMPRESSED = re.compile(rb"^CompressedData *= *T", re.MULTILINE | re.IGNORECASE)
_LINE_END = re.compile(rb"\r?\n?")
# GIPL: the last four bytes of a header of 256, big-endian; ITK looks for them only where it chooses
# the reader.
_GIPL_MAGIC = (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8")
_GIPL_HEADER = 256
_IMAGE_IO = {".nrrd": "NrrdImageIO", ".gipl": "GiplImageIO"}
_NRRD_GZIP = re.compile(
  rb"(?:(?!encoding:)[^\r\n]+\r?\n)*encoding: *(?:gzip|gz) *\r?\n(?:[^\r\n]+\r?\n)*\r?\n",
  re.IGNORECASE,
)
_NRRD_DATA_FILE = re.compile(rb"^data ?file: *([^\r\n]*)", re.MULTILINE | re.IGNORECASE)


def open_file(path: pathlib.Path) -> volume.Volume:
  """Reads a file's header.

  Raises:
    errors.DataError: if SimpleITK is missing, there is no header, or it announces something that
      is refused.
  """
  data_files(path)
  reader = _reader(path)
  shape = tuple(int(n) for n in reader.GetSize())
  kind = _library(path).GetPixelIDValueAsString(reader.GetPixelID())
  if reader.GetNumberOfComponents() != 1 or "complex" in kind:
    raise errors.DataError(f"{path}: voxels of type {kind!r}; expected one real number a voxel")
  volume.check_shape(path, shape)
  if path.suffix.lower() == ".gipl":
    _check_gipl(path, reader, shape)
  spacing = tuple(float(edge) for edge in reader.GetSpacing())
  if not all(np.isfinite(edge) and edge > 0 for edge in spacing):
    raise errors.DataError(
      f"{path}: the header gives the spacing {spacing} mm; expected numbers above 0, fix the header"
    )
  return volume.Volume(
    shape=shape,
    affine=_affine(reader) if len(shape) in (2, 3) else np.eye(4),
    spacing=spacing,
    eight_bit=kind == "8-bit unsigned integer",
    read=lambda as_bytes: _voxels(path, as_bytes),
  )


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The file, and the one that holds its voxels if that is another.

  Raises:
    errors.DataError: if that cannot be: a missing or irregular file, several files, or a file
      beside a format that is one file.
  """
  file_checks.check_regular(path)
  try:
    with path.open("rb") as file:
      content = file.read(_MAX_HEADER)
  except OSError as error:
    raise errors.DataError(f"{path}: {error.strerror}; bring it back or remove it") from error
  kind = path.suffix.lower()
  if kind == ".gipl":
    return [path]
  if kind == ".nrrd":
    # Up to the first empty line, after which voxels begin.
    match = _NRRD_DATA_FILE.search(re.split(rb"\r?\n\r?\n", content, maxsplit=1)[0])
    name = match[1].decode(errors="replace").strip() if match else "LOCAL"
  else:
    match = _META_DATA_FILE.search(content)
    name = match[1].decode(errors="replace").strip() if match else "LOCAL"
  if name == "LOCAL":
    return [path]
  other = path.parent / name
  if kind != ".mhd" or name.startswith("LIST") or "%" in name or not name:
    raise errors.DataError(
      f"{path}: its voxels are in {name!r}; expected one file that holds all (or, of .mhd, one "
      "file of voxels beside it), save it again as .mha, .nrrd or NIfTI"
    )
  if not other.exists():
    raise errors.DataError(f"{path}: its voxels are in {other}, which is missing; bring it back")
  file_checks.check_regular(other)
  return [path, other]


def encode_mask(path: pathlib.Path, mask: np.ndarray, ending: str) -> bytes:
  """A file of a mask u8[*S] with the geometry of an image's file.

  Args:
    path: of the image.
    mask: on its grid.
    ending: '.mha', '.nrrd' or '.gipl'.

  Raises:
    errors.DataError: if the image's header can no longer be read.
  """
  library, reader = _library(path), _reader(path)
  image = library.GetImageFromArray(np.ascontiguousarray(mask.T))
  image.SetSpacing(reader.GetSpacing())
  image.SetOrigin(reader.GetOrigin())
  image.SetDirection(reader.GetDirection())
  with tempfile.TemporaryDirectory() as folder:  # SimpleITK writes files alone
    written = pathlib.Path(folder) / f"mask{ending.lower()}"
    library.WriteImage(image, str(written), useCompression=True)
    return written.read_bytes()


def _check_gipl(path: pathlib.Path, reader, shape: tuple[int, ...]) -> None:
  """Refuses what is no GIPL file, or is cut off: ITK would make voxels of what is in memory."""
  with path.open("rb") as file:
    magic = file.read(_GIPL_HEADER)[-4:]
  one = _library(path).Image([1] * len(shape), reader.GetPixelID())
  wanted, found = math.prod(shape) * one.GetSizeOfPixelComponent(), path.stat().st_size
  if magic in _GIPL_MAGIC and found >= _GIPL_HEADER + wanted:
    return
  raise errors.DataError(
    f"{path}: no whole GIPL file ({found:,} bytes, expected a header of {_GIPL_HEADER} and "
    f"{wanted:,} of voxels); replace or remove it"
  )


def _library(path: pathlib.Path) -> types.ModuleType:
  try:
    import SimpleITK
  except ImportError as error:
    raise errors.DataError(
      f"{path}: {path.suffix} files are read with SimpleITK, which is not installed; run "
      "pip install 'rndpo_jax[itk]', or convert the files to NIfTI"
    ) from error
  SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # its lines would go to the screen
  return SimpleITK


def _reader(path: pathlib.Path):
  """SimpleITK's, the header read."""
  reader = _library(path).ImageFileReader()
  reader.SetImageIO(_IMAGE_IO.get(path.suffix.lower(), "MetaImageIO"))
  reader.SetFileName(str(path))
  try:
    reader.ReadImageInformation()
  except RuntimeError as error:
    raise errors.DataError(
      f"{path}: no readable header of a {path.suffix} file ({_cause(error)}); replace or remove it"
    ) from error
  return reader


def _affine(reader) -> np.ndarray:
  dims = reader.GetDimension()
  affine = np.eye(4)
  directions = np.reshape(reader.GetDirection(), (dims, dims))
  affine[:dims, :dims] = directions * np.array(reader.GetSpacing())
  affine[:dims, 3] = reader.GetOrigin()
  return _LPS_TO_RAS @ affine


def _voxels(path: pathlib.Path, as_bytes: bool) -> np.ndarray:
  library, reader = _library(path), _reader(path)
  try:
    _check_compressed(path)
    array = library.GetArrayFromImage(reader.Execute()).T
  except (RuntimeError, zlib.error) as error:
    raise errors.DataError(
      f"{path}: truncated or damaged, its voxels cannot be read ({_cause(error)}); replace or "
      "remove it"
    ) from error
  return array if as_bytes else array.astype(np.float32)


def _check_compressed(path: pathlib.Path) -> None:
  """Raises zlib.error on damaged compressed voxels: ITK may give them without an error."""
  last = data_files(path)[-1]
  kind = path.suffix.lower()
  if kind == ".gipl":
    return
  with path.open("rb") as file:
    content = file.read(_MAX_HEADER)
  if kind == ".nrrd":
    match = _NRRD_GZIP.match(content)
    start, window = match and match.end(), 31  # of gzip
  else:
    match = _META_DATA_FILE.search(content)
    match = match if match and _COMPRESSED.search(content[: match.start()]) else None
    start = match and match.end() + len(_LINE_END.match(content, match.end())[0])
    window = 15  # of zlib
  if match is None:
    return
  stream = zlib.decompressobj(window)
  with last.open("rb") as file:
    if last == path:
      file.seek(start)
    while not stream.eof and (part := file.read(2**16)):
      while part:
        stream.decompress(part, 2**24)
        part = stream.unconsumed_tail
  if not stream.eof:
    raise zlib.error("its compressed voxels end too early")


def _cause(error: Exception) -> str:
  """What ITK says of an error, without the place in its code and the address of its object."""
  text = _OBJECT.split(file_checks.one_line(error))[-1]
  return "SimpleITK cannot read it" if "Reason: Success" in text else text[:200]
