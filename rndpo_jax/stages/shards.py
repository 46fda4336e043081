"""Shards of mined pairs, and the manifest that adds them up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import files, mining, progress, types
from rndpo_jax.stages import pairs


class MiningError(RuntimeError):
  """Mining that cannot give pairs; the message says which filter took them."""


def write(path, num_images: int, num_batches: int, outputs: Iterator) -> None:
  """Writes the mined images of one shard; images without a valid pair leave no record."""
  summary: dict[str, Any] = {
    "num_images": num_images,
    "num_pairs": 0,
    "dropped": dict.fromkeys(mining.FILTERS, 0),
    "region_size": [],
    "score_gap": [],
  }

  def records():
    for batch, out in progress.track(
      outputs, total=num_batches, description=f"mine {path.name[:20]}", unit="batches"
    ):
      for row in np.flatnonzero(batch.valid):
        mined = types.Pairs(*(field[row] for field in out["pairs"]))
        _count(summary, mined)
        if mined.valid.any():
          yield record(out, row, int(batch.index[row]), mined)

  pairs.write_shard(path, records(), summary)


def record(out, row: int, index: int, mined: types.Pairs) -> dict[str, np.ndarray]:
  """What is written of one image.

  Args:
    out: of the mining program, leading axis b.
    row: of the image.
    index: of its record.
    mined: its pairs.
  """
  return {
    "index": np.int32(index),
    "chosen": out["chosen"][row],
    "rejected": out["rejected"][row],
    "reference_margin": out["reference_margin"][row],
    "reference_log_prob": out["reference_log_prob"][row],
    "valid": mined.valid.astype(np.float32),
    "region_size": mined.region_size,
    "score_gap": mined.score_gap,
    "scores": out["scores"][row],
    "chosen_proposal": mined.chosen,
    "rejected_proposal": mined.rejected,
    **({"proposals": out["proposals"][row]} if "proposals" in out else {}),
  }


def _count(summary, mined: types.Pairs) -> None:
  for name, count in zip(mining.FILTERS, mined.dropped, strict=True):
    summary["dropped"][name] += int(count)
  summary["num_pairs"] += int(mined.valid.sum())
  summary["region_size"] += mined.region_size[mined.valid].tolist()
  summary["score_gap"] += [round(float(gap), 7) for gap in mined.score_gap[mined.valid]]


def is_finished(path: epath.Path) -> bool:
  """Whether a shard and its summary are whole."""
  return path.exists() and pairs.summary_path(path).exists()


def write_manifest(config, directory: epath.Path) -> None:
  """Adds up the shards' summaries.

  Raises:
    MiningError: where there is no pair at all.
  """
  count = config.mine.num_shards
  paths = [pairs.shard_path(directory, shard, count) for shard in range(count)]
  summaries = [files.read_json(pairs.summary_path(path)) for path in paths]
  dropped = {name: sum(s["dropped"][name] for s in summaries) for name in mining.FILTERS}
  sizes = np.concatenate([np.array(s["region_size"], np.int64) for s in summaries])
  gaps = np.concatenate([np.array(s["score_gap"], np.float64) for s in summaries])
  num_images = sum(s["num_images"] for s in summaries)
  num_bytes = sum(s["num_bytes"] for s in summaries)
  if sizes.size == 0:
    taken = ", ".join(f"{name} {number}" for name, number in dropped.items())
    raise MiningError(
      f"mining {num_images} images left no pair; candidate pairs taken by each filter: {taken}. "
      "'identical' asks for more diverse proposals (config.proposals.noise_scale, mix), 'tie' for "
      "another judge, 'score_gap' and 'region_size' for other limits in config.mine; start again "
      "in a new workdir, with --config.base.workdir to keep the base"
    )
  edges = np.unique(np.geomspace(1, max(sizes.max(), 2), 25).round()).astype(np.int64)
  counts, _ = np.histogram(sizes, bins=np.append(edges, edges[-1] + 1))
  files.write_json(
    directory / "manifest.json",
    {
      "shards": [{key: s[key] for key in ("file", "sha256", "count")} for s in summaries],
      "num_images": num_images,
      "num_pairs": int(sizes.size),
      "num_bytes": num_bytes,
      "bytes_per_pair": num_bytes / sizes.size,
      "dropped": dropped,
      "region_size": {
        **_quantiles(sizes),
        "histogram": {"edges": np.append(edges, edges[-1] + 1).tolist(), "counts": counts.tolist()},
      },
      "score_gap": _quantiles(gaps),
      "rule": config.mine.rule,
      "judge": config.judge.name,
      "mix": config.proposals.mix,
      "seed": config.seed,
      "proposals": files.read_json(directory / "proposals.json"),
    },
  )


def _quantiles(values: np.ndarray) -> dict[str, float]:
  low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
  return {"p5": float(low), "p50": float(middle), "p95": float(high)}
