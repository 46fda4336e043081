"""What mining is worth: judges and proposals against the truth, on images that have one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import seeds, types
from rndpo_jax.evaluation import validation_pairs
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import (
  fused,
  judge_gate,
  judges,
  overlap,
  pair_value,
  program,
  ranked,
  reliability,
)  # fmt: skip
from rndpo_jax.pairs import pair_batches
from rndpo_jax.runtime import files, progress
from rndpo_jax.training import image_terms

# Splits whose truth is known. The base was trained on the labelled one, so what is measured there
# says little about unlabelled images, and is kept apart.
SPLITS = ("val", "labelled")


def make_measure(
  config, score: Callable, names: tuple[str, ...], dataset, with_proposals: bool = False
) -> Callable:
  """(weights, keys, batch) -> each judge's scores f32[b, K] and pairs, the truth, the proposals.

  Args:
    config: the whole config.
    score: from `mine.make_scorer`.
    names: of the judges.
    dataset: num_classes and spatial_dims are read.
    with_proposals: whether `masks` and `probs` come out too, for judges that run on the host.
  """

  num_classes = dataset.num_classes
  rule, sizes_of = ranked.make_rule(config), ranked.make_sizes(config, dataset)

  def measure(weights, keys, batch: types.Batch):
    sampled, scores = score(weights, keys, batch, names)
    base_masks = jnp.argmax(sampled.base_logits, axis=-1).astype(jnp.uint8)
    sizes = sizes_of(sampled.masks)
    proposed = {"masks": sampled.masks, "probs": jax.nn.softmax(sampled.logits, axis=-1)}
    return {
      **(proposed if with_proposals else {}),
      "scores": scores,
      "mined": {name: rule(keys, sizes, scores[name], sampled.present) for name in names},
      "region_sizes": sizes,
      "present": sampled.present,
      "packed": bit_planes.pack(sampled.masks, num_classes, dataset.spatial_dims),
      # Whether any pixel is labelled: where all are ignored, every proposal would be perfect.
      "known": jnp.any(batch.labels != types.IGNORED, axis=tuple(range(1, batch.labels.ndim))),
      "truth": judges.true_scores(sampled.masks, batch.labels, num_classes),
      "base_foreground": jnp.any(base_masks > 0, axis=tuple(range(1, base_masks.ndim))),
      "base": judges.true_scores(base_masks[:, None], batch.labels, num_classes)[:, 0],
      "diversity": overlap.diversity(sampled.masks, num_classes, sampled.present),
    }

  return measure


class Measured(NamedTuple):
  """What judging came to on the N images of a split.

  Attributes:
    out: of `make_measure`'s function, a row an image.
    indices: i64[N], their records.
    case_ids: of each. group_ids: likewise.
  """

  out: dict
  indices: np.ndarray
  case_ids: list[str]
  group_ids: list[str]


def write_reliability(
  config,
  directory: epath.Path,
  dataset,
  outputs: Mapping[str, Iterable],
  by_tiles: Callable | None = None,
) -> None:
  """Writes `proposals.json`, `validation.npz` and, last, `judges.json`, all of validation.

  They hold the proposals' diversity and headroom, the pairs of the judge that mines, and the
  reliability of each judge: in general, as "mined" of the kind of pairs that mining makes, and as
  "labelled" on the labelled split. "used" marks the judge that mines, which is chosen here if
  `config.judge.name` is auto. Without validation cases all but "labelled" is unknown.

  Raises:
    MiningError: if the base finds no foreground in the validation split.

  Args:
    directory: `pairs/`.
    outputs: of each of SPLITS, (batch, output of `make_measure`'s function) over its records.
    by_tiles: of `tile_pairs.of_measuring`, if the outputs are without masks.
  """
  names = [split for split in SPLITS if len(dataset.splits[split])]
  parts = {split: _measured(dataset, split, outputs[split]) for split in names}
  labelled = parts["labelled"]
  val = parts.get("val", _of_no_image(labelled))
  if "pairs" in image_terms.reads_of(config):
    judge_gate.check_foreground(parts[names[0]].out["base_foreground"], names[0])
  weights = {}
  if judges.FUSED in program.used_judges(config):
    weights = _add_fused(config, val, labelled)
  files.write_json(directory / "proposals.json", proposal_figures(val.out))
  table = {name: _entry(config, dataset, name, val, labelled) for name in sorted(val.out["scores"])}
  judge = config.judge.name
  if judge == judges.AUTO:
    judge = judge_gate.best(table, config.judge.compare)
  for name, entry in table.items():
    entry["used"] = name == judge
    if entry["mined"]["weighted_accuracy"] is None and len(val.indices):
      progress.say(
        f"judge {name!r}: how often it is right is unknown, for no pair could be made of the "
        "proposals of the validation images"
      )
  if weights:
    table[judges.FUSED]["weights"] = weights
  mined = val.out["mined"][judge]
  if by_tiles is None:
    rows = (val.indices, val.out["packed"], val.out["truth"], mined)
  else:
    rows = by_tiles(val.indices, val.out["truth"], mined)
  validation_pairs.write(directory / validation_pairs.FILE, *rows)
  files.write_json(directory / "judges.json", table)


def _measured(dataset, split: str, outputs: Iterable) -> Measured:
  """Of the images of a split of which any pixel is labelled."""
  out = _whole(outputs)
  known = out["known"]
  indices = dataset.splits[split][known]
  ids = [[dataset.records[index][name] for index in indices] for name in ("case_id", "group_id")]
  return Measured(jax.tree.map(lambda x: x[known], out), indices, *ids)


def _of_no_image(measured: Measured) -> Measured:
  """Arrays of the same kinds, without a row."""
  return Measured(jax.tree.map(lambda x: x[:0], measured.out), measured.indices[:0], [], [])


def _entry(config, dataset, name: str, val: Measured, labelled: Measured) -> dict:
  """Of `judges.json`, for one judge."""

  def figures(of: Measured) -> dict:
    return reliability.reliability(
      of.out["scores"][name],
      of.out["truth"],
      of.case_ids,
      num_bootstrap=config.judge.num_bootstrap,
      seed=config.seed,
      judged=_judged(of.out, name),
      group_ids=of.group_ids,
    )

  scores, truth, mined = val.out["scores"][name], val.out["truth"], val.out["mined"][name]
  judged = np.where(_judged(val.out, name), scores, np.nan)
  entry = {
    **figures(val),
    "calibration": pair_value.calibration(judged, truth),
    "split": "val" if len(val.indices) else None,
    "labelled": figures(labelled),
  }
  entry["mined"] = reliability.mined(
    truth,
    mined.chosen,
    mined.rejected,
    pair_weights(config, dataset, val.indices, mined, entry),
    val.case_ids,
    num_bootstrap=config.judge.num_bootstrap,
    seed=config.seed,
    group_ids=val.group_ids,
  )
  return entry


def _judged(measured: Mapping, name: str) -> np.ndarray:
  """bool[N, K], the proposals that a judge scores: all that are there, and `file` its own alone."""
  scores, present = measured["scores"][name], measured["present"]
  judged = np.ones(scores.shape, bool) if present is None else present
  return judged & np.isfinite(scores) if name == judges.FILE else judged


def proposal_figures(measured: Mapping) -> dict:
  """What `proposals.json` says, of the images that have a proposal; None where none has.

  Args:
    measured: of the validation split: "truth" f32[N, K], "present" bool[N, K] or None, "base" and
      "diversity" f32[N].
  """
  truth, present, diversity = (measured[name] for name in ("truth", "present", "diversity"))
  best, base = truth, measured["base"]
  if present is not None:
    some = present.any(axis=1)
    best, base = np.where(present, truth, -1.0)[some], base[some]
    truth, diversity = truth[present], diversity[np.isfinite(diversity)]
  return {
    "split": "val",
    "diversity": float(diversity.mean()) if diversity.size else None,
    "base_dice": float(base.mean()) if base.size else None,
    "mean_dice": float(truth.mean()) if truth.size else None,
    "best_dice": float(best.max(axis=1).mean()) if best.size else None,
  }


def _add_fused(config, val: Measured, labelled: Measured) -> dict[str, float]:
  """Adds the scores of the judge `fused`, and its pairs on validation; returns its weights."""
  names, out = fused.members(config), val.out
  whole, left_out = fused.log_odds(
    {name: out["scores"][name] for name in names},
    out["truth"],
    val.case_ids,
    {name: _judged(out, name) for name in names},
    val.group_ids,
  )
  for part, weights in ((val, left_out), (labelled, whole)):
    scores = part.out["scores"]
    together = jnp.stack([scores[name] for name in names], axis=1)
    scores[judges.FUSED] = np.asarray(fused.fuse(together, weights))
  mine = jax.jit(program.with_keys(ranked.make_rule_ranked(config)))
  rows = ranked.Ranked(
    np.asarray(val.indices, np.int32),
    out["region_sizes"],
    out["scores"][judges.FUSED],
    out["present"],
  )
  found = mine(None, seeds.mining_key(config.seed), rows)
  out["mined"][judges.FUSED] = jax.tree.map(np.asarray, found)
  return dict(zip(names, whole.tolist(), strict=True))


def pair_weights(config, dataset, indices, mined: types.Pairs, entry: Mapping) -> np.ndarray:
  """What share of the gradient each pair gets at step 0, f64[N, P]; 0 if a slot has none.

  Args:
    config: the whole config; the objective's normalization and the pairs' weights are read.
    dataset: the prepared data.
    indices: i64[N], records of the images.
    mined: their pairs.
    entry: of `judges.json`, for its calibration.
  """
  mass = pair_value.gradient_mass(
    mined.region_size,
    **pair_batches.mass_options(config),
    voxel_volume=volumes(config, dataset, indices),
  )
  return mass * pair_worth(config, mined.score_gap, mined.valid, entry)


def volumes(config, dataset, indices) -> np.ndarray:
  """What a pixel of each record stands for in training, f64[N, 1]."""
  volume = pair_batches.voxel_volumes(config, dataset)
  return np.array([volume(int(index)) for index in indices], np.float64)[:, None]


def pair_worth(config, score_gap: np.ndarray, valid: np.ndarray, entry: Mapping) -> np.ndarray:
  """`pair_value.worth_of_pairs` by the config, f64[N, P]; 0 if a slot has no pair.

  Times 1 - 2 e if pairs are smoothed by e, which is what smoothing leaves of the slope at h = 0.

  Args:
    config: the whole config.
    score_gap: f32[N, P]. valid: bool[N, P].
    entry: of `judges.json`, for its calibration.
  """
  worth = pair_value.worth_of_pairs(
    score_gap, entry.get("calibration"), **pair_batches.weight_options(config)
  )
  if config.finetune.pair_smoothing != "none":
    worth = worth * (1.0 - 2.0 * pair_value.smoothing_of_pairs(score_gap, entry["calibration"]))
  return np.where(valid, worth, 0.0)


def _whole(outputs: Iterable) -> dict:
  """Joins the valid rows of all batches."""
  parts = [jax.tree.map(lambda x, valid=batch.valid: x[valid], out) for batch, out in outputs]
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
