"""The native mode: images at a spacing in mm, by nnU-Net's order of steps.

A case is cropped to what is not zero, normalised channel by channel, and resampled; then its slices
are taken apart where records are slices. Slices outside the crop have nothing to train on: their
box is empty, and their mask the background.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import intensity, nonzero, records, resample


def of_source(source: records.Source, native: records.Native | None) -> records.Source:
  """The source with `Pixels.on_spacing`; the source itself in the simple mode."""
  if native is None:
    return source
  ends = dict(itertools.chain.from_iterable(_places(*unit) for unit in units(source.records)))

  def read(start: int) -> Iterator[records.Pixels]:
    first, _ = ends[start] if start < len(source.records) else (start, start)
    pixels, place = source.read(first), first
    while place < len(source.records):
      end = ends[place][1]
      unit = list(itertools.islice(pixels, end - place))
      for one, entry in zip(unit, source.records[place:end], strict=True):
        records.check_pixels(one, entry, source.num_classes)
      entry = source.records[place]
      found = on_spacing(unit, case_spacing(entry), native, source.num_classes)
      for number, (one, own) in enumerate(zip(unit, found, strict=True), place):
        if number >= start:
          yield one._replace(on_spacing=own)
      place = end

  return source._replace(read=read, native=native)


def _places(first: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
  return ((place, (first, end)) for place in range(first, end))


def units(entries: Sequence[dict]) -> list[tuple[int, int]]:
  """[first, end) of the records that are prepared together: a volume's slices, or one record."""
  units = []
  for place, entry in enumerate(entries):
    if units and entry["slice"] > 0 and entry["slice_spacing"] is not None:
      units[-1] = (units[-1][0], place + 1)
    else:
      units.append((place, place + 1))
  return units


def joined(pixels: Sequence[records.Pixels], sliced: bool) -> np.ndarray:
  """[*S, I] of what is prepared together: the slices of a volume along its last axis, or one."""
  image = pixels[0].image
  return np.stack([p.image for p in pixels], axis=image.ndim - 1) if sliced else image


def case_spacing(entry: dict) -> tuple[float, ...]:
  """mm a voxel of what `on_spacing` takes together, from a record of it."""
  between = entry["slice_spacing"]
  return (*entry["spacing"], *(() if between is None else (between,)))


def on_spacing(
  pixels: Sequence[records.Pixels],
  spacing: Sequence[float],
  native: records.Native,
  num_classes: int,
) -> list[records.OnSpacing]:
  """Crops, normalises and resamples one case.

  Args:
    pixels: of its records: the case, or its slices in order.
    spacing: mm a voxel of the case, one an axis; three where there are slices.
    native: of the data set.
    num_classes: C.

  Returns:
    One a record.
  """
  dims = len(native.spacing)
  sliced = len(spacing) > dims
  image = joined(pixels, sliced)
  box = nonzero.box(image)
  inside = nonzero.mask(image)[box] if "zscore_in_mask" in native.schemes else None
  try:
    image = intensity.normalize(image[box], native.schemes, native.statistics, inside)
  except ValueError as error:
    raise errors.DataError(
      f"{pixels[0].image_path}: config.data.schemes: {error}; choose other schemes"
    ) from error
  # A volume is resampled as one, though its slices keep their distance: splines are clipped to what
  # the volume has.
  options = {"spacing": tuple(spacing), "new_spacing": (*native.spacing, *spacing[dims:])}
  new_shape = resample.resampled_shape(image.shape[:-1], **options)
  image = resample.resample_image(image, new_shape, **options)
  edges = np.array([(s.start, s.stop) for s in box[:dims]], np.int32)
  found = []
  for number, one in enumerate(pixels):
    if sliced and not box[-1].start <= number < box[-1].stop:
      found.append(_empty(dims, image.shape[-1], one.mask is not None))
      continue
    own, mask = image[:, :, number - box[-1].start] if sliced else image, one.mask
    if mask is not None:
      mask = mask_to_spacing(mask, edges, spacing[:dims], native, num_classes)
    found.append(records.OnSpacing(np.ascontiguousarray(own, np.float32), mask, edges))
  return found


def mask_to_spacing(
  mask: np.ndarray,
  box: np.ndarray,
  spacing: Sequence[float],
  native: records.Native,
  num_classes: int,
) -> np.ndarray:
  """A record's mask on the model's spacing, u8[*M], linear by class; see `resample_mask`.

  Args:
    mask: u8[*S] on the record's own grid; `types.IGNORED` is resampled as a class of its own.
    box: i32[dims, 2] of the record; it is not empty.
    spacing: mm a pixel of the record.
    native: of the data set.
    num_classes: C.
  """
  return resample.resample_mask(
    mask[tuple(slice(*edges) for edges in box)],
    model_shape(box, spacing, native.spacing),
    spacing=tuple(spacing),
    new_spacing=native.spacing,
    ids=(*range(1, num_classes), types.IGNORED),
  )


def _empty(dims: int, num_channels: int, has_mask: bool) -> records.OnSpacing:
  """A slice outside the crop; one pixel, for TFDS cannot read images without any."""
  pixel = (1,) * dims
  mask = np.zeros(pixel, np.uint8) if has_mask else None
  return records.OnSpacing(
    np.zeros((*pixel, num_channels), np.float32), mask, np.zeros((dims, 2), np.int32)
  )


def to_own_spacing(
  values: np.ndarray, box: np.ndarray, spacing: Sequence[float], native: records.Native
) -> np.ndarray:
  """Brings f32[*M, C] on the model's spacing back to a record's box, linearly.

  Args:
    values: logits, or an image.
    box: i32[dims, 2] of the record; it is not empty.
    spacing: mm a pixel of the record.
    native: of the data set.
  """
  lengths = (box[:, 1] - box[:, 0]).tolist()
  return resample.resample_logits(values, lengths, spacing=native.spacing, new_spacing=spacing)


def paste(values: np.ndarray, box: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """What stands in a record's box, on its own grid [*shape, ...] with zeros around.

  Args:
    values: [*box, ...].
    box: i32[dims, 2] of the record.
    shape: S of the record.
  """
  out = np.zeros((*shape, *values.shape[len(box) :]), values.dtype)
  out[tuple(slice(*edges) for edges in box)] = values
  return out


def is_seen(box: np.ndarray) -> bool:
  """Whether a record has pixels on the model's spacing."""
  return bool((box[:, 1] > box[:, 0]).all())


def model_shape(
  box: np.ndarray, spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
  """M of a record: the shape of its box on the model's spacing; zeros if the box is empty.

  Args:
    box: i32[dims, 2].
    spacing: mm a pixel of the record.
    new_spacing: of the model.
  """
  if not is_seen(box):
    return (0,) * len(box)
  lengths = (box[:, 1] - box[:, 0]).tolist()
  return resample.resampled_shape(lengths, spacing, new_spacing)
