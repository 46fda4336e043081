"""When to stop without validation labels: what unlabelled images tell of each checkpoint.

Two figures, means over a few unlabelled images on the model's grid:

    kl         KL(checkpoint || base) a pixel, in nats: how far it has gone
    agreement  Dice of its mask with that of a teacher, the mean probability of the base and of all
               checkpoints up to it (temporal ensembling: Laine and Aila, ICLR 2017)

They choose nothing in a run: what would have been delivered by 'the last checkpoint whose KL is
below x' is put beside the oracle's stop, the checkpoint that is best on test, so that studies can
tell what such a rule is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import models
from rndpo_jax.data import tiles
from rndpo_jax.evaluation import metrics, predict
from rndpo_jax.mining import overlap
from rndpo_jax.runtime import preemption, sharding

NUM_IMAGES = 16
MAX_KL = (0.003, 0.01, 0.03, 0.1, 0.3)  # nats a pixel


def measure(config, evaluation: predict.Evaluation, steps: Sequence[int]) -> list[dict[str, Any]]:
  """[{"step", "kl", "agreement"}, ...] of the checkpoints, on the devices of this process.

  Args:
    config: the whole config.
    evaluation: its parameters and batches are used.
    steps: rising, the base (0) first.
  """
  dataset = evaluation.dataset
  unlabelled = tiles.view(dataset).splits["unlabelled"]  # as `evaluation.batches` counts them
  places = np.linspace(0, len(unlabelled) - 1, min(NUM_IMAGES, len(unlabelled))).round().astype(int)
  batches = list(evaluation.batches(tuple(map(int, unlabelled[places]))))
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  logits_of = sharding.over_local_devices(segmenter.apply)
  compare = sharding.over_local_devices(lambda _, rows: figures(*rows, dataset.num_classes))
  base = total = None
  found = []
  for count, step in enumerate(steps, 1):
    preemption.check("evaluate: measured checkpoints are kept")
    params = sharding.put_on_local_devices(evaluation.params(step))
    logits = [logits_of(params, batch.images) for batch in batches]
    probs = [jax.nn.softmax(rows, axis=-1) for rows in logits]
    base = logits if base is None else base
    total = probs if total is None else [a + b for a, b in zip(total, probs, strict=True)]
    parts = [
      {name: np.asarray(x)[batch.valid] for name, x in compare(None, rows).items()}
      for batch, rows in zip(
        batches, zip(logits, base, [x / count for x in total], strict=True), strict=True
      )
    ]
    whole = jax.tree.map(lambda *xs: float(np.mean(np.concatenate(xs))), *parts)
    found.append({"step": int(step), **whole})
  return found


def figures(logits, base_logits, teacher_probs, num_classes: int) -> dict[str, jax.Array]:
  """The two figures of each image.

  Args:
    logits: f32[b, *S, C], of the checkpoint. base_logits: likewise.
    teacher_probs: f32[b, *S, C].
    num_classes: C.

  Returns:
    {"kl", "agreement"} f32[b] each.
  """
  masks = [jnp.argmax(x, axis=-1).astype(jnp.uint8)[:, None] for x in (logits, teacher_probs)]
  return {
    "kl": metrics.kl_divergence(logits, base_logits),
    "agreement": overlap.pairwise_dice(*masks, num_classes)[:, 0, 0],
  }


def stops(
  points: Sequence[Mapping[str, float]], curve: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
  """What a rule on KL alone delivers.

  Args:
    points: of `measure`.
    curve: of `results.curve_point`, of the same steps.

  Returns:
    {"rule", "by_kl": [{"max_kl", "step", "test_dice"}, ...] of MAX_KL, the base where no checkpoint
    is below, "oracle": {"step", "test_dice"}, the best on test, the first of equals}.
  """
  dice = {point["step"]: point["test_dice"] for point in curve}
  by_kl = []
  for limit in MAX_KL:
    below = [point["step"] for point in points[1:] if point["kl"] < limit]
    step = below[-1] if below else points[0]["step"]
    by_kl.append({"max_kl": limit, "step": step, "test_dice": dice[step]})
  best = max(dice, key=lambda step: (dice[step], -step))
  return {
    "rule": "the last checkpoint whose KL to the base on unlabelled images is below max_kl",
    "by_kl": by_kl,
    "oracle": {"step": best, "test_dice": dice[best]},
  }
