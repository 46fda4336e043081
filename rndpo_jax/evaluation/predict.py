"""Masks that a checkpoint predicts for the cases of validation and test, on their own grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import models
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, tiles
from rndpo_jax.evaluation import stitched
from rndpo_jax.models import mirroring
from rndpo_jax.runtime import preemption, sharding
from rndpo_jax.types import Params, Segmenter

SPLITS = ("val", "test")
_KEEP_BYTES = 2**30  # images and labels are kept between checkpoints up to this size
_KEPT = "evaluate: measured checkpoints are kept"
_GRID_STEP = 64  # pixels


class Evaluation(NamedTuple):
  """What the measuring of every checkpoint shares.

  Attributes:
    folder: for partial results.
    dataset: the prepared data.
    mirror_axes: spatial axes whose flips are averaged over; () for none.
    tolerance: of nsd, in the data's spacing unit.
    groups: (split, case id) -> record indices in slice order.
    predict_batch: (params, images, `resize_matrices`) -> masks u8[B, *N].
    params: step -> parameters; step 0 is the base.
    batches: record indices -> batches without labels; in the native mode indices of tiles.
    label: record index -> u8[*S] on the record's own grid.
    stitched: in the native mode (params, record indices) -> as `predict`; else None.
  """

  folder: epath.Path
  dataset: dataset_lib.Dataset
  mirror_axes: tuple[int, ...]
  tolerance: float
  groups: dict[tuple[str, str], list[int]]
  predict_batch: Callable[..., jax.Array]
  params: Callable[[int], Params]
  batches: Callable[[tuple[int, ...]], Iterable]
  label: Callable[[int], np.ndarray]
  stitched: Callable[..., Iterator] | None = None


def open_evaluation(
  config,
  dataset: dataset_lib.Dataset,
  folder: epath.Path,
  params: Callable[[int], Params],
  mirror_axes: Sequence[int] = (),
) -> Evaluation:
  """What evaluating needs; compiles nothing yet.

  Args:
    config: the whole config.
    dataset: the prepared data.
    folder: for partial results; made if it is missing.
    params: step -> parameters; step 0 is the base.
    mirror_axes: as in `Evaluation`; in the simple mode all spatial axes or none.
  """
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  folder.mkdir(parents=True, exist_ok=True)
  apply, to_masks = programs(segmenter, mirror=bool(mirror_axes))

  def predict_batch(params, images, resize):
    return to_masks(apply(params, images), resize)

  items = tiles.view(dataset)

  def batches(indices: tuple[int, ...]):
    return loader.batches(items, indices, batch_size=batch_size(config), with_labels=False)

  def label(index: int) -> np.ndarray:
    return dataset_lib.load_native(dataset, index, with_labels=True)["label"]

  groups = group_cases(dataset)
  if _bytes_to_keep(items, groups) <= _KEEP_BYTES:
    read = batches
    batches = functools.cache(lambda indices: list(read(indices)))
    label = functools.cache(label)
  return Evaluation(
    folder=folder,
    dataset=dataset,
    mirror_axes=tuple(mirror_axes),
    tolerance=config.evaluate.nsd_tolerance_mm,
    groups=groups,
    predict_batch=predict_batch,
    params=params,
    batches=batches,
    label=label,
    stitched=None if dataset.native is None else stitched.make(segmenter, dataset, mirror_axes),
  )


class Programs(NamedTuple):
  """The two halves of predicting a batch, whose rows the devices of this process share.

  Attributes:
    apply: (params, images f32[B, *size, I]) -> logits f32[B, *size, C].
    to_masks: (logits, `resize_matrices`) -> masks u8[B, *N].
  """

  apply: Callable[..., jax.Array]
  to_masks: Callable[..., jax.Array]


def programs(segmenter: Segmenter, *, mirror: bool = False) -> Programs:
  """Of evaluation and of prediction: equal images have equal masks in both, bit for bit.

  With `mirror` the logits are those of `mirroring.mirrored`.
  """
  to_masks = sharding.over_local_devices(lambda _, arguments: native_masks(*arguments))
  return Programs(
    apply=sharding.over_local_devices(
      mirroring.mirrored(segmenter.apply) if mirror else segmenter.apply
    ),
    to_masks=lambda logits, resize: to_masks(None, (logits, resize)),
  )


def batch_size(config) -> int:
  """`config.evaluate.batch_size`, rounded up to what the devices of this process share."""
  parts = jax.local_device_count()
  return parts * -(-config.evaluate.batch_size // parts)


def group_cases(dataset) -> dict[tuple[str, str], list[int]]:
  """(split, case id) -> record indices in slice order, of validation and test."""
  groups: dict[tuple[str, str], list[int]] = {}
  for split in SPLITS:
    for index in map(int, dataset.splits[split]):
      groups.setdefault((split, dataset.records[index]["case_id"]), []).append(index)
  for indices in groups.values():
    indices.sort(key=lambda index: (dataset.records[index]["slice"], index))
  return groups


def _bytes_to_keep(items, groups) -> int:
  """Of labels, and of what batches are made of: records, or tiles."""
  indices = [index for group in groups.values() for index in group]
  entries = tiles.whole(items).records
  labels = sum(math.prod(entries[index]["shape"]) for index in indices)
  count = sum(len(items.splits[split]) for split in SPLITS)
  return labels + 4 * count * math.prod(items.size) * items.num_channels


def predict(
  evaluation: Evaluation, params: Params, indices: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (record index, mask u8[*S] on the record's own grid) in the order of `indices`."""
  dataset = evaluation.dataset
  if evaluation.stitched is not None:
    for index, mask in evaluation.stitched(params, indices):
      preemption.check(_KEPT)
      yield index, mask
    return

  def forward(batch):
    shapes = [tuple(dataset.records[int(index)]["shape"]) for index in batch.index]
    resize = resize_matrices(shapes, tuple(dataset.size), tuple(dataset.crop))
    return batch, shapes, evaluation.predict_batch(params, batch.images, resize)

  params = sharding.put_on_local_devices(params)
  ahead = loader.prefetch(iter(evaluation.batches(tuple(indices))), forward, 2)
  for batch, shapes, masks in ahead:
    preemption.check(_KEPT)
    masks = np.asarray(masks)
    for row in np.flatnonzero(batch.valid):
      yield int(batch.index[row]), masks[row][tuple(slice(n) for n in shapes[row])]


