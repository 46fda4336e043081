"""What mining is worth: judges and proposals against the truth of the validation split."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import files, judges, proposals, reliability, types

NUM_EXAMPLES = 6


def make_measure(score: Callable, names: tuple[str, ...], num_classes: int) -> Callable:
  """(weights, keys, batch) -> each judge's scores f32[b, K], the truth, and the proposals' worth.

  Args:
    score: from `mine.make_scorer`.
    names: of the judges.
    num_classes: C.
  """

  def measure(weights, keys, batch: types.Batch):
    sampled, scores = score(weights, keys, batch, names)
    base_masks = jnp.argmax(sampled.base_logits, axis=-1).astype(jnp.uint8)
    return {
      "scores": scores,
      "truth": judges.true_scores(sampled.masks, batch.labels, num_classes),
      "base": judges.true_scores(base_masks[:, None], batch.labels, num_classes)[:, 0],
      "diversity": proposals.diversity(sampled.masks, num_classes),
    }

  return measure


def write_reliability(config, directory: epath.Path, dataset, outputs: Iterable) -> None:
  """Writes `proposals.json` (diversity, headroom) and `judges.json` (reliability of each judge).

  Args:
    directory: `pairs/`.
    outputs: (batch, output of `make_measure`'s function) over the validation split.
  """
  parts = [jax.tree.map(lambda x, valid=batch.valid: x[valid], out) for batch, out in outputs]
  whole = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  truth = whole["truth"]
  files.write_json(
    directory / "proposals.json",
    {
      "split": "val",
      "diversity": float(whole["diversity"].mean()),
      "base_dice": float(whole["base"].mean()),
      "mean_dice": float(truth.mean()),
      "best_dice": float(truth.max(axis=1).mean()),
    },
  )
  cases = [dataset.records[index]["case_id"] for index in dataset.splits["val"]]
  table = {
    name: {
      **reliability.reliability(
        whole["scores"][name],
        truth,
        cases,
        num_bootstrap=config.judge.num_bootstrap,
        seed=config.seed,
      ),
      "calibration": reliability.calibration(whole["scores"][name], truth),
      "split": "val",
      "used": name == config.judge.name,
    }
    for name in sorted(whole["scores"])
  }
  files.write_json(directory / "judges.json", table)


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
