"""Masks of whole records in the native mode: tiles put together, then brought to the own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native
from rndpo_jax.evaluation import sliding_window
from rndpo_jax.predict import restore
from rndpo_jax.runtime import sharding
from rndpo_jax.types import Params, Segmenter


class _Grids(NamedTuple):
  """A record's own grid and the model's, as `restore` reads them of a case."""

  spacing: tuple[float, ...]
  new_spacing: tuple[float, ...]
  cropped_shape: tuple[int, ...]
  image_shape: tuple[int, ...]


def make(
  segmenter: Segmenter, dataset: dataset_lib.Dataset
) -> Callable[[Params, Sequence[int]], Iterator[tuple[int, np.ndarray]]]:
  """What predicts records of the native mode; compiles nothing yet.

  Args:
    segmenter: of the network.
    dataset: by records; its size is the patch.

  Returns:
    (params, record indices) -> (index, mask u8[*S] on the record's own grid), in order. Tiles'
    logits are put together on the model's spacing and brought to the record's box by what
    prediction does with a case (`restore`), slab by slab; outside the box is the background.
  """
  batch_size = sliding_window.batch_size(dataset.size)
  window = sliding_window.make(segmenter.apply, dataset.size, batch_size=batch_size)

  def masks(params: Params, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    placed = sharding.put_on_local_devices(params)
    slabs = sliding_window.slabs(window, placed, _images(dataset, indices))
    parts = (
      restore.restore(piece, with_scores=False, with_probabilities=False)
      for piece in restore.pieces(slabs, dataset.num_classes)
    )
    for index in indices:
      mask = np.zeros(dataset.records[index]["shape"], np.uint8)
      if native.is_seen(dataset.boxes[index]):
        _fill(mask[tuple(slice(*edges) for edges in dataset.boxes[index])], parts)
      yield int(index), mask

  return masks


def _images(dataset, indices: Sequence[int]) -> Iterator[tuple[_Grids, np.ndarray]]:
  for index in indices:
    box = dataset.boxes[index]
    if native.is_seen(box):
      image = dataset_lib.load_on_spacing(dataset, index, with_labels=False)["image"]
      yield (
        _Grids(
          spacing=tuple(dataset.records[index]["spacing"]),
          new_spacing=dataset.native.spacing,
          cropped_shape=tuple((box[:, 1] - box[:, 0]).tolist()),
          image_shape=image.shape[:-1],
        ),
        image,
      )


def _fill(box: np.ndarray, parts: Iterator[restore.Part]) -> None:
  """Writes the parts of one record into its box."""
  for part in parts:
    box[part.place] = part.labels
    if part.is_last:
      return