def native_masks(logits: jax.Array, resize: Sequence[jax.Array]) -> jax.Array:
  """Brings logits to the records' own grids and takes the argmax, on the device.

  Equal to the argmax of `geometry.to_native`, without bringing the logits to the host.

  Args:
    logits: f32[B, *size, C].
    resize: one f32[B, N, n] an axis of `size`, rows of zeros where the model saw nothing: there
      all logits are 0, and the argmax is the background.

  Returns:
    u8[B, *N].
  """

  def one(item):
    return jnp.argmax(on_own_grid(*item), axis=-1).astype(jnp.uint8)

  # One record at a time: a batch of volumes on their own grids would not fit.
  return jax.lax.map(one, (logits, tuple(resize)))


def on_own_grid(values: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
  """Logits f32[*size, C] of one record -> f32[*N, C], by one f32[N, n] an axis."""
  for axis, matrix in enumerate(matrices):
    values = jnp.tensordot(matrix, values, axes=(1, axis), precision="highest")
    values = jnp.moveaxis(values, 0, axis)
  return values


def is_seen(matrices: Sequence[jax.Array]) -> jax.Array:
  """bool[*N]: where the model saw the record, which is where no axis has a row of zeros."""
  seen = jnp.ones((), bool)
  for axis, matrix in enumerate(matrices):
    seen = seen[..., None] & jnp.any(matrix != 0, axis=1).reshape((1,) * axis + (-1,))
  return seen


def resize_matrices(shapes, size, crop) -> list[np.ndarray]:
  """For each axis f32[B, N, n], where N is `padded`."""
  matrices = []
  for axis, n in enumerate(size):
    largest = padded(max(shape[axis] for shape in shapes))
    stack = np.zeros((len(shapes), largest, n), np.float32)
    for row, shape in enumerate(shapes):
      stack[row, : shape[axis]] = _resize_matrix(n, shape[axis], crop[axis : axis + 1])
    matrices.append(stack)
  return matrices


def padded(length: int) -> int:
  """Rounded up, so that few programs are compiled."""
  return -(-length // _GRID_STEP) * _GRID_STEP


@functools.lru_cache(maxsize=256)
def _resize_matrix(size: int, native: int, crop: tuple[int, ...]) -> np.ndarray:
  """`geometry.to_native` along one axis as f32[native, size], read off the unit vectors."""
  # The class in front of them takes what `to_native` writes outside the crop.
  units = np.eye(size, size + 1, k=1, dtype=np.float32)
  return loader.to_native(units, (native,), crop)[:, 1:]
