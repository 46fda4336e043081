"""When to stop without validation labels: what a few other images tell of each checkpoint.

Means over a few images on the model's grid, unlabelled ones but for the last figure:

    kl             KL(checkpoint || base) a pixel, in nats: how far it has gone
    dice_to_base   Dice of its mask with the base's
    agreement      Dice of its mask with that of a teacher, the mean probability of the base and of
                   all checkpoints up to it (temporal ensembling: Laine and Aila, ICLR 2017)
    labelled_dice  its Dice on labelled images, which the base was trained on: no measure of worth,
                   but a model that has gone astray loses these, too

Without validation cases the model to use is chosen by `choose`: the last checkpoint that is near
the base and has kept the labelled images. With them it speaks beside them (`delivered`), and what
it would have delivered stands beside the oracle's stop, the checkpoint that is best on test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import models, types
from rndpo_jax.data import loader, tiles
from rndpo_jax.evaluation import metrics, predict
from rndpo_jax.mining import overlap
from rndpo_jax.runtime import preemption, sharding

NUM_IMAGES = 16  # unlabelled ones, and as many labelled ones
MAX_KL = (0.003, 0.01, 0.03, 0.1, 0.3)  # nats a pixel
MIN_DICE_TO_BASE = 0.75
MIN_LABELLED = 0.9  # share of the base's labelled_dice
RULE = (
  "the last checkpoint whose KL to the base on unlabelled images is below max_kl, whose masks have "
  f"a Dice of {MIN_DICE_TO_BASE:g} or more with the base's, and which keeps {MIN_LABELLED:g} of "
  "the base's Dice on labelled images"
)


def measure(config, evaluation: predict.Evaluation, steps: Sequence[int]) -> list[dict[str, Any]]:
  """[{"step", "kl", "dice_to_base", "agreement", "labelled_dice"}, ...] of the checkpoints.

  On the devices of this process. "labelled_dice" is None if those images have no labelled pixel.

  Args:
    config: the whole config.
    evaluation: its parameters and batches are used.
    steps: rising, the base (0) first.
  """
  dataset = evaluation.dataset
  items = tiles.view(dataset)  # as `evaluation.batches` counts them
  unlabelled, labelled = (_some(items.splits[name]) for name in ("unlabelled", "labelled"))
  batches = list(evaluation.batches(unlabelled))
  size = predict.batch_size(config)
  known = list(loader.batches(items, labelled, batch_size=size, with_labels=True))
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  logits_of = sharding.over_local_devices(segmenter.apply)
  compare = sharding.over_local_devices(lambda _, rows: figures(*rows, dataset.num_classes))
  score = sharding.over_local_devices(lambda _, rows: labelled_figures(*rows, dataset.num_classes))
  base = total = None
  found = []
  for count, step in enumerate(steps, 1):
    preemption.check("evaluate: measured checkpoints are kept")
    params = sharding.put_on_local_devices(evaluation.params(step))
    logits = [logits_of(params, batch.images) for batch in batches]
    probs = [jax.nn.softmax(rows, axis=-1) for rows in logits]
    base = logits if base is None else base
    total = probs if total is None else [a + b for a, b in zip(total, probs, strict=True)]
    teacher = [x / count for x in total]
    rows = [compare(None, arrays) for arrays in zip(logits, base, teacher, strict=True)]
    means = {name: float(np.mean(x)) for name, x in _valid(batches, rows).items()}
    rows = [score(None, (logits_of(params, batch.images), batch.labels)) for batch in known]
    scored = _valid(known, rows)
    dice = scored["labelled_dice"][scored["known"]]
    found.append({"step": int(step), **means, "labelled_dice": _mean(dice)})
  return found


def _some(indices: np.ndarray) -> tuple[int, ...]:
  places = np.linspace(0, len(indices) - 1, min(NUM_IMAGES, len(indices))).round().astype(int)
  return tuple(map(int, indices[places]))


def _valid(batches: Sequence[types.Batch], rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
  """The rows of all batches without their padding."""
  parts = [
    {name: np.asarray(x)[batch.valid] for name, x in part.items()}
    for batch, part in zip(batches, rows, strict=True)
  ]
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _mean(values: np.ndarray) -> float | None:
  return float(np.mean(values)) if values.size else None


def figures(logits, base_logits, teacher_probs, num_classes: int) -> dict[str, jax.Array]:
  """The figures of each unlabelled image.

  Args:
    logits: f32[b, *S, C], of the checkpoint. base_logits: likewise.
    teacher_probs: f32[b, *S, C].
    num_classes: C.

  Returns:
    {"kl", "dice_to_base", "agreement"} f32[b] each.
  """
  mask, of_base, of_teacher = (
    jnp.argmax(x, axis=-1).astype(jnp.uint8)[:, None] for x in (logits, base_logits, teacher_probs)
  )
  return {
    "kl": metrics.kl_divergence(logits, base_logits),
    "dice_to_base": overlap.pairwise_dice(mask, of_base, num_classes)[:, 0, 0],
    "agreement": overlap.pairwise_dice(mask, of_teacher, num_classes)[:, 0, 0],
  }


def labelled_figures(logits, labels, num_classes: int) -> dict[str, jax.Array]:
  """Of each labelled image its Dice, and whether any pixel is labelled: f32[b], bool[b].

  Args:
    logits: f32[b, *S, C], of the checkpoint.
    labels: u8[b, *S].
    num_classes: C.
  """
  masks, space = jnp.argmax(logits, axis=-1).astype(jnp.uint8), tuple(range(1, labels.ndim))
  dice = metrics.dice(masks, labels, num_classes, labels.ndim - 1)
  known = jnp.any(labels != types.IGNORED, axis=space)
  return {"labelled_dice": jnp.mean(dice, axis=-1), "known": known}


def passes(points: Sequence[Mapping[str, Any]], *, max_kl: float) -> list[bool]:
  """Whether each checkpoint of `measure`, without the base, is as RULE asks."""
  base, *others = points
  return [_fault(point, base, max_kl) is None for point in others]


def choose(points: Sequence[Mapping[str, Any]], *, max_kl: float) -> dict[str, Any]:
  """Applies RULE.

  Args:
    points: of `measure`.
    max_kl: nats a pixel; 0 takes the base.

  Returns:
    {"step", "is_base", "chosen_by": "label_free", "rule", "reason" (a sentence), "kl",
    "dice_to_base", "agreement", "labelled_dice", "max_kl", "checkpoints": `points` without the
    base}.
  """
  base, *others = points
  passing = [point for point, ok in zip(others, passes(points, max_kl=max_kl), strict=True) if ok]
  taken = passing[-1] if passing else base
  return {
    **taken,
    "is_base": not passing,
    "chosen_by": "label_free",
    "rule": RULE,
    "reason": _reason(taken, base, others, max_kl),
    "max_kl": max_kl,
    "checkpoints": others,
  }


def _fault(point, base, max_kl: float) -> str | None:
  """What RULE has against a checkpoint; None if it passes."""
  if not point["kl"] < max_kl:
    return f"KL to the base {point['kl']:.4f}, below {max_kl:g} asked"
  if not point["dice_to_base"] >= MIN_DICE_TO_BASE:
    return f"Dice {point['dice_to_base']:.3f} with the base's masks, {MIN_DICE_TO_BASE:g} asked"
  before, after = base["labelled_dice"], point["labelled_dice"]
  if before is not None and not after >= MIN_LABELLED * before:
    return f"Dice on labelled images {after:.3f} after {before:.3f}, {MIN_LABELLED:g} of it asked"
  return None


def _reason(taken, base, others, max_kl: float) -> str:
  """One sentence."""
  if taken is not base:
    return (
      f"The checkpoint of step {taken['step']} is delivered, the last that is near the base (KL "
      f"{taken['kl']:.4f}, Dice {taken['dice_to_base']:.3f} with its masks) and has kept the "
      "labelled images; there are no validation cases, so that nobody knows whether it is better."
    )
  if not others:
    return "The base is delivered: there is no checkpoint."
  first = others[0]
  return (
    "The base is delivered: without validation cases a checkpoint must be near the base, and none "
    f"is (step {first['step']}: {_fault(first, base, max_kl)})."
  )


def stops(
  points: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], *, max_kl: float
) -> dict[str, Any]:
  """What RULE, and a rule on KL alone, deliver.

  Args:
    points: of `measure`.
    curve: of `results.curve_point`, of the same steps.
    max_kl: of RULE.

  Returns:
    {"rule", "chosen": {"step", "test_dice"}, "by_kl": [{"max_kl", "step", "test_dice"}, ...] of
    MAX_KL, the base where no checkpoint is below, "oracle": {"step", "test_dice"}, the best on
    test, the first of equals; None without test cases}.
  """
  dice = {point["step"]: point["test_dice"] for point in curve}
  by_kl = []
  for limit in MAX_KL:
    below = [point["step"] for point in points[1:] if point["kl"] < limit]
    step = below[-1] if below else points[0]["step"]
    by_kl.append({"max_kl": limit, "step": step, "test_dice": dice[step]})
  step = choose(points, max_kl=max_kl)["step"]
  chosen, oracle = {"max_kl": max_kl, "step": step, "test_dice": dice[step]}, None
  if dice[points[0]["step"]] is not None:
    best = max(dice, key=lambda step: (dice[step], -step))
    oracle = {"step": best, "test_dice": dice[best]}
  return {"rule": RULE, "chosen": chosen, "by_kl": by_kl, "oracle": oracle}
