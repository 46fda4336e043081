"""Prepared records -> batches: opening, loading, shuffling, sharding, prefetching."""

from __future__ import annotations

import collections
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.data import geometry, reader, records, splits
from rndpo_jax.data.geometry import to_native as to_native  # part of this module's interface

_ENDLESS = 2**62  # steps


class Dataset(NamedTuple):
  """A prepared data set, open for random access.

  Attributes:
    source: records with their masks; `blind_source` the same, masks never decoded.
    num_classes: C, background among them.
    class_names: one a class, background first.
    num_channels: I.
    spatial_dims: 2 or 3.
    spacing_unit: 'mm', or 'voxel' where the spacing is unknown.
    records: entries of `records.json`; their positions are the record indices used everywhere.
    digest: SHA-256 of the records, their pixels and the splits.
    splits: name -> sorted i64 record indices.
    size: the model's grid.
    crop: centre crop in source pixels, () for none.
    normalization: 'zscore' or 'minmax'.
  """

  source: Any
  blind_source: Any
  name: str
  num_classes: int
  class_names: list[str]
  num_channels: int
  spatial_dims: int
  spacing_unit: str
  records: Sequence[dict[str, Any]]
  digest: str
  splits: dict[str, np.ndarray]
  size: tuple[int, ...]
  crop: tuple[int, ...]
  normalization: str


def open_dataset(config, workdir: epath.PathLike) -> Dataset:
  """Opens what the stage 'prepare' wrote, here or in `config.base.workdir`.

  Raises:
    records.DataError: where a file is missing or damaged; names it and the remedy.
  """
  workdir = epath.Path(config.base.workdir or workdir)
  directory = workdir / "data"
  content = records.read(directory)
  source = reader.open_source(directory, with_labels=True)
  if len(source) != len(content["records"]):
    raise errors.DataError(
      f"{directory}: {len(source)} records stored, {len(content['records'])} listed in "
      f"{records.FILE}; remove {directory} and run the stage 'prepare' again"
    )
  case_ids = splits.read(workdir)
  if splits.sha256(case_ids) != content.pop("splits_sha256"):
    raise errors.DataError(
      f"{workdir / splits.FILE} is not what the stage 'prepare' wrote: a case that was trained on "
      f"might be tested. Bring it back, or remove {directory / records.FILE} and run the stage "
      "'prepare' again (config.data.split_file takes splits of your own)"
    )
  cases, case_of = np.unique(content["records"].ids("case_id"), return_inverse=True)
  parts = {}
  for name, ids in case_ids.items():
    wanted = np.array([case.encode() for case in ids], np.bytes_)
    chosen = np.zeros(len(cases), bool)
    chosen[np.searchsorted(cases, wanted)] = True
    parts[name] = np.flatnonzero(chosen[case_of])
  return Dataset(
    source=source,
    blind_source=reader.open_source(directory, with_labels=False),
    splits=parts,
    size=tuple(config.data.size),
    crop=tuple(config.data.crop),
    normalization=config.data.normalization,
    **content,
  )


def load_native(dataset: Dataset, index: int, *, with_labels: bool) -> dict[str, Any]:
  """One record on its own grid.

  Args:
    dataset: from `open_dataset`.
    index: of the record.
    with_labels: False leaves the mask's bytes undecoded.

  Returns:
    image uint8 or float32 [*S, I]; label u8[*S] or None; spacing, one mm an axis, or None;
    affine f32[4, 4], voxel indices to world, the identity where unknown.

  Raises:
    records.DataError: where labels are asked of a record without mask.
  """
  entry = dataset.records[index]
  if with_labels and not entry["has_mask"]:
    raise errors.DataError(
      f"{entry['record_id']}: it has no mask, but a label is asked for; only judges that need no "
      "truth can work on it"
    )
  example = (dataset.source if with_labels else dataset.blind_source)[int(index)]
  return {
    "image": example["image"],
    "label": example["mask"] if with_labels else None,
    "spacing": None if entry["spacing"] is None else tuple(entry["spacing"]),
    "affine": example["affine"],
  }


def load_example(dataset: Dataset, index: int, *, with_labels: bool) -> dict[str, np.ndarray]:
  """One record on the model's grid.

  Returns:
    image f32[*size, I] normalised; label u8[*size], zeros without labels; index i32[].

  Raises:
    records.DataError: as `load_native`.
  """
  native = load_native(dataset, index, with_labels=with_labels)
  image = geometry.image_to_model(native["image"], dataset.size, dataset.crop)
  if with_labels:
    label = geometry.mask_to_model(native["label"], dataset.size, dataset.crop)
  else:
    label = np.zeros(dataset.size, np.uint8)
  return {
    "image": geometry.normalize(image, dataset.normalization),
    "label": label,
    "index": np.int32(index),
  }


