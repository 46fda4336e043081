"""Mining by whole images in the native mode (`config.mine.whole_images`).

The network sees tiles that overlap by half; their logits are put together as evaluation does, for
each entry of the mix that has views or dropout of its own. All that is drawn for an image comes
from the key of its record, so that a proposal is the same over all tiles; noise, thresholds and
edits of masks act on the whole. Judge and rule see the whole image, padded to whole patches.

Fine-tuning goes by tiles, into which `tile_pairs` cuts the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import errors, seeds, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, native, tiles
from rndpo_jax.evaluation import sliding_window
from rndpo_jax.mining import network_logits, overlap, proposals
from rndpo_jax.mining.program import make_network, with_keys
from rndpo_jax.runtime import preemption, sharding

_KEPT = "mine: finished shards are kept"


def images(dataset: dataset_lib.Dataset) -> dataset_lib.Dataset:
  """The data set by records, without those of which the model sees nothing.

  Args:
    dataset: of the native mode, by records or by tiles.
  """
  whole = tiles.whole(dataset)
  seen = np.array([native.is_seen(box) for box in whole.boxes], bool)
  return whole._replace(splits={name: i[seen[i]] for name, i in whole.splits.items()})


def on_one_device(function: Callable, weights) -> Callable:
  """As `mine.on_local_devices`, on the first of them: of arrays [1, 1, ...].

  It is compiled for each padded shape of an image.
  """
  compiled = jax.jit(with_keys(function))
  placed = jax.device_put(weights, jax.local_devices()[0])

  def program(key, batch):
    out = compiled(placed, key, jax.tree.map(lambda x: x[0], batch))
    return jax.tree.map(lambda x: np.asarray(x)[None], out)

  return program


def make_run(config, dataset: dataset_lib.Dataset, weights) -> Callable[..., Iterator]:
  """What goes through images as `mine.run_batches` does; compiles nothing yet.

  Args:
    config: the whole config.
    dataset: from `images`.
    weights: from `mine.make_scorer`.

  Returns:
    (indices, program, with_labels, stays, load_files) -> (batch, output) of one image each.
  """
  network = {name: weights[name] for name in ("policy", "ensemble")}
  network = sharding.put_on_local_devices(network)
  window = sliding_window.make(
    _make_apply(config, dataset),
    dataset.size,
    batch_size=config.mine.batch_size * jax.local_device_count(),
  )
  key = seeds.mining_key(config.seed)

  def run(
    indices: Sequence[int], program: Callable, with_labels: bool, stays: tuple[str, ...] = (),
    load_files: Callable[[int], types.FileProposals] | None = None,
  ) -> Iterator:  # fmt: skip
    def start(index):
      preemption.check(_KEPT)
      example = dataset_lib.load_on_spacing(dataset, int(index), with_labels=with_labels)
      _check_pixels(dataset, int(index), example["image"].shape[:-1])
      own = jax.random.split(jax.random.fold_in(key, int(index)), 3)[0]
      logits = sliding_window.predict(window, {"weights": network, "key": own}, example["image"])
      files = load_files and load_files(int(index))
      batch = jax.tree.map(lambda x: x[None], _padded(config, dataset, example, logits, files))
      out = program(key, jax.tree.map(lambda x: x[None], batch))
      return batch, {name: value for name, value in out.items() if name not in stays}

    for batch, out in loader.prefetch(iter(indices), start, depth=1):
      yield batch._replace(network=None), sharding.join_local_devices(out)

  return run


def _make_apply(config, dataset) -> Callable:
  """({"weights", "key"}, tiles f32[B, *size, I]) -> all logits of the mix, f32[B, *size, N C]."""
  network_of = make_network(config, dataset)

  def apply(whole, images):
    keys = jnp.broadcast_to(whole["key"], (len(images),))
    found = network_of(whole["weights"], keys, images)
    parts = [found.base[:, None], *(x for x in (*found.entries, found.members) if x is not None)]
    logits = jnp.moveaxis(jnp.concatenate(parts, axis=1).astype(jnp.float32), 1, -2)
    return logits.reshape(*logits.shape[:-2], -1)

  return apply


def _check_pixels(dataset, index: int, shape: Sequence[int]) -> None:
  pixels = math.prod(_padded_shape(shape, dataset.size))
  if pixels > overlap.MAX_PIXELS:
    raise errors.MiningError(
      f"config.mine.whole_images: {dataset.records[index]['record_id']} has {pixels:,} pixels on "
      f"the model's spacing, padded to whole patches; at most {overlap.MAX_PIXELS:,} can be "
      "counted: set it to False, or take a coarser config.data.spacing"
    )


def _padded_shape(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
  """The next multiples of the patch: few shapes, so that little is compiled."""
  return tuple(-(-n // p) * p for n, p in zip(shape, size, strict=True))


def _padded(config, dataset, example, logits: np.ndarray, files) -> types.Batch:
  """One image for the mining program, without a leading axis."""
  shape = example["image"].shape[:-1]
  ends = [(0, m - n) for n, m in zip(shape, _padded_shape(shape, dataset.size), strict=True)]

  def pad(array, lead: int = 0, value=0):
    rest = array.ndim - lead - len(ends)
    return np.pad(array, [(0, 0)] * lead + ends + [(0, 0)] * rest, constant_values=value)

  label = example.get("label")
  label = np.zeros(shape, np.uint8) if label is None else label
  if files is not None:
    files = files._replace(masks=pad(files.masks, 1))
  logits = np.moveaxis(logits.reshape(*shape, -1, dataset.num_classes), -2, 0)
  return types.Batch(
    images=pad(example["image"]),
    labels=pad(label, value=types.IGNORED),
    index=example["index"],
    valid=np.bool_(True),
    files=files,
    network=_apart(config, pad(logits, 1)),
    inside=pad(np.ones(shape, bool)),
  )


def _apart(config, logits: np.ndarray) -> types.NetworkLogits:
  """The parts of [N, *S, C] in the order in which `_make_apply` joins them."""
  entries, place = [], 1
  for atoms, count in proposals.parse_mix(config.proposals.mix):
    own = bool(network_logits.RUN_AGAIN & set(atoms))
    entries.append(logits[place : place + count] if own else None)
    place += count * own
  members = logits[place:] if place < len(logits) else None
  return types.NetworkLogits(logits[0], tuple(entries), members)
