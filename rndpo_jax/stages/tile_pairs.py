"""Pairs of whole images cut into the tiles of `tiles.view`, by which fine-tuning goes.

A tile has the pairs that differ in it, with the base's margin on the tile as a forward pass of
fine-tuning sees it, |D_t| in the tile and |D| of the image; scores are those of the image.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rndpo_jax import config as config_lib
from rndpo_jax import losses, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import given_pairs
from rndpo_jax.pairs import manifest, shards
from rndpo_jax.runtime import preemption, sharding

_KEPT = "mine: finished shards are kept"


def of_measuring(
  config, dataset, outputs: Mapping[str, Iterable]
) -> tuple[dict[str, Iterable], Callable]:
  """Outputs of measuring without their masks, and what gives those of validation by tiles.

  Args:
    config: the whole config.
    dataset: by tiles.
    outputs: of each split, (batch, output) of an image each.

  Returns:
    (outputs, function of `measure_judges.write_reliability`).
  """
  kept: dict[int, np.ndarray] = {}
  without = {split: _without_masks(dataset, own, kept) for split, own in outputs.items()}
  return without, functools.partial(_of_validation, config, dataset, kept)


def _without_masks(dataset, outputs: Iterable, kept: dict[int, np.ndarray]) -> Iterator:
  """The masks go to `kept`: record -> u8[T, K, bits, bytes] of its T tiles."""
  for batch, out in outputs:
    out, index = dict(out), int(batch.index[0])
    masks = bit_planes.unpack(out.pop("packed")[0], batch.inside.shape[1:], dataset.num_classes)
    masks = np.asarray(masks)
    kept[index] = np.stack(
      [
        bit_planes.pack(_cut(dataset, tile, masks), dataset.num_classes, dataset.spatial_dims)
        for tile in _tiles_of(dataset, index)
      ]
    )
    yield batch, out


def _of_validation(
  config, dataset, kept: dict[int, np.ndarray], indices, truth: np.ndarray, mined: types.Pairs
) -> tuple[np.ndarray, np.ndarray, np.ndarray, types.Pairs, np.ndarray]:
  """What `validation_pairs.write` takes, by tiles: with the image's truth and |D| in the tile."""
  owns = [_tiles_of(dataset, int(index)) for index in indices]
  row = np.repeat(np.arange(len(indices)), [len(own) for own in owns])
  if not owns:  # no validation cases: a labelled one says what its rows would be like
    return indices, next(iter(kept.values()))[:0], truth, mined, mined.region_size
  masks = np.concatenate([kept[int(index)] for index in indices])
  mined = types.Pairs(*(field[row] for field in mined))
  place = np.arange(len(row))[:, None]
  sizes = []
  for start in range(0, len(row), 64):
    part = slice(start, start + 64)
    chosen, rejected = (
      bit_planes.unpack(masks[place[part], own[part]], dataset.size, dataset.num_classes)
      for own in (mined.chosen, mined.rejected)
    )
    classes = config_lib.region_classes(config)
    dims = dataset.spatial_dims
    sizes.append(losses.region_size(chosen, rejected, spatial_dims=dims, classes=classes))
  size = np.where(mined.valid, np.concatenate(sizes), 0)
  of_image, mined = mined.region_size, mined._replace(region_size=size, valid=size > 0)
  return np.concatenate(owns), masks, truth[row], mined, of_image


def examples(dataset, outputs: Iterable) -> Iterator:
  """Outputs of mining cut to one tile each, in which the first pair differs most."""
  for batch, out in outputs:
    index, masks = int(batch.index[0]), out["masks"][0]
    pairs = types.Pairs(*(field[0] for field in out["pairs"]))
    differs = masks[pairs.chosen[0]] != masks[pairs.rejected[0]]
    own = _tiles_of(dataset, index)
    tile = max(own, key=lambda tile: _cut(dataset, tile, differs[None]).sum())
    image = dataset_lib.load_example(dataset, int(tile), with_labels=False)["image"]
    yield batch._replace(images=image[None]), {**out, "masks": _cut(dataset, tile, masks)[None]}