def cached(load: Callable[[int], dict], max_bytes: int = 1 << 30) -> Callable[[int], dict]:
  """Wraps `load` to keep what it returns in memory, up to `max_bytes`; the rest is loaded anew.

  The dictionaries are shared between calls: callers must not write into them.
  """
  kept: dict[int, dict] = {}
  used = 0

  def load_or_keep(item: int) -> dict:
    nonlocal used  # not locked, for locks do not pickle: at worst threads count an item twice
    item = int(item)
    if item in kept:
      return kept[item]
    example = load(item)
    size = sum(np.asarray(value).nbytes for value in example.values())
    if used + size <= max_bytes:
      kept[item] = example
      used += size
    return example

  return load_or_keep


def stream(
  items: Sequence[int], load: Callable[[int], dict], *, batch_size: int, seed: int,
  start_step: int, num_workers: int, process_index: int = 0, process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
  """Endless shuffled batches; global batch t is a pure function of (items, seed, t).

  Every pass over the items has its own order; a batch may span two passes. Row r of batch t
  is the same for any number of processes and workers, so resuming is setting `start_step`.

  Args:
    items: whatever `load` takes, such as record indices.
    load: item -> dictionary of arrays, the same shapes for every item.
    batch_size: of the global batch.
    seed: of the order.
    start_step: t of the first batch.
    num_workers: processes that load; 0 loads in threads of this one. Workers need `load` to
      be picklable by cloudpickle, and absl flags parsed before.
    process_index: whose contiguous rows to yield, of `process_count`.

  Yields:
    Dictionaries of arrays with leading axis batch_size // process_count.

  Raises:
    ValueError: without items, or where process_count does not divide batch_size.
  """
  if not len(items):
    raise ValueError("stream: no items, expected at least one")
  if batch_size % process_count:
    raise ValueError(f"stream: {process_count} processes do not divide batch_size={batch_size}")
  rows = batch_size // process_count
  first = rows * process_index

  def read(step: int) -> dict[str, np.ndarray]:
    start = step * batch_size + first
    passes = [divmod(row, len(items)) for row in range(start, start + rows)]
    examples = [load(items[_order(seed, len(items), turn)[place]]) for turn, place in passes]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

  return _loaded_ahead(grain.MapDataset.range(start_step, _ENDLESS).map(read), num_workers)


def _loaded_ahead(dataset: grain.MapDataset, num_workers: int) -> Iterator:
  """Goes through `dataset`, the next elements being loaded by threads or worker processes."""
  loaded = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  if num_workers:
    options = grain.MultiprocessingOptions(num_workers=num_workers)
    loaded = loaded.mp_prefetch(options, worker_init_fn=_leave_signals_to_parent)
  return iter(loaded)


def _leave_signals_to_parent(*_) -> None:
  """The parent ends its workers, also after a signal to them all, as of Ctrl-C or from Slurm."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)


@functools.lru_cache(maxsize=16)
def _order(seed: int, count: int, turn: int) -> np.ndarray:
  """The order of one pass over the items. Grain's own shuffle takes 1.6 ms an item when there
  are few items, and gives seed 1 the order of seed 0 one pass later."""
  return np.random.default_rng([seed, turn]).permutation(count)


def batches(
  dataset: Dataset, indices: Sequence[int], *, batch_size: int, with_labels: bool,
  num_workers: int = 0, process_index: int = 0, process_count: int = 1,
) -> Iterator[types.Batch]:  # fmt: skip
  """Every record of `indices` once, in order; the last batch is padded.

  The next batches are loaded while one is used.

  Args:
    dataset: from `open_dataset`.
    indices: of records.
    batch_size: of the global batch; process_count divides it.
    with_labels: whether the masks are read.
    num_workers: as in `stream`.
    process_index: whose contiguous rows to yield, of `process_count`.

  Yields:
    types.Batch of numpy arrays, always batch_size // process_count rows, `valid` False on the
    padding. Every process yields as many batches.
  """
  rows = batch_size // process_count

  def read(start: int) -> types.Batch:
    first = start + rows * process_index
    chosen = [int(i) for i in indices[first : first + rows]]
    padding = rows - len(chosen)
    # A process without a record left pads with the last of all.
    loaded = chosen or [int(indices[-1])]
    examples = [load_example(dataset, i, with_labels=with_labels) for i in loaded]
    examples = (examples + examples[-1:] * padding)[:rows]
    return types.Batch(
      images=np.stack([example["image"] for example in examples]),
      labels=np.stack([example["label"] for example in examples]),
      index=np.stack([example["index"] for example in examples]),
      valid=np.arange(rows) < len(chosen),
    )

  if len(indices):
    yield from _loaded_ahead(
      grain.MapDataset.range(0, len(indices), batch_size).map(read), num_workers
    )


def prefetch(iterator: Iterator, put: Callable, depth: int) -> Iterator:
  """Yields `put(item)` for each item, `depth` of them started ahead.

  `put` moves an item to the devices and returns at once (as `jax.device_put` does), so the
  transfer runs while the step before computes. A depth of 0 puts each when it is asked for.
  """
  queue = collections.deque()
  for item in iterator:
    queue.append(put(item))
    if len(queue) > depth:
      yield queue.popleft()
  yield from queue
