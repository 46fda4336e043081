"""Masks of whole records in the native mode: tiles put together, then brought to the own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native
from rndpo_jax.evaluation import sliding_window
from rndpo_jax.runtime import sharding
from rndpo_jax.types import Params, Segmenter


def make(
  segmenter: Segmenter, dataset: dataset_lib.Dataset
) -> Callable[[Params, Sequence[int]], Iterator[tuple[int, np.ndarray]]]:
  """What predicts records of the native mode; compiles nothing yet.

  Args:
    segmenter: of the network.
    dataset: by records; its size is the patch.

  Returns:
    (params, record indices) -> (index, mask u8[*S] on the record's own grid), in order. Tiles'
    logits are put together on the model's spacing, brought to the record's box linearly, and the
    argmax is taken there; outside the box is the background.
  """
  batch_size = sliding_window.batch_size(dataset.size)
  window = sliding_window.make(segmenter.apply, dataset.size, batch_size=batch_size)

  def masks(params: Params, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    placed = sharding.put_on_local_devices(params)
    found = _logits(sliding_window.slabs(window, placed, _images(dataset, indices)))
    for index in indices:
      entry, box, mask = dataset.records[index], dataset.boxes[index], None
      if native.is_seen(box):
        logits = native.to_own_spacing(next(found), box, entry["spacing"], dataset.native)
        mask = np.argmax(logits, axis=-1).astype(np.uint8)
      yield int(index), native.paste(mask, box, entry["shape"])

  return masks


def _images(dataset, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
  for index in indices:
    if native.is_seen(dataset.boxes[index]):
      example = dataset_lib.load_on_spacing(dataset, index, with_labels=False)
      yield int(index), example["image"]


def _logits(slabs: Iterable[sliding_window.Slab]) -> Iterator[np.ndarray]:
  """f32[*M, C] of one record after another."""
  parts: list[np.ndarray] = []
  for slab in slabs:
    parts.append(slab.logits)
    if slab.is_last:
      yield np.concatenate(parts, axis=slab.axis)
      parts = []
