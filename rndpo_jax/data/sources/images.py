"""Reading PNG, BMP, JPEG and TIFF: what is taken, how, and what is refused.

Images, by Pillow's mode: L and 1 are grey, RGB is colour, 8 bits each; I;16, I and F are grey
and become float32. A palette image becomes RGB. An alpha channel is dropped if it is opaque
everywhere and refused otherwise. Masks: grey values, palette indices (not their colours), or
RGB whose three channels are equal. Pixels are taken as they are stored; an EXIF orientation is
not applied, except for TIFF's own, which Pillow applies.
"""

from __future__ import annotations

import pathlib
import struct
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from rndpo_jax import errors
from rndpo_jax.data import file_checks
from rndpo_jax.data.sources import volume

_CHANNELS = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "PA": 3, "I": 1, "F": 1}
_FORMATS = ("PNG", "BMP", "JPEG", "TIFF")  # Pillow would read dozens, some by other programs
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Files have no place for a spacing: as nnU-Net's reader of pictures has it.
SPACING_MM = (1.0, 1.0)
SPACING_NOTE = "pictures have no spacing: for config.data.spacing a pixel is 1 mm, as in nnU-Net"
_PHOTOMETRIC = 262  # tag of TIFF; 0 is WhiteIsZero
_ORIENTATION = 0x0112  # tag of EXIF and TIFF; 1 is upright


class Header(NamedTuple):
  """What a file says before its pixels are decoded."""

  shape: tuple[int, int]  # (H, W)
  channels: int  # 1 or 3
  dtype: str  # uint8 or float32
  orientation: int  # EXIF's or TIFF's, 1 for none


def open_file(path: pathlib.Path) -> volume.Volume:
  """An image as one of several files of a case, its header read.

  Raises:
    records.DataError: as `header`; reading raises it as `read_image` or `read_mask`, and if the tag
      of a TIFF turns the image to another shape.
  """
  found = header(path)

  def read(as_bytes: bool) -> np.ndarray:
    image = read_image(path)
    if image.shape[:-1] != found.shape:
      raise errors.DataError(
        f"{path}: tagged with orientation {found.orientation}, which turns {found.shape} pixels to "
        f"{image.shape[:-1]}; save it upright"
      )
    return image if as_bytes else image.astype(np.float32, copy=False)

  return volume.Volume(
    shape=found.shape,
    affine=np.eye(4),
    spacing=None,
    eight_bit=found.dtype == "uint8",
    read=read,
    num_channels=found.channels,
    read_ids=lambda num_ids: read_mask(path, num_ids),
  )


def header(path: pathlib.Path) -> Header:
  """Reads an image's header.

  Raises:
    records.DataError: if there is none, or it announces something that is refused.
  """
  with _open(path) as image:
    mode = "I" if image.mode.startswith("I;16") else image.mode
    if mode not in _CHANNELS:
      raise errors.DataError(
        f"{path}: colour mode {image.mode!r}; expected grey or RGB, convert it (for example to RGB)"
      )
    if image.height * image.width < 2:
      raise errors.DataError(f"{path}: an image of one pixel; expected more, remove it")
    _check_depth(path, image)
    _check_zero_is_black(path, image)
    dtype = "float32" if mode in ("I", "F") else "uint8"
    return Header((image.height, image.width), _CHANNELS[mode], dtype, _orientation(path, image))


def read_image(path: pathlib.Path) -> np.ndarray:
  """Decodes an image: uint8 or float32 [H, W, 1 or 3].

  Raises:
    records.DataError: if it is truncated or damaged, or has an alpha channel in use.
  """
  with _open(path) as image:
    mode = image.mode
    if mode == "1":
      array = np.asarray(_decode(path, image.convert, "L"))
    elif mode in ("P", "PA", "LA", "RGBA"):
      array = np.asarray(_decode(path, image.convert, "LA" if mode == "LA" else "RGBA"))
      if array[..., -1].min() < 255:
        raise errors.DataError(
          f"{path}: transparent pixels have no defined value; save it without an alpha channel"
        )
      array = array[..., :-1]
    else:
      array = np.asarray(_decode(path, image.copy))
  if array.ndim == 2:
    array = array[..., None]
  return array if array.dtype == np.uint8 else array.astype(np.float32)


