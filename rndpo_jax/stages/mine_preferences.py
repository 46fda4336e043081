"""Stage `mine` where pairs are readers' preferences: no proposals, no judge, no rule, no gate.

The pairs of `config.data.preferences` get reference margins of the base and are written as mined
ones are. A volume whose slices are records gives a pair a slice in which its two masks differ; in
the native mode every tile in which they do has one.
"""

from __future__ import annotations

import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import errors, provenance, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, mask_files, preference_file, tiles
from rndpo_jax.evaluation import validation_pairs
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import given_pairs, reliability
from rndpo_jax.pairs import manifest, shards
from rndpo_jax.runtime import files, multihost, preemption, progress, sharding, threads
from rndpo_jax.stages import examples, mine, phases

_KEPT = "mine: finished shards are kept"


def run(config, workdir: os.PathLike, folder: os.PathLike | None = None) -> None:
  """Writes `pairs/` from `config.data.preferences`, as `stages.mine.run` does from proposals.

  `config.mine.pairs_per_image` is the number of slots of a record: an image with more pairs has
  several records.

  Raises:
    errors.DataError: with file and line, on preferences that cannot be used.
    errors.MiningError: if no two masks differ on the model's grid.
  """
  directory = epath.Path(workdir if folder is None else folder) / "pairs"
  directory.mkdir(parents=True, exist_ok=True)
  whole = dataset_lib.open_dataset(config, workdir)
  dataset = tiles.view(whole)
  shards.check_num_shards(config, len(dataset.splits["unlabelled"]))
  found, grids = preference_file.read(config, whole.records, _split_of(whole))
  with preemption.together(_KEPT):
    affine_of = dataset_lib.affine_of(dataset)
    preference_file.check(found, grids, dataset.num_classes, affine_of)
  params = phases.start(config, workdir, dataset)
  fingerprints = provenance.of_finetuning(dataset, params)
  shards.claim(directory, {**fingerprints, "preferences": preference_file.fingerprint(found)})
  items = items_of(found, dataset, config.mine.pairs_per_image)
  program = mine.on_local_devices(given_pairs.make_batch(config, dataset), {"policy": params})
  batches = functools.partial(_batches, config, dataset, found, grids)
  if multihost.is_first():
    progress.say(
      f"{len(found)} preferences of {len({item.image for item in found})} images are the pairs: "
      "no judge scores them, and the gate is off"
    )
    _write_unjudged(config, directory, dataset)
    if items and not (directory / "examples.npz").exists():
      _write_examples(directory / "examples.npz", dataset, batches(_some(items), None))
  with preemption.together(_KEPT):
    for shard, part in enumerate(_split(items, config.mine.num_shards)):
      path = shards.shard_path(directory, shard, config.mine.num_shards)
      if shard % jax.process_count() == jax.process_index() and not manifest.is_finished(path):
        size = config.mine.batch_size * jax.local_device_count()
        manifest.write(path, len(part), -(-len(part) // size), batches(part, program))
  if multihost.is_first():
    _write_manifest(config, directory, len(found))


def check_same_files(config, workdir: os.PathLike) -> None:
  """Refuses finished pairs of a job whose preferences have changed since.

  A file of preferences that is gone has done its work.

  Raises:
    errors.ProvenanceError: with what to delete.
    errors.DataError: as `run` does, on preferences that cannot be used.
  """
  if not pathlib.Path(config.data.preferences).expanduser().exists():
    return
  dataset = dataset_lib.open_dataset(config, workdir)
  found, _ = preference_file.read(config, dataset.records, _split_of(dataset))
  here = preference_file.fingerprint(found)
  shards.check_same_files(epath.Path(workdir) / "pairs", "preferences", here)


def _split_of(dataset) -> dict[str, str]:
  return {
    dataset.records[int(index)]["case_id"]: split
    for split, indices in dataset.splits.items()
    for index in indices
  }


def items_of(
  preferences: Sequence[preference_file.Preference], dataset, num_slots: int
) -> list[tuple[int, tuple[int, ...]]]:
  """(index of a record or tile, places of its preferences, at most `num_slots`), by rising index.

  Args:
    preferences: the lines.
    dataset: by records or by tiles.
    num_slots: see above.
  """
  of_image: dict[str, list[int]] = {}
  for place, item in enumerate(preferences):
    of_image.setdefault(item.image, []).append(place)
  entries = tiles.whole(dataset).records
  of_record = {
    record: places
    for record, entry in enumerate(entries)
    if (places := of_image.get(mask_files.image_id(entry)))
  }
  return [
    (index, tuple(places[start : start + num_slots]))
    for index in range(len(dataset.records))
    if (places := of_record.get(tiles.record_of(dataset, index)))
    for start in range(0, len(places), num_slots)
  ]


def _split(items: list, count: int) -> list[list]:
  return [[items[i] for i in part] for part in np.array_split(np.arange(len(items)), count)]


def _batches(config, dataset, preferences, grids, items, program: Callable | None) -> Iterator:
  """(Rows, output of the program as numpy arrays) over items; without a program, no output."""
  slots, affine_of = config.mine.pairs_per_image, dataset_lib.affine_of(tiles.whole(dataset))

  @functools.lru_cache(maxsize=4)  # a record's masks, for its tiles
  def on_grid(place: int, record: int) -> list[np.ndarray]:
    return [mask_files.on_grid(mask, dataset, record) for mask in read(place)]

  @functools.lru_cache(maxsize=4)  # a volume's masks, for its slices
  def read(place: int) -> tuple[np.ndarray, np.ndarray]:
    item = preferences[place]
    chosen, rejected = (
      mask_files.read(path, grids[item.image], dataset.num_classes, affine_of)
      for path in (item.chosen, item.rejected)
    )
    return chosen, rejected

  def load(item: tuple[int, tuple[int, ...]], valid: bool) -> given_pairs.Rows:
    index, places = item
    record = tiles.record_of(dataset, index)
    masks = np.zeros((2, slots, *dataset.size), np.uint8)
    for slot, place in enumerate(places):
      for side, mask in enumerate(on_grid(place, record)):
        masks[side, slot] = tiles.part_of(dataset, index, mask)
    image = dataset_lib.load_example(dataset, index, with_labels=False)["image"]
    given = np.arange(slots) < len(places)
    return given_pairs.Rows(np.int32(index), image, *masks, given, np.bool_(valid))

  # Each device's share is the config's, so that its program does not depend on their number.
  size = config.mine.batch_size * jax.local_device_count()

  def load_batch(start: int) -> given_pairs.Rows:
    own = items[start : start + size]
    own = [(item, True) for item in own] + [(own[-1], False)] * (size - len(own))
    return given_pairs.Rows(
      *(np.stack(arrays) for arrays in zip(*(load(*x) for x in own), strict=True))
    )

  def begin(rows: given_pairs.Rows):
    preemption.check(_KEPT)
    return rows, program and program(jax.random.key(0), sharding.split_over_local_devices(rows))

  loaded = threads.in_order(load_batch, range(0, len(items), size), count=1)
  for rows, out in loader.prefetch(loaded, begin, depth=1):
    yield rows, sharding.join_local_devices(out)


def _some(items: list) -> list:
  count = min(examples.COUNT, len(items))
  places = np.linspace(0, len(items) - 1, count).round().astype(int)
  return [items[place] for place in places]


def _write_unjudged(config, directory: epath.Path, dataset) -> None:
  """`judges.json`, `proposals.json` and `validation.npz` that say that nothing was judged."""
  empty = np.zeros((0, 2))
  measured = reliability.reliability(empty, empty, [], num_bootstrap=1, seed=0)
  nothing = np.zeros((0, config.mine.pairs_per_image))
  places = nothing.astype(np.int32)
  mined = reliability.mined(empty, places, places, nothing, [], num_bootstrap=1, seed=0)
  entry = {**measured, "split": "val", "labelled": measured, "mined": mined, "used": True}
  unknown = dict.fromkeys(("diversity", "base_dice", "mean_dice", "best_dice"))
  files.write_json(directory / "proposals.json", {"split": "val", **unknown})
  packed = jax.eval_shape(
    lambda masks: bit_planes.pack(masks, dataset.num_classes, dataset.spatial_dims),
    jax.ShapeDtypeStruct((1, 2, *dataset.size), jnp.uint8),
  )
  validation_pairs.write(
    directory / validation_pairs.FILE,
    np.zeros(0, np.int32),
    np.zeros((0, *packed.shape[1:]), packed.dtype),
    empty.astype(np.float32),
    types.Pairs(places, places, nothing.astype(np.float32), places, nothing > 0, places),
  )
  files.write_json(directory / "judges.json", {preference_file.NAME: entry})


def _write_examples(path: epath.Path, dataset, batches: Iterator) -> None:
  """The first pair of some records, as `examples.write` writes proposals."""
  parts: list[dict[str, Any]] = []
  for rows, _ in batches:
    for row in np.flatnonzero(rows.valid):
      parts.append(
        {
          "image": rows.images[row],
          "masks": np.stack([rows.chosen[row, 0], rows.rejected[row, 0]]),
          "scores": np.full(2, np.nan, np.float32),
          "chosen": np.int32(0),
          "rejected": np.int32(1),
          "record_id": np.array(dataset.records[int(rows.index[row])]["record_id"]),
        }
      )
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **{name: np.stack([x[name] for x in parts]) for name in parts[0]})
  files.write_bytes(path, buffer.getvalue())


def _write_manifest(config, directory: epath.Path, num_preferences: int) -> None:
  paths = [
    shards.summary_path(shards.shard_path(directory, shard, config.mine.num_shards))
    for shard in range(config.mine.num_shards)
  ]
  if not sum(files.read_json(path)["num_pairs"] for path in paths):
    raise errors.MiningError(
      f"{config.data.preferences}: the masks of none of {num_preferences} lines differ on the "
      "model's grid; take a finer one (config.data.size or config.data.spacing), another "
      "config.data.crop, or other masks"
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.mine.rule = config.judge.name = config.proposals.mix = preference_file.NAME
  manifest.write_manifest(config, directory)
