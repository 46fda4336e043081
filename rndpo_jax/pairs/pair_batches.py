"""What fine-tuning reads: images with their mined pairs, labelled and unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax import seeds, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import geometry, loader, split_batches, tiles
from rndpo_jax.errors import ConfigError
from rndpo_jax.losses import objectives
from rndpo_jax.mining import judge_gate, pair_value
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files, sharding
from rndpo_jax.training import image_terms


def on_devices(
  config, directory, dataset, mesh: Mesh
) -> Callable[[int], Iterator[types.FinetuneBatch]]:
  """Start step -> endless batches."""
  stream = stream_of(config, directory, dataset)
  return lambda start_step: loader.prefetch(
    stream(config.seed, start_step),
    lambda batch: sharding.put_batch(batch, mesh),
    config.data.prefetch,
  )


def stream_of(
  config, directory, dataset, whole: bool = False
) -> Callable[[int, int], Iterator[types.FinetuneBatch]]:
  """(seed, start step) -> endless batches on the host: this process's rows, or the `whole` ones.

  Args:
    config: the whole config; the terms of fine-tuning say which parts a batch has.
    directory: `pairs/`.
    dataset: the prepared data.
    whole: see above.
  """
  read = image_terms.reads_of(config)
  options = config.finetune
  # Name -> (stream, its order).
  parts = {}
  if "pairs" in read:
    pairs = _pairs_of(config, directory, tiles.view(dataset), whole)
    parts["pairs"] = (pairs, seeds.pairs_order)
  if "labelled" in read:
    stream = split_batches.stream_of_split(
      config, dataset, "labelled", options.labelled_batch_size, whole
    )
    parts["labelled"] = (stream, seeds.labelled_order)
  if "unlabelled" in read:
    stream = split_batches.stream_of_split(
      config, dataset, "unlabelled", options.unlabelled_batch_size, whole
    )
    parts["unlabelled"] = (stream, seeds.unlabelled_order)

  def together(seed: int, start_step: int):
    streams = [stream(order(seed), start_step) for stream, order in parts.values()]
    for batches in zip(*streams, strict=True):
      yield types.FinetuneBatch(**dict(zip(parts, batches, strict=True)))

  return together


def _pairs_of(
  config, directory, dataset, whole: bool
) -> Callable[[int, int], Iterator[types.PairBatch]]:
  """(order, start step) -> endless batches of images with pairs."""
  part = split_batches.part_of_batches(whole)
  directory = epath.Path(directory)
  table = shards.read(directory)
  weigh = weights_by_gap(config, directory)
  smooth = smoothing_by_gap(config, directory)
  volume = voxel_volumes(config, dataset)
  optional = {
    shards.CONSENSUS: config.finetune.terms.consensus.weight > 0,
    shards.TOP_SCORE: config_lib.weighs_images(config),
  }

  @loader.cached
  def load(row: int) -> dict:
    record = table[row]
    more = {name: record[name] for name, is_read in optional.items() if is_read}
    if smooth is not None:
      more["smoothing"] = smooth(record["score_gap"]).astype(np.float32)
    index = int(record["index"])
    share = 1.0
    if config.mine.whole_images:
      share = tile_weights(config, record[shards.REGION_SIZES], volume(index))
    return {
      "images": dataset_lib.load_example(dataset, index, with_labels=False)["image"],
      **{name: record[name] for name in shards.TRAINING_FIELDS},
      **more,
      "weight": (record["valid"] * weigh(record["score_gap"]) * share).astype(np.float32),
      "voxel_volume": volume(index),
    }

  def stream(seed: int, start_step: int):
    shown = loader.stream(
      range(len(table)),
      load,
      batch_size=config.finetune.batch_size,
      seed=seed,
      start_step=start_step,
      num_workers=config.data.num_workers,
      **part,
    )
    return (types.PairBatch(**batch) for batch in shown)

  return stream


def tile_weights(config, sizes: np.ndarray, voxel_volume: float) -> np.ndarray:
  """What a pair of a whole image weighs in one of its tiles.

      w_t = s(|D|) / s(|D_t|),     s the factor of the objective's normalization

  which is |D_t| / |D| under region and 1 under none. With h_t the margin's gain on the tile,

      w_t (-log S(beta s(|D_t|) h_t)),     S the sigmoid

  has at h = 0 the gradient of the image's loss -log S(beta s(|D|) h) on each pixel of D_t. Under
  region the sum over tiles that do not overlap is an upper bound of that loss (Jensen, as
  h / |D| is the mean of h_t / |D_t| with weights w_t), and equal to it where all tiles have gained
  alike; each tile saturates by the mean over its own pixels, at the same beta as without tiles. Of
  several objectives s is the weighted sum of their factors.

  Args:
    config: the objective and its normalization are read.
    sizes: f32[2, P], |D_t| and |D| in pixels; 0 where a slot has no pair.
    voxel_volume: what a pixel stands for.

  Returns:
    f64[P], 0 where a slot has no pair.
  """
  mass = pair_value.gradient_mass(sizes, **mass_options(config), voxel_volume=voxel_volume)
  is_pair = np.asarray(sizes) > 0
  in_tile, in_image = np.where(is_pair, mass / np.where(is_pair, sizes, 1), 1.0)
  return np.where(is_pair.all(axis=0), in_image / in_tile, 0.0)


def mass_options(config) -> dict:
  """Keyword arguments of `pair_value.gradient_mass` that the config gives."""
  options = config.finetune
  rows = [objectives.OBJECTIVES[name] for name in objectives.parse(options.objective)]
  return {
    "normalizations": [options.normalization or row.normalization for row in rows],
    "weights": tuple(options.objective_weights) or (1.0,) * len(rows),
    "exponent": options.power_exponent,
    "floor": options.power_floor,
  }


def weights_by_gap(config, directory: epath.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Score gaps f32[P] -> weights f64[P] of the pairs, as `pair_value.worth_of_pairs` says.

  How often the judge is right at a gap stands in `judges.json`.

  Raises:
    ConfigError: if no pair would weigh anything.
  """
  options = weight_options(config)
  if not pair_value.reads_calibration(**options):
    return lambda gap: pair_value.worth_of_pairs(gap, None, **options)
  name, calibration = _calibration(config, directory)
  best = max(calibration["accuracy"])
  if options["kind"] == "reliability" and best <= 0.5:
    raise ConfigError(
      f"config.finetune.pair_weight: 'reliability' gives every pair the weight 0, for the judge "
      f"{name!r} has at no gap more than half of the pairs right on validation; take "
      "another judge"
    )
  if best < options["min_probability"]:
    raise ConfigError(
      f"config.finetune.min_pair_probability: found {options['min_probability']}, but the judge "
      f"{name!r} has at no gap more than {best:.3f} of the pairs right on validation; lower it, or "
      "take another judge"
    )
  return lambda gap: pair_value.worth_of_pairs(gap, calibration, **options)


