"""Masks of whole records in the native mode: tiles put together, then brought to the own grid."""

from __future__ import annotations

import functools
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
  """A record's own grid and the model's, as `restore` reads them of a case.

  Of a slice the spacings are the volume's, which decide on the axis that is resampled apart.
  """

  spacing: tuple[float, ...]
  new_spacing: tuple[float, ...]
  cropped_shape: tuple[int, ...]
  image_shape: tuple[int, ...]


def make(
  segmenter: Segmenter,
  dataset: dataset_lib.Dataset,
  mirror_axes: Sequence[int] = (),
  rule: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Callable[[Params, Sequence[int]], Iterator[tuple[int, np.ndarray]]]:
  """What predicts records of the native mode; compiles nothing yet.

  Args:
    segmenter: of the network.
    dataset: by records; its size is the patch.
    mirror_axes: logits are averaged over flips along each set of them.
    rule: probabilities f16[*S, C] of a record's box -> mask u8[*S]; the argmax by default.

  Returns:
    (params, record indices) -> (index, mask u8[*S] on the record's own grid), in order. Tiles'
    logits are put together on the model's spacing and brought to the record's box by what
    prediction does with a case (`restore`), slab by slab; outside the box is the background.
  """
  batch_size = sliding_window.batch_size(dataset.size)
  window = sliding_window.make(
    segmenter.apply, dataset.size, batch_size=batch_size, mirror_axes=mirror_axes
  )
  restored = functools.partial(
    restore.restore, with_scores=False, with_probabilities=rule is not None
  )

  def masks(params: Params, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    placed = sharding.put_on_local_devices(params)
    slabs = sliding_window.slabs(window, placed, _images(dataset, indices))
    parts = map(restored, restore.pieces(slabs, dataset.num_classes))
    for index in indices:
      mask = np.zeros(dataset.records[index]["shape"], np.uint8)
      if native.is_seen(dataset.boxes[index]):
        box = mask[tuple(slice(*edges) for edges in dataset.boxes[index])]
        if rule is None:
          _fill(box, parts, "labels")
        else:
          probs = np.zeros((*box.shape, dataset.num_classes), np.float16)
          _fill(probs, parts, "probabilities")
          box[...] = rule(probs)
      yield int(index), mask

  return masks


def _images(dataset, indices: Sequence[int]) -> Iterator[tuple[_Grids, np.ndarray]]:
  for index in indices:
    box = dataset.boxes[index]
    if native.is_seen(box):
      spacing = native.case_spacing(dataset.records[index])
      image = dataset_lib.load_on_spacing(dataset, index, with_labels=False)["image"]
      yield (
        _Grids(
          spacing=spacing,
          new_spacing=(*dataset.native.spacing, *spacing[len(box) :]),
          cropped_shape=tuple((box[:, 1] - box[:, 0]).tolist()),
          image_shape=image.shape[:-1],
        ),
        image,
      )


def _fill(box: np.ndarray, parts: Iterator[restore.Part], name: str) -> None:
  """Writes this attribute of the parts of one record into its box."""
  for part in parts:
    box[part.place] = getattr(part, name)
    if part.is_last:
      return
