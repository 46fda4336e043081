"""Shards of mined pairs, and the manifest that adds them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.mining import pair_rules
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files, progress

_ROUNDED = "{:.3g}".format  # to three significant digits, a tie to the even one


def write(path, num_images: int, num_batches: int, outputs: Iterator) -> None:
  """Writes the mined images of one shard; images without a valid pair leave no record.

  Of region sizes and score gaps the summary keeps how many pairs have each value, rounded to three
  significant digits (sizes below 1,000 are exact): some thousand numbers, however many pairs.
  """
  summary: dict[str, Any] = {
    "num_images": num_images,
    "num_pairs": 0,
    "dropped": dict.fromkeys(pair_rules.FILTERS, 0),
    "region_size": Counter(),
    "score_gap": Counter(),
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

  shards.write_shard(path, records(), summary)


def record(out, row: int, index: int, mined: types.Pairs) -> dict[str, np.ndarray]:
  """What is written of one image: `shards.FIELDS`, and of `shards.OPTIONAL` what is there.

  Args:
    out: of the mining program, leading axis b.
    row: of the image.
    index: of its record.
    mined: its pairs.
  """
  values = {
    "index": np.int32(index),
    "valid": mined.valid.astype(np.float32),
    "score_gap": mined.score_gap,
  }
  names = [*shards.FIELDS, *(name for name in shards.OPTIONAL if name in out)]
  return {name: values[name] if name in values else out[name][row] for name in names}


def _count(summary, mined: types.Pairs) -> None:
  for name, count in zip(pair_rules.FILTERS, mined.dropped, strict=True):
    summary["dropped"][name] += int(count)
  summary["num_pairs"] += int(mined.valid.sum())
  for name in ("region_size", "score_gap"):
    summary[name].update(map(_ROUNDED, getattr(mined, name)[mined.valid].tolist()))


def is_finished(path: epath.Path) -> bool:
  """Whether a shard and its summary are whole."""
  return path.exists() and shards.summary_path(path).exists()


def write_manifest(config, directory: epath.Path) -> None:
  """Adds up the shards' summaries.

  Raises:
    MiningError: if there is no pair at all.
  """
  entries: list[dict] = []
  dropped, sizes, gaps = Counter(), Counter(), Counter()
  num_images = num_bytes = 0
  for shard in range(config.mine.num_shards):
    path = shards.summary_path(shards.shard_path(directory, shard, config.mine.num_shards))
    summary = files.read_json(path)
    entries.append({key: summary[key] for key in ("file", "sha256", "count")})
    num_images += summary["num_images"]
    num_bytes += summary["num_bytes"]
    for total, name in ((dropped, "dropped"), (sizes, "region_size"), (gaps, "score_gap")):
      total.update(summary[name])
  if not sizes:
    taken = ", ".join(f"{name} {number}" for name, number in dropped.items())
    raise errors.MiningError(
      f"mining {num_images} images left no pair; candidate pairs taken by each filter: {taken}. "
      "'identical' asks for more diverse proposals (config.proposals.noise_scale, mix), 'tie' for "
      "another judge, 'score_gap' and 'region_size' for other limits in config.mine; start again "
      "in a new workdir, with --config.base.workdir to keep the base"
    )
  sizes, counts = _sorted(sizes)
  edges = np.unique(np.geomspace(1, max(sizes[-1], 2), 25).round()).astype(np.int64)
  edges = np.append(edges, edges[-1] + 1)
  histogram, _ = np.histogram(sizes, bins=edges, weights=counts)
  num_pairs = int(counts.sum())
  found = {
    "shards": entries,
    "num_images": num_images,
    "num_pairs": num_pairs,
    "num_bytes": num_bytes,
    "bytes_per_pair": num_bytes / num_pairs,
    "dropped": dict(dropped),
    "region_size": {
      **quantiles(sizes, counts),
      "histogram": {"edges": edges.tolist(), "counts": histogram.tolist()},
    },
    "score_gap": quantiles(*_sorted(gaps)),
  }
  _write(config, directory, found)


def write_empty(config, directory: epath.Path, left_out: str = "") -> None:
  """The manifest of a phase without pairs: no shard, and zeros for all figures.

  Args:
    config: of the phase.
    directory: `pairs/`.
    left_out: why the phase is not to be trained, see `shards.left_out`; empty if it is.
  """
  zeros = dict.fromkeys(("p5", "p50", "p95"), 0.0)
  found = dict.fromkeys(("num_images", "num_pairs", "num_bytes"), 0) | {
    "shards": [],
    "bytes_per_pair": 0.0,
    "dropped": dict.fromkeys(pair_rules.FILTERS, 0),
    "region_size": {**zeros, "histogram": {"edges": [1, 2], "counts": [0]}},
    "score_gap": zeros,
    "left_out": left_out,
  }
  _write(config, directory, found)


def _write(config, directory: epath.Path, found: dict) -> None:
  files.write_json(
    directory / "manifest.json",
    {
      **found,
      "rule": config.mine.rule,
      "judge": config.judge.name,
      "mix": config.proposals.mix,
      "seed": config.seed,
      "proposals": files.read_json(directory / "proposals.json"),
      "fingerprints": files.read_json(directory / "fingerprints.json"),
    },
  )


def _sorted(found: Counter) -> tuple[np.ndarray, np.ndarray]:
  """Values f64[N], rising, and how many there are of each, i64[N]."""
  items = sorted((float(value), count) for value, count in found.items())
  values, counts = zip(*items, strict=True)
  return np.array(values, np.float64), np.array(counts, np.int64)


def quantiles(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
  """The 5th, 50th and 95th percentile of values of which there are several each.

  As `np.quantile` has them of all values in a row, x: x[r] where r = q (sum of counts - 1) is
  whole, and between x[floor r] and x[floor r + 1] in proportion otherwise.

  Args:
    values: f64[N], rising.
    counts: i64[N], positive.
  """
  ends = np.cumsum(counts)
  ranks = np.array([0.05, 0.5, 0.95]) * (ends[-1] - 1)
  low, high = (
    values[np.searchsorted(ends, place, side="right")]
    for place in (np.floor(ranks), np.ceil(ranks))
  )
  found = low + (high - low) * (ranks - np.floor(ranks))
  return dict(zip(("p5", "p50", "p95"), found.tolist(), strict=True))