def write(config, dataset, program: Callable, path, records: Sequence[int], mined: Callable):
  """Writes a shard: the tiles of some records in which pairs of them differ.

  Args:
    config: the whole config.
    dataset: by tiles.
    program: of `given_pairs.make_batch`, on all local devices.
    path: of the shard.
    records: indices.
    mined: records -> (batch, output of the mining program) of an image each.
  """
  size = config.mine.batch_size * jax.local_device_count()
  count = int(np.isin(dataset.tiles.record, records).sum())
  found = _outputs(dataset, program, size, mined(records))
  manifest.write(path, len(records), -(-count // size), found)


def _outputs(dataset, program: Callable, size: int, images: Iterable) -> Iterator:
  """(Rows, what `manifest.write` takes of them) of `size` tiles a batch."""
  rows = itertools.chain.from_iterable(_rows(dataset, *one) for one in images)

  def start(batch):
    preemption.check(_KEPT)
    count = len(batch)
    batch = batch + batch[-1:] * (size - count)
    own, more = (jax.tree.map(lambda *xs: np.stack(xs), *part) for part in zip(*batch, strict=True))
    own = own._replace(valid=np.arange(size) < count)
    return own, more, program(jax.random.key(0), sharding.split_over_local_devices(own))

  batches = iter(lambda: list(itertools.islice(rows, size)), [])
  for own, more, out in loader.prefetch(batches, start, depth=1):
    yield own, _with_image(sharding.join_local_devices(out), more)


def _rows(dataset, batch: types.Batch, out: dict[str, Any]) -> Iterator:
  """(given_pairs.Rows, what else is known of the image) of tiles; the first one always."""
  index, masks = int(batch.index[0]), out["masks"][0]
  pairs = types.Pairs(*(field[0] for field in out["pairs"]))
  chosen, rejected = masks[pairs.chosen], masks[pairs.rejected]
  differs = (chosen != rejected) & pairs.valid.reshape(-1, *(1,) * (masks.ndim - 1))
  dropped = pairs.dropped
  for number, tile in enumerate(_tiles_of(dataset, index)):
    if number and not _cut(dataset, tile, differs).any():
      continue
    image = dataset_lib.load_example(dataset, int(tile), with_labels=False)["image"]
    cuts = (_cut(dataset, tile, chosen), _cut(dataset, tile, rejected))
    own = given_pairs.Rows(np.int32(tile), image, *cuts, pairs.valid, np.bool_(True))
    more = {"score_gap": pairs.score_gap, "region_size": pairs.region_size, "dropped": dropped}
    if shards.CONSENSUS in out:
      mean = np.moveaxis(_cut(dataset, tile, np.moveaxis(out[shards.CONSENSUS][0], -1, 0)), 0, -1)
      mean[..., 0] = np.where(mean.any(axis=-1), mean[..., 0], 255)  # beyond the image
      more[shards.CONSENSUS] = mean
    if shards.TOP_SCORE in out:
      more[shards.TOP_SCORE] = out[shards.TOP_SCORE][0]
    yield own, more
    dropped = np.zeros_like(dropped)  # counted once an image


def _with_image(out: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
  """The margins of tiles beside the scores and sizes of their images."""
  pairs = out["pairs"]
  size, gap = (np.where(pairs.valid, more[name], 0) for name in ("region_size", "score_gap"))
  sizes = np.stack([pairs.region_size, size], axis=1).astype(np.float32)
  pairs = pairs._replace(region_size=size, score_gap=gap, dropped=more["dropped"])
  extra = {name: more[name] for name in (shards.CONSENSUS, shards.TOP_SCORE) if name in more}
  return {**out, **extra, "pairs": pairs, shards.REGION_SIZES: sizes}


def _tiles_of(dataset, record: int) -> np.ndarray:
  """Indices of a record's tiles, i64[T]; tiles are in the order of records."""
  return np.arange(*np.searchsorted(dataset.tiles.record, [record, record + 1]))


def _cut(dataset, tile: int, arrays: np.ndarray) -> np.ndarray:
  """A tile [n, *size] of [n, *S], zeros beyond; what pads S is zero too."""
  return np.stack([dataset.tiles.cut(int(tile), array) for array in arrays])