def smoothing_by_gap(config, directory: epath.Path) -> Callable[[np.ndarray], np.ndarray] | None:
  """Score gaps f32[P] -> f64[P] as `pair_value.smoothing_of_pairs` says; None if it is not asked.

  Raises:
    ConfigError: if no pair would teach anything.
  """
  if config.finetune.pair_smoothing == "none":
    return None
  name, calibration = _calibration(config, directory)
  if max(calibration["accuracy"]) <= 0.5:
    raise ConfigError(
      f"config.finetune.pair_smoothing: 'reliability' smooths every pair by 1/2, for the judge "
      f"{name!r} has at no gap more than half of the pairs right on validation; take another judge"
    )
  return lambda gap: pair_value.smoothing_of_pairs(gap, calibration)


def _calibration(config, directory: epath.Path) -> tuple[str, dict]:
  """The judge that mined, and how often it is right, by `judges.json`."""
  table = files.read_json(directory / "judges.json")
  name = judge_gate.used(table, config.judge.name)
  table = files.read_json(directory / "judges.json", **{name: dict})
  return name, table[name]["calibration"]


def weight_options(config) -> dict:
  """Keyword arguments of `pair_value.worth_of_pairs` that the config gives."""
  options = config.finetune
  return {"kind": options.pair_weight, "min_probability": options.min_pair_probability}


def voxel_volumes(config, dataset) -> Callable[[int], np.ndarray]:
  """Record index -> what a pixel of the model's grid stands for, f32[].

  Raises:
    ConfigError: if `config.finetune.region_unit` is mm and a spacing is unknown.
  """
  if config.finetune.region_unit == "pixel":
    return lambda index: np.float32(1.0)
  unknown = [entry["record_id"] for entry in dataset.records if entry["spacing"] is None]
  if unknown:
    raise ConfigError(
      f"config.finetune.region_unit: 'mm' needs spacings, but that of {unknown[0]!r} is unknown; "
      "use 'pixel'"
    )

  def volume(index: int) -> np.ndarray:
    if dataset.native is not None:
      spacing, shape = dataset.native.spacing, dataset.size
    else:
      spacing, shape = (dataset.records[index][name] for name in ("spacing", "shape"))
    return np.float32(geometry.voxel_volume(spacing, shape, dataset.size, dataset.crop))

  return volume
