"""A case's files -> what the network takes, slice by slice where it is a 2D one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import dataset, records
from rndpo_jax.data.sources import images, nifti
from rndpo_jax.predict import inputs
from rndpo_jax.predict.trained import Trained


class Case(NamedTuple):
  """A case, read.

  Attributes:
    source: where it came from.
    stamp: of its files, taken before they were read.
    images: f32[*size, I] of each record: the case, or its slices in order.
    shape: S of a record on its own grid.
    is_sliced: whether the records are a volume's slices.
  """

  source: inputs.Input
  stamp: str
  images: list[np.ndarray]
  shape: tuple[int, ...]
  is_sliced: bool


def read(source: inputs.Input, trained: Trained) -> Case:
  """Reads a case as the data that the network was trained on were read.

  Raises:
    errors.DataError: naming the file, what was found and the remedy.
  """
  if source.problem:
    raise errors.DataError(source.problem)
  stamp = inputs.stamp(source)
  pixels, is_sliced = (_volume if source.is_nifti else _image)(source, trained)
  found, shape = [], ()
  for one in pixels:
    shape = one.image.shape[:-1]
    entry = {"shape": shape, "record_id": source.case_id}
    records.check_pixels(one, entry, trained.num_classes)
    found.append(dataset.to_model(trained, one.image))
  return Case(source, stamp, found, shape, is_sliced)


def _image(source: inputs.Input, trained: Trained) -> tuple[Iterable[records.Pixels], bool]:
  path = source.files[0]
  header = images.header(path)
  if trained.spatial_dims != 2:
    raise errors.DataError(
      f"{path}: a 2D image, but the network was trained on volumes; expected NIfTI, as {path.stem}"
      ".nii.gz"
    )
  if header.channels != trained.num_channels:
    kinds = {1: "grey", 3: "RGB"}
    raise errors.DataError(
      f"{path}: {header.channels} channels ({kinds[header.channels]}), but the network was trained "
      f"on {trained.num_channels}; expected the same, convert or remove it"
    )
  image = images.read_image(path)
  if image.shape[:-1] != header.shape:  # a TIFF that its tag turns
    raise errors.DataError(
      f"{path}: tagged with orientation {header.orientation}, which turns {header.shape} pixels to "
      f"{image.shape[:-1]}; save it upright"
    )
  return [records.Pixels(image, None, np.eye(4), str(path))], False


def _volume(source: inputs.Input, trained: Trained) -> tuple[Iterable[records.Pixels], bool]:
  first = source.files[0]
  if len(source.files) != trained.num_channels:
    raise errors.DataError(
      f"{first}: {len(source.files)} channel, but the network was trained on "
      f"{trained.num_channels}; expected files {source.case_id}_0000{source.ending} to "
      f"{source.case_id}_{trained.num_channels - 1:04d}{source.ending}, and all names of this kind"
    )
  case = nifti.open_case(list(source.files), None, 2)
  if len(case.shape) < trained.spatial_dims:
    raise errors.DataError(
      f"{first}: a 2D image of shape {case.shape}, but the network was trained on volumes; give "
      "volumes, or a network with config.data.spatial_dims=2"
    )
  pixels = nifti.read_case(case, trained.spatial_dims, trained.num_classes, False)
  return pixels, len(case.shape) > trained.spatial_dims