def read_mask(path: pathlib.Path, num_classes: int) -> np.ndarray:
  """Decodes a mask: u8[H, W] class ids. With two classes, 0 and 255 mean 0 and 1.

  Raises:
    records.DataError: if it is truncated or damaged, has colours, or holds a value outside
      0..C-1.
  """
  with _open(path) as image:
    _check_depth(path, image)
    _check_zero_is_black(path, image)
    array = np.asarray(_decode(path, image.copy))
  if array.ndim == 3 and array.shape[-1] == 3 and (array == array[..., :1]).all():
    array = array[..., 0]
  if array.ndim != 2:
    raise errors.DataError(
      f"{path}: a mask of {array.shape[-1]} channels; expected one channel of class ids, convert it"
    )
  return class_ids(array, num_classes, str(path))


def class_ids(array: np.ndarray, num_classes: int, path: str) -> np.ndarray:
  """Checks that an array holds class ids alone, and returns it as u8; 0 and 255 as in `read_mask`.

  Raises:
    records.DataError: naming the first values that are no class id.
  """
  if num_classes == 2 and array.dtype != bool and np.isin(array, (0, 255)).all():
    array = array == 255
  values = np.unique(array)
  wrong = values[~np.isin(values, np.arange(num_classes))]
  if wrong.size:
    found = ", ".join(f"{float(value):.8g}" for value in wrong[:3])
    both = " (or 0 and 255 alone)" if num_classes == 2 else ""
    raise errors.DataError(
      f"{path}: the mask holds the value {found}; expected class ids 0..{num_classes - 1}{both}; "
      "fix the mask or set config.data.num_classes"
    )
  return array.astype(np.uint8)


def _check_depth(path: pathlib.Path, image: Image.Image) -> None:
  """Refuses what Pillow would cut to the upper 8 of 16 bits."""
  # The decoder's options: of some formats the raw mode alone, of TIFF with other numbers beside it.
  options = [tile[-1] for tile in image.tile]
  raw_modes = [one[0] if isinstance(one, tuple) else one for one in options]
  if image.mode in ("LA", "RGB", "RGBA") and any("16" in str(mode) for mode in raw_modes):
    raise errors.DataError(
      f"{path}: colour or transparency of 16 bits a channel is not supported; convert it to 8 bits "
      "a channel, or to grey alone"
    )


def _check_zero_is_black(path: pathlib.Path, image: Image.Image) -> None:
  """Refuses a grey TIFF whose 0 is white, which Pillow inverts, if it has 8 bits."""
  if image.format == "TIFF" and image.mode == "L" and image.tag_v2.get(_PHOTOMETRIC) == 0:
    raise errors.DataError(
      f"{path}: a TIFF in which 0 is white (PhotometricInterpretation WhiteIsZero), so that its "
      "values would be inverted; save it with 0 as black, or as PNG"
    )


def _orientation(path: pathlib.Path, image: Image.Image) -> int:
  if image.format == "PNG" and "exif" not in image.info:
    return 1  # else Pillow would decode the pixels to look behind them
  return _decode(path, image.getexif).get(_ORIENTATION, 1)


def _open(path: pathlib.Path) -> Image.Image:
  file_checks.check_regular(path)
  try:
    image = Image.open(path, formats=_FORMATS)
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
  except _TOO_LARGE as error:
    raise errors.DataError(
      f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; crop or shrink it"
    ) from error
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: no readable header of a PNG, BMP, JPEG or TIFF ({file_checks.one_line(error)}); "
      "replace or remove the file"
    ) from error
  if frames > 1:
    image.close()
    raise errors.DataError(
      f"{path}: a stack of {frames} images; expected one 2D image a file, split it (or take "
      "volumes as NIfTI with config.data.source='nnunet')"
    )
  return image


def _decode(path: pathlib.Path, step, *args):
  try:
    return step(*args)
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: truncated or damaged, its pixels cannot be read ({file_checks.one_line(error)}); "
      "replace or remove it"
    ) from error
