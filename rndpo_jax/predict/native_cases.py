"""A case's files -> the image at the network's spacing, and what leads back to its own grid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import intensity, nonzero, records, resample
from rndpo_jax.data.sources import cases, images
from rndpo_jax.predict import case_reader, inputs
from rndpo_jax.predict.native_network import NativeNetwork


class NativeCase(NamedTuple):
  """A case, read.

  Attributes:
    source: where it came from.
    stamp: of its files, taken before they were read.
    shape: S on its own grid.
    box: what of it is not zero, a slice an axis.
    spacing: mm a pixel of its own grid.
    new_spacing: of the image.
    image: f32[*S', I], normalised, at the network's spacing; None once it is cut into tiles.
    image_shape: S'.
  """

  source: inputs.Input
  stamp: str
  shape: tuple[int, ...]
  box: tuple[slice, ...]
  spacing: tuple[float, ...]
  new_spacing: tuple[float, ...]
  image: np.ndarray | None
  image_shape: tuple[int, ...]

  @property
  def cropped_shape(self) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in self.box)


def read(source: inputs.Input, network: NativeNetwork) -> NativeCase:
  """Reads, crops, normalises and resamples a case, in this order, as nnU-Net does.

  A 2D network takes the slices of a volume along its last axis, which keeps its spacing.

  Raises:
    errors.DataError: naming the file, what was found and the remedy.
  """
  if source.problem:
    raise errors.DataError(source.problem)
  stamp = inputs.stamp(source)
  image, spacing = _pixels(source, network)
  shape, box = image.shape[:-1], nonzero.box(image)
  in_mask = "zscore_in_mask" in network.schemes
  mask = nonzero.mask(image[box]) if in_mask else None
  try:
    image = intensity.normalize(image[box], network.schemes, network.statistics, mask)
  except ValueError as error:
    raise errors.DataError(f"{source.files[0]}: {error}") from error
  new_spacing = (*network.spacing, *spacing[len(network.spacing) :])
  new_shape = resample.resampled_shape(image.shape[:-1], spacing, new_spacing)
  image = resample.resample_image(image, new_shape, spacing=spacing, new_spacing=new_spacing)
  return NativeCase(source, stamp, shape, box, spacing, new_spacing, image, new_shape)


def _pixels(source: inputs.Input, network: NativeNetwork) -> tuple[np.ndarray, tuple[float, ...]]:
  """The image as it came, and its spacing."""
  case = case_reader.open_case(source, network)
  case_reader.check_axes(source, network.of_pictures)
  spacing = case.spacing
  if spacing is None and source.is_picture:
    spacing = images.SPACING_MM
  if spacing is None:
    raise errors.DataError(
      f"{source.files[0]}: the header gives no spacing, but the network takes images at "
      f"{network.spacing} mm a pixel; write it into the header (pixdim of NIfTI)"
    )
  (pixels,) = cases.read_case(case, len(case.shape), network.num_classes, False)
  entry = {"shape": pixels.image.shape[:-1], "record_id": source.case_id}
  records.check_pixels(pixels, entry, network.num_classes)
  return pixels.image, spacing
