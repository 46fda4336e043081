"""Records -> batches: loading, shuffling, sharing over processes, prefetching."""

from __future__ import annotations

import collections
import functools
import signal
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from rndpo_jax import types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data.geometry import to_native as to_native  # part of this module's interface

_ENDLESS = 2**62  # steps


def cached(load: Callable[[int], dict], max_bytes: int = 1 << 30) -> Callable[[int], dict]:
  """Wraps `load` to keep what it returns in memory, up to `max_bytes`; the rest is loaded again.

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
    ValueError: without items, or if process_count does not divide batch_size.
  """
  if not len(items):
    raise ValueError("stream: no items, expected at least one")
  return stream_of_rows(
    lambda number: load(shuffled(items, seed, number)),
    batch_size=batch_size,
    start_step=start_step,
    num_workers=num_workers,
    process_index=process_index,
    process_count=process_count,
  )


def stream_of_rows(
  draw: Callable[[int], dict], *, batch_size: int, start_step: int, num_workers: int,
  process_index: int = 0, process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
  """Endless batches; row r of batch t is draw(t * batch_size + r), of arrays of one shape.

  The other arguments are those of `stream`.
  """
  if batch_size % process_count:
    raise ValueError(f"stream: {process_count} processes do not divide batch_size={batch_size}")
  rows = batch_size // process_count
  first = rows * process_index

  def read(step: int) -> dict[str, np.ndarray]:
    start = step * batch_size + first
    examples = [draw(number) for number in range(start, start + rows)]
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


def shuffled(items: Sequence[int], seed: int, number: int, *more: int) -> int:
  """The item at a place, counted over all passes; every pass has its own order.

  Args:
    items: to go through.
    seed: of the order.
    number: the place.
    more: further numbers that the order is drawn from.
  """
  turn, place = divmod(number, len(items))
  return items[_order(seed, len(items), turn, *more)[place]]


@functools.lru_cache(maxsize=16)
def _order(seed: int, count: int, turn: int, *more: int) -> np.ndarray:
  """The order of one pass over the items. Grain's own shuffle takes 1.6 ms an item when there
  are few items, and gives seed 1 the order of seed 0 one pass later."""
  return np.random.default_rng([seed, turn, *more]).permutation(count)


def batches(
  dataset: dataset_lib.Dataset, indices: Sequence[int], *, batch_size: int, with_labels: bool,
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
    examples = [dataset_lib.load_example(dataset, i, with_labels=with_labels) for i in loaded]
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
