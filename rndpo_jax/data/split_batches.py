"""Batches of the labelled, the unlabelled and the validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from rndpo_jax import types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, native, patches, tiles
from rndpo_jax.runtime import sharding


def labelled_batches(
  config, dataset, mesh: Mesh, *, batch_size: int, seed: int
) -> Callable[[int], Iterator[dict]]:
  """Start step -> endless batches {"image", "label", "index"} of the labelled split, on device."""
  stream = stream_of_split(config, dataset, "labelled", batch_size)
  return lambda start_step: loader.prefetch(
    stream(seed, start_step), lambda batch: sharding.put_batch(batch, mesh), config.data.prefetch
  )


def stream_of_split(
  config, dataset, split: str, batch_size: int, whole: bool = False
) -> Callable[[int, int], Iterator[dict]]:
  """(seed, start step) -> batches of a split on the host: this process's rows, or the `whole` ones.

  The unlabelled split comes without "label". In the native mode rows are patches at random places;
  a third of those of the labelled split hold foreground.
  """
  if dataset.native is not None:
    return _stream_of_patches(config, tiles.whole(dataset), split, batch_size, whole)
  part = part_of_batches(whole)

  @loader.cached
  def load(index):
    with_labels = split != "unlabelled"
    example = dataset_lib.load_example(dataset, index, with_labels=with_labels)
    return {name: x for name, x in example.items() if with_labels or name != "label"}

  def stream(seed: int, start_step: int):
    return loader.stream(
      dataset.splits[split],
      load,
      batch_size=batch_size,
      seed=seed,
      start_step=start_step,
      num_workers=config.data.num_workers,
      **part,
    )

  return stream


def _stream_of_patches(
  config, dataset, split: str, batch_size: int, whole: bool
) -> Callable[[int, int], Iterator[dict]]:
  """`stream_of_split` in the native mode."""
  with_labels = split == "labelled"

  @loader.cached
  def load(index):
    return dataset_lib.load_on_spacing(dataset, index, with_labels=with_labels)

  items = [
    int(index) for index in dataset.splits[split] if native.is_seen(dataset.boxes[int(index)])
  ]
  forced = [i for i in items if len(patches.foreground(load(i)["label"]))] if with_labels else ()

  def stream(seed: int, start_step: int):
    draw = patches.drawer(
      items, load, dataset.size, batch_size=batch_size, seed=seed, with_foreground=forced
    )
    return loader.stream_of_rows(
      draw,
      batch_size=batch_size,
      start_step=start_step,
      num_workers=config.data.num_workers,
      **part_of_batches(whole),
    )

  return stream


def part_of_batches(whole: bool) -> dict[str, int]:
  """Which part of each batch this process takes, as `data.loader` wants to be told."""
  if whole:
    return {"process_index": 0, "process_count": 1}
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def validation_batches(config, dataset, whole: bool = False) -> Callable[[], Iterator[types.Batch]]:
  """() -> labelled batches of the validation split on the host: this process's rows, or `whole`."""
  part = part_of_batches(whole)
  dataset = tiles.view(dataset)
  # Rounded up to what the devices can share: the last batch is padded in any case.
  parts = jax.device_count() // config.mesh.space
  batch_size = -(-config.evaluate.batch_size // parts) * parts
  return lambda: loader.batches(
    dataset,
    dataset.splits["val"],
    batch_size=batch_size,
    with_labels=True,
    **part,
  )
