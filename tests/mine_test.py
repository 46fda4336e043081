"""The mining stage: invariant to devices and batch size, no communication, files that hold."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import serialization

from rndpo_jax import losses, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader as data_pipeline
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining.program import make_mine_batch
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.runtime import files, sharding
from rndpo_jax.stages import base, mine


def shard_hashes(workdir):
  return [shard["sha256"] for shard in files.read_json(workdir / "pairs/manifest.json")["shards"]]


@pytest.mark.parametrize("devices,batch_size", [(3, 1), (1, 5)])
def test_pairs_do_not_depend_on_devices_or_batch_size(
  tiny_run, tiny_config, tmp_path, monkeypatch, devices, batch_size
):
  _, first = tiny_run
  local = jax.local_devices()[:devices]
  monkeypatch.setattr(jax, "local_devices", lambda: local)
  monkeypatch.setattr(jax, "local_device_count", lambda: devices)
  config = tiny_config(base__workdir=str(first), mine__batch_size=batch_size)
  pipeline.run(config, tmp_path, ["base", "mine"])
  if batch_size == 1:  # as in the first: each device runs the same program
    assert shard_hashes(tmp_path) == shard_hashes(first)
  tables = [shards.read(workdir / "pairs") for workdir in (first, tmp_path)]
  assert len(tables[0]) == len(tables[1]) > 0
  for ours, theirs in zip(*tables, strict=True):
    for name in ("index", "chosen", "rejected", "valid"):
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in ("score_gap", "reference_margin", "reference_log_prob"):
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_compiled_program_has_no_communication(tiny_run):
  config, workdir = tiny_run
  dataset = dataset_lib.open_dataset(config, workdir)
  weights, score = mine.make_scorer(config, workdir, dataset)
  program = mine.on_local_devices(make_mine_batch(config, dataset, score), weights)
  batch = next(data_pipeline.batches(dataset, range(8), batch_size=8, with_labels=False))
  placed = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), batch)
  assert isinstance(program, functools.partial)
  text = program.func.lower(weights, jax.random.key(0), placed).compile().as_text()
  assert "HloModule" in text
  for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "send(", "recv("):
    assert word not in text, word


def test_records_hold_what_the_masks_and_the_base_give(tiny_run):
  config, workdir = tiny_run
  dataset = dataset_lib.open_dataset(config, workdir)
  segmenter_logits = _base_logits(config, workdir, dataset)
  manifest = files.read_json(workdir / "pairs/manifest.json")
  count, found = 0, []
  for record in shards.read(workdir / "pairs"):
    index = int(record["index"])
    assert index in dataset.splits["unlabelled"]
    chosen, rejected = (
      np.asarray(bit_planes.unpack(record[name], dataset.size, dataset.num_classes))
      for name in ("chosen", "rejected")
    )
    valid = record["valid"] > 0
    count += valid.sum()
    sizes = (chosen != rejected).sum((1, 2))
    found += sizes[valid].tolist()
    assert (sizes[valid] > 0).all() and (record["score_gap"][valid] > 0).all()
    margin = losses.pair_margin(segmenter_logits(index), chosen[None], rejected[None])[0]
    np.testing.assert_allclose(margin, record["reference_margin"], rtol=1e-3, atol=1e-3)
  assert count == manifest["num_pairs"] > 0
  encoded = [serialization.msgpack_serialize(record) for record in shards.read(workdir / "pairs")]
  assert manifest["num_bytes"] == sum(map(len, encoded))
  assert manifest["bytes_per_pair"] == manifest["num_bytes"] / count
  histogram = manifest["region_size"]["histogram"]
  assert sum(histogram["counts"]) == count
  assert len(histogram["edges"]) == len(histogram["counts"]) + 1
  for q, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95)):
    assert manifest["region_size"][q] == pytest.approx(np.quantile(found, share))


def _base_logits(config, workdir, dataset):
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = base.load(workdir, dataset_lib.open_dataset(config, workdir))
  apply = jax.jit(segmenter.apply)

  def logits(index):
    example = dataset_lib.load_example(dataset, index, with_labels=False)
    return apply(params, example["image"][None])

  return logits


def test_learned_judge_and_ensemble_mine_pairs(tiny_config, tmp_path):
  config = tiny_config(
    base__num_members=2,
    base__member_labels=0.5,
    base__num_steps=100,
    base__eval_every_steps=100,
    judge__name="learned",
    judge__compare=("agreement",),
    judge__learned__num_steps=3,
  )
  pipeline.run(config, tmp_path, ["prepare", "base", "mine"])
  judges = files.read_json(tmp_path / "pairs" / "judges.json")
  assert judges["learned"]["used"] and not judges["agreement"]["used"]
  dataset = dataset_lib.open_dataset(config, tmp_path)
  first, second = (base.load(tmp_path, dataset, member) for member in range(2))
  shown = {member: base.shown_to(config, dataset, member).splits for member in range(4)}
  assert shown[0]["labelled"] is dataset.splits["labelled"]
  own = {tuple(shown[member]["labelled"].tolist()) for member in (1, 2, 3)}
  assert len(own) > 1 and all(len(part) == 2 for part in own)
  assert own <= {*itertools.combinations(dataset.splits["labelled"].tolist(), 2)}
  again = base.shown_to(config, dataset, 1).splits
  np.testing.assert_array_equal(again["labelled"], shown[1]["labelled"])
  assert again["val"] is dataset.splits["val"]
  assert any(
    (a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  )


def test_oracle_has_every_pair_right(tiny_run, tiny_config, tmp_path):
  _, first = tiny_run
  config = tiny_config(base__workdir=str(first), judge__name="oracle", judge__compare=())
  pipeline.run(config, tmp_path, ["base", "mine"])
  judged = files.read_json(tmp_path / "pairs" / "judges.json")["oracle"]
  assert judged["split"] == "val" and judged["num_cases"] == 3
  assert judged["labelled"]["num_cases"] == 4
  for figures in (judged, judged["labelled"]):
    assert figures["pair_accuracy"] == 1.0 and figures["top1_regret"] == 0.0
  assert shard_hashes(tmp_path) != shard_hashes(first)


def test_worker_processes_give_the_same_pairs(tiny_run, tiny_config):
  """Also: the pair files and their closure travel to another process."""
  _, workdir = tiny_run
  dataset = dataset_lib.open_dataset(tiny_config(), workdir)
  mesh = sharding.make_mesh()
  here, there = (
    pair_batches.on_devices(tiny_config(data__num_workers=n), workdir / "pairs", dataset, mesh)(5)
    for n in (0, 2)
  )
  seen = []
  for _ in range(3):
    one, two = next(here), next(there)
    assert one.labelled is None and one.unlabelled is None and one.pairs.consensus is None
    one, two = one.pairs, two.pairs
    for name, here_array, there_array in zip(one._fields[:-3], one[:-3], two[:-3], strict=True):
      np.testing.assert_array_equal(here_array, there_array, err_msg=name)
    seen.append(np.asarray(one.images).tobytes())
  assert len(set(seen)) == 3
