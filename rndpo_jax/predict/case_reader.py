"""A case's files -> what the network takes, slice by slice where it is a 2D one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import dataset, records
from rndpo_jax.data.sources import cases
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
  opened = open_case(source, trained)
  if source.is_picture:  # of others without a spacing the axes are not known
    check_axes(source, trained.of_pictures)
  found, shape = [], ()
  for one in cases.read_case(opened, trained.spatial_dims, trained.num_classes, False):
    shape = one.image.shape[:-1]
    entry = {"shape": shape, "record_id": source.case_id}
    records.check_pixels(one, entry, trained.num_classes)
    found.append(dataset.to_model(trained, one.image))
  return Case(source, stamp, found, shape, len(opened.shape) > trained.spatial_dims)


def check_axes(source: inputs.Input, of_pictures: bool) -> None:
  """Refuses a picture for a network of other images, or the other way round.

  Raises:
    errors.DataError: naming the file and the remedy.
  """
  if source.is_picture == of_pictures:
    return
  found, trained_on, remedy = "no picture", "pictures, whose axes are (row, column)", "PNG"
  if source.is_picture:
    found, trained_on, remedy = "a picture", "images of the axes (x, y)", "NIfTI"
  raise errors.DataError(
    f"{source.files[0]}: {found}, but the network was trained on {trained_on}: it would see the "
    f"image turned; convert it to {remedy}"
  )


def open_case(source: inputs.Input, network) -> cases.Case:
  """The case, its headers checked to be what the network takes.

  Args:
    source: without a problem.
    network: a Trained, or what else has its `spatial_dims` and `num_channels`.

  Raises:
    errors.DataError: naming the file, what was found and the remedy.
  """
  case = cases.open_case(list(source.files), None, 2)
  first, count = source.files[0], case.num_channels
  if len(case.shape) < network.spatial_dims:
    raise errors.DataError(
      f"{first}: a 2D image of shape {case.shape}, but the network was trained on volumes; give "
      "volumes, as NIfTI, or a network with config.data.spatial_dims=2"
    )
  if count != network.num_channels:
    names = [f"{source.case_id}_{n:04d}{source.ending}" for n in range(2)]
    raise errors.DataError(
      f"{first}: {count} channel{'s' * (count > 1)}, but the network was trained on "
      f"{network.num_channels}; expected as many (an RGB picture is three): convert or remove it, "
      f"or give channels as files {', '.join(names)} and so on, and all names of this kind"
    )
  return case
