"""`pairs/examples.npz`: a few images with their proposals and first pairs, for the report."""

from __future__ import annotations

import io
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath

from rndpo_jax.runtime import files

COUNT = 6


def indices(dataset) -> np.ndarray:
  """A few unlabelled records, spread over the split."""
  unlabelled = dataset.splits["unlabelled"]
  count = min(COUNT, len(unlabelled))
  return unlabelled[np.linspace(0, len(unlabelled) - 1, count).round().astype(int)]


def write(path: epath.Path, dataset, outputs: Iterable) -> None:
  """Writes the proposals, scores and first pair of the `indices` as .npz.

  Args:
    path: `pairs/examples.npz`.
    outputs: (batch, output of the mining program) over `indices`.
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
  whole["record_id"] = np.array([dataset.records[index]["record_id"] for index in indices(dataset)])
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **whole)
  files.write_bytes(path, buffer.getvalue())
