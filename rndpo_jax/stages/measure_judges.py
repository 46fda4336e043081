"""What mining is worth: judges and proposals against the truth, on images that have one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import errors, seeds, types
from rndpo_jax.evaluation import validation_pairs
from rndpo_jax.losses import bit_planes, objectives
from rndpo_jax.mining import fused, judge_gate, judges, program, proposals, reliability
from rndpo_jax.pairs import pair_batches
from rndpo_jax.runtime import files

NUM_EXAMPLES = 6
# Splits whose truth is known. The base was trained on the labelled one, so what is measured there
# says little about unlabelled images, and is kept apart.
SPLITS = ("val", "labelled")


def make_measure(
  score: Callable, names: tuple[str, ...], dataset, rule: Callable, with_proposals: bool = False
) -> Callable:
  """(weights, keys, batch) -> each judge's scores f32[b, K] and pairs, the truth, the proposals.

  Args:
    score: from `mine.make_scorer`.
    names: of the judges.
    dataset: num_classes and spatial_dims are read.
    rule: from `program.make_rule`.
    with_proposals: whether `masks` and `probs` come out too, for judges that run on the host.
  """

  num_classes = dataset.num_classes

  def measure(weights, keys, batch: types.Batch):
    sampled, scores = score(weights, keys, batch, names)
    base_masks = jnp.argmax(sampled.base_logits, axis=-1).astype(jnp.uint8)
    proposed = {"masks": sampled.masks, "probs": jax.nn.softmax(sampled.logits, axis=-1)}
    return {
      **(proposed if with_proposals else {}),
      "scores": scores,
      "mined": {name: rule(keys, sampled.masks, scores[name]) for name in names},
      "packed": bit_planes.pack(sampled.masks, num_classes, dataset.spatial_dims),
      # Whether any pixel is labelled: where all are ignored, every proposal would be perfect.
      "known": jnp.any(batch.labels != types.IGNORED, axis=tuple(range(1, batch.labels.ndim))),
      "truth": judges.true_scores(sampled.masks, batch.labels, num_classes),
      "base_foreground": jnp.any(base_masks > 0, axis=tuple(range(1, base_masks.ndim))),
      "base": judges.true_scores(base_masks[:, None], batch.labels, num_classes)[:, 0],
      "diversity": proposals.diversity(sampled.masks, num_classes),
    }

  return measure


def write_reliability(
  config, directory: epath.Path, dataset, outputs: Mapping[str, Iterable]
) -> None:
  """Writes `proposals.json`, `validation.npz` and, last, `judges.json`, all of validation.

  They hold the proposals' diversity and headroom, the pairs of the judge that mines, and the
  reliability of each judge: in general, as "mined" of the kind of pairs that mining makes, and as
  "labelled" on the labelled split. "used" marks the judge that mines, which is chosen here if
  `config.judge.name` is auto.

  Raises:
    MiningError: if the base finds no foreground in the validation split.

  Args:
    directory: `pairs/`.
    outputs: of each of SPLITS, (batch, output of `make_measure`'s function) over its records.
  """
  measured, case_ids, indices = {}, {}, {}
  for split in SPLITS:
    whole = _whole(outputs[split])
    known = whole["known"]
    measured[split] = jax.tree.map(lambda x, known=known: x[known], whole)
    indices[split] = dataset.splits[split][known]
    case_ids[split] = [dataset.records[index]["case_id"] for index in indices[split]]
  check_foreground(measured["val"]["base_foreground"])
  truth = measured["val"]["truth"]
  weights = {}
  if judges.FUSED in program.used_judges(config):
    weights = _add_fused(config, dataset, measured, case_ids["val"], indices["val"])
  files.write_json(
    directory / "proposals.json",
    {
      "split": "val",
      "diversity": float(measured["val"]["diversity"].mean()),
      "base_dice": float(measured["val"]["base"].mean()),
      "mean_dice": float(truth.mean()),
      "best_dice": float(truth.max(axis=1).mean()),
    },
  )

  def figures(name: str, split: str) -> dict:
    return reliability.reliability(
      measured[split]["scores"][name],
      measured[split]["truth"],
      case_ids[split],
      num_bootstrap=config.judge.num_bootstrap,
      seed=config.seed,
    )

  table = {
    name: {
      **figures(name, "val"),
      "calibration": reliability.calibration(measured["val"]["scores"][name], truth),
      "split": "val",
      "labelled": figures(name, "labelled"),
    }
    for name in sorted(measured["val"]["scores"])
  }
  for name, entry in table.items():
    weight = pair_weights(config, dataset, indices["val"], measured["val"]["mined"][name], entry)
    entry["mined"] = reliability.mined(
      truth,
      measured["val"]["mined"][name].chosen,
      measured["val"]["mined"][name].rejected,
      weight,
      case_ids["val"],
      num_bootstrap=config.judge.num_bootstrap,
      seed=config.seed,
    )
  judge = config.judge.name
  if judge == judges.AUTO:
    judge = judge_gate.best(table, config.judge.compare)
  for name, entry in table.items():
    entry["used"] = name == judge
  if weights:
    table[judges.FUSED]["weights"] = weights
  validation_pairs.write(
    directory / validation_pairs.FILE,
    indices["val"],
    measured["val"]["packed"],
    truth,
    measured["val"]["mined"][judge],
  )
  files.write_json(directory / "judges.json", table)


def _add_fused(config, dataset, measured: dict, case_ids, indices) -> dict[str, float]:
  """Adds the scores of the judge `fused`, and its pairs on validation; returns its weights."""
  names, val = fused.members(config), measured["val"]
  whole, left_out = fused.log_odds(
    {name: val["scores"][name] for name in names}, val["truth"], case_ids
  )
  for split, weights in (("val", left_out), ("labelled", whole)):
    scores = measured[split]["scores"]
    together = jnp.stack([scores[name] for name in names], axis=1)
    scores[judges.FUSED] = np.asarray(fused.fuse(together, weights))
  mine = jax.jit(program.with_keys(program.make_rule_scored(config, dataset)))
  key, parts, count = seeds.mining_key(config.seed), [], len(indices)
  for start in range(0, count, config.mine.batch_size):
    rows = np.minimum(np.arange(start, start + config.mine.batch_size), count - 1)
    masks = bit_planes.unpack(val["packed"][rows], tuple(dataset.size), dataset.num_classes)
    scored = program.Scored(
      np.asarray(indices[rows], np.int32), masks, None, val["scores"][judges.FUSED][rows]
    )
    parts.append(jax.tree.map(np.asarray, mine(None, key, scored)))
  val["mined"][judges.FUSED] = jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
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
  options = config.finetune
  rows = [objectives.OBJECTIVES[name] for name in objectives.parse(options.objective)]
  volume = pair_batches.voxel_volumes(config, dataset)
  mass = reliability.gradient_mass(
    mined.region_size,
    normalizations=[options.normalization or row.normalization for row in rows],
    weights=tuple(options.objective_weights) or (1.0,) * len(rows),
    exponent=options.power_exponent,
    floor=options.power_floor,
    voxel_volume=np.array([volume(int(index)) for index in indices], np.float64)[:, None],
  )
  return mass * pair_worth(config, mined.score_gap, mined.valid, entry)


def pair_worth(config, score_gap: np.ndarray, valid: np.ndarray, entry: Mapping) -> np.ndarray:
  """`reliability.worth_of_pairs` by the config, f64[N, P]; 0 if a slot has no pair.

  Times 1 - 2 e if pairs are smoothed by e, which is what smoothing leaves of the slope at h = 0.

  Args:
    config: the whole config.
    score_gap: f32[N, P]. valid: bool[N, P].
    entry: of `judges.json`, for its calibration.
  """
  worth = reliability.worth_of_pairs(
    score_gap, entry.get("calibration"), **pair_batches.weight_options(config)
  )
  if config.finetune.pair_smoothing != "none":
    worth = worth * (1.0 - 2.0 * reliability.smoothing_of_pairs(score_gap, entry["calibration"]))
  return np.where(valid, worth, 0.0)


def check_foreground(found: np.ndarray) -> None:
  """Refuses a base that finds nothing, before its empty masks are mined.

  Args:
    found: bool[N], whether its mask of each validation image has any foreground.

  Raises:
    MiningError: with what to change.
  """
  if not found.any():
    raise errors.MiningError(
      f"the base segmenter finds no foreground in any of {len(found)} validation images, so that "
      "pairs of its proposals would teach nothing: train it longer (config.base.num_steps), with "
      "another config.base.learning_rate, or on more labelled cases, in a new --workdir"
    )


def _whole(outputs: Iterable) -> dict:
  """Joins the valid rows of all batches."""
  parts = [jax.tree.map(lambda x, valid=batch.valid: x[valid], out) for batch, out in outputs]
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def example_indices(dataset) -> np.ndarray:
  """A few unlabelled records, spread over the split."""
  unlabelled = dataset.splits["unlabelled"]
  count = min(NUM_EXAMPLES, len(unlabelled))
  return unlabelled[np.linspace(0, len(unlabelled) - 1, count).round().astype(int)]


def write_examples(path: epath.Path, dataset, outputs: Iterable) -> None:
  """Writes the proposals, scores and first pair of the `example_indices` as .npz.

  Args:
    path: `pairs/examples.npz`.
    outputs: (batch, output of the mining program) over `example_indices`.
  """
  parts = []
  for batch, out in outputs:
    keep = batch.valid
    has_pair = out["pairs"].valid[:, 0]
    parts.append(
      {
        "image": batch.images[keep],
        "masks": out["masks"][keep],
        "scores": out["scores"][keep],
        "chosen": np.where(has_pair, out["pairs"].chosen[:, 0], -1)[keep],
        "rejected": np.where(has_pair, out["pairs"].rejected[:, 0], -1)[keep],
      }
    )
  whole = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  whole["record_id"] = np.array(
    [dataset.records[index]["record_id"] for index in example_indices(dataset)]
  )
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **whole)
  files.write_bytes(path, buffer.getvalue())
