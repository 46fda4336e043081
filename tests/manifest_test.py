"""manifest: what summaries count, and what a manifest makes of it, against numpy on every value."""

import types as python_types

import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import types
from rndpo_jax.pairs import manifest, shards
from rndpo_jax.runtime import files


def outputs(sizes, gaps, valid):
  """One batch [b, P] as the mining stage gives it; the last image is padding."""
  b, p = np.shape(sizes)
  mined = types.Pairs(
    chosen=np.zeros((b, p), np.int32),
    rejected=np.ones((b, p), np.int32),
    valid=np.array(valid, bool),
    score_gap=np.array(gaps, np.float32),
    region_size=np.array(sizes, np.int32),
    dropped=np.ones((b, 5), np.int32),
  )
  out = {
    name: np.zeros((b, p, *(1,) * (len(field.axes) - 1)), field.dtype)
    for name, field in shards.FIELDS.items()
    if name not in ("index", "valid", "score_gap")
  }
  batch = python_types.SimpleNamespace(valid=np.arange(b) < b - 1, index=np.arange(b))
  return [(batch, {**out, "pairs": mined})]


def write(directory, *batches):
  """A shard a batch, and the manifest."""
  config = config_lib.base_config()
  config.mine.num_shards = len(batches)
  files.write_json(directory / "proposals.json", {})
  files.write_json(directory / "fingerprints.json", {"base": "b"})
  for shard, batch in enumerate(batches):
    path = shards.shard_path(directory, shard, len(batches))
    manifest.write(path, len(batch[0][0].valid) - 1, 1, batch)
  manifest.write_manifest(config, directory)
  return files.read_json(directory / "manifest.json")


def test_a_manifest_by_hand(tmp_path):
  total = write(
    tmp_path,
    outputs([[3, 7], [999, 1004], [8, 8]], [[0.5, 0.25], [0.12345, 0.5], [9, 9]], [[1, 0]] * 3),
    outputs([[1004, 1016], [5, 5]], [[0.123449, 2e-5], [9, 9]], [[True, True]] * 2),
  )
  first = files.read_json(shards.summary_path(shards.shard_path(tmp_path, 0, 2)))
  assert first["region_size"] == {"3": 1, "999": 1} and first["num_pairs"] == 2
  assert first["score_gap"] == {"0.5": 1, "0.123": 1}
  # 3, 999, 1000, 1020: the rank of the median is 1.5, that of the 95th percentile 2.85.
  assert total["num_pairs"] == 4 and total["num_images"] == 3
  size = total["region_size"]
  assert size["p50"] == 999.5 and size["p95"] == pytest.approx(1017, rel=1e-12)
  assert size["p5"] == pytest.approx(3 + 0.15 * 996, rel=1e-12)
  assert sum(size["histogram"]["counts"]) == 4 and size["histogram"]["counts"][-1] == 1
  assert size["histogram"]["edges"][-2:] == [1020, 1021]
  assert total["score_gap"]["p50"] == pytest.approx(0.123, rel=1e-12)
  assert total["dropped"]["identical"] == 3  # one an image, not of the padding


@pytest.mark.parametrize("count", [1, 2, 37, 5000])
def test_quantiles_are_those_of_numpy_on_every_value(count):
  rng = np.random.default_rng(count)
  every = np.array([float(f"{x:.3g}") for x in np.exp(rng.normal(6, 2, count))])
  found = manifest.quantiles(*np.unique(every, return_counts=True))
  expected = np.quantile(every, [0.05, 0.5, 0.95])
  np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)
  assert list(found) == ["p5", "p50", "p95"]


def test_a_summary_stays_small_however_many_pairs(tmp_path):
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 512 * 512, (10_001, 1))
  gaps = rng.uniform(0, 1, (10_001, 1))
  manifest.write(shards.shard_path(tmp_path, 0, 1), 10_000, 1, outputs(sizes, gaps, sizes > 0))
  summary = files.read_json(shards.summary_path(shards.shard_path(tmp_path, 0, 1)))
  assert len(summary["region_size"]) < 999 + 900 * 3 and len(summary["score_gap"]) < 900 * 6
  assert sum(summary["region_size"].values()) == 10_000 == summary["num_pairs"]
