"""Whole images judged as one and trained on by tiles, in the native mode."""

import json

import jax
import native_jobs
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native, tiles
from rndpo_jax.losses import bit_planes
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.stages import base


def _own_pairs(logits):
  """[(chosen, rejected), ...] of a whole image by agreement: the best against the worst ones."""
  background = np.array([1.0, 0.0, 0.0])
  shifted = [logits - shift * background for shift in (0.0, -4.0, 0.0, 4.0)]
  masks = [np.argmax(one, axis=-1) for one in shifted]
  scores = [sum(native_jobs.dice(m, o) for o in masks) - 1 for m in masks]
  best = int(np.argmax(scores))
  others = [k for k in sorted(range(4), key=lambda k: scores[k]) if (masks[k] != masks[best]).any()]
  return [(masks[best], masks[k]) for k in others[:2]]


def test_whole_images_are_judged_as_one_and_trained_on_by_tiles(native_job, tmp_path, monkeypatch):
  config, workdir, _ = native_job
  config = config.copy_and_resolve_references()
  changes = {"base.workdir": str(workdir), "mine.whole_images": True, "mine.rule": "top_vs_bottom"}
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  is_2d = config.data.spatial_dims == 2
  pipeline.run(config, tmp_path / "work", ("base", "mine") if is_2d else config_lib.STAGES)
  dataset = dataset_lib.open_dataset(config, workdir)
  view, found = tiles.view(dataset), {}
  for record in shards.read(tmp_path / "work/pairs"):
    found[int(record["index"])] = record
  segmenter = models.build(config.model, num_classes=3, spatial_dims=dataset.spatial_dims)
  params, apply = base.load(workdir, dataset), jax.jit(segmenter.apply)
  logits_of = lambda images: apply(params, images)  # noqa: E731
  records = [int(i) for i in dataset.splits["unlabelled"] if native.is_seen(dataset.boxes[i])]
  count = 0
  for index in records[::5] if is_2d else records:
    image = dataset_lib.load_on_spacing(dataset, index, with_labels=False)["image"]
    expected = _own_pairs(native_jobs.logits(logits_of, image, view.size))
    differs, sizes = np.zeros((2, *image.shape[:-1]), bool), np.zeros(2)
    for tile in np.flatnonzero(view.tiles.record == index):
      record = found.get(int(tile))
      for slot, pair in enumerate(expected):
        cuts = [view.tiles.cut(tile, mask) for mask in pair]
        if record is None or not record["valid"][slot]:
          assert np.count_nonzero(cuts[0] != cuts[1]) <= 1  # an argmax of equals
          continue
        count += 1
        sides = ("chosen", "rejected")
        own = [np.asarray(bit_planes.unpack(record[side][slot], view.size, 3)) for side in sides]
        assert sum(np.count_nonzero(a != b) for a, b in zip(own, cuts, strict=True)) <= 2
        in_tile, in_image = record["region_sizes"][:, slot]
        assert np.count_nonzero(own[0] != own[1]) == in_tile > 0
        assert abs(np.count_nonzero(pair[0] != pair[1]) - in_image) <= 2
        _paste(view, tile, own[0] != own[1], differs[slot])
        shown = dataset_lib.load_example(view, int(tile), with_labels=False)["image"]
        z = np.asarray(logits_of(shown[None])[0], np.float64)
        picked = [np.take_along_axis(z, m[..., None].astype(int), -1).sum() for m in own]
        margin = record["reference_margin"][slot]
        np.testing.assert_allclose(margin, picked[0] - picked[1], rtol=1e-3, atol=1e-3)
        sizes[slot] = in_image
    np.testing.assert_array_equal(differs.reshape(2, -1).sum(axis=1), sizes)
  assert count > 10
  if is_2d:
    _check_devices(config, tmp_path, monkeypatch)
  else:
    _check_weights(config, tmp_path / "work", dataset, found)


def _paste(view, tile, values, whole):
  """Sets what a tile holds of its image."""
  start = [int(s) for s in view.records[tile]["record_id"].partition("@")[2].split(",")]
  rows = list(zip(start, view.size, whole.shape, strict=True))
  there = tuple(slice(max(s, 0), min(s + p, n)) for s, p, n in rows)
  here = tuple(slice(max(-s, 0), min(n - s, p)) for s, p, n in rows)
  whole[there] |= values[here]


def _check_devices(config, folder, monkeypatch):
  """The same pairs of three devices, to the last bit."""
  local = jax.local_devices()[:3]
  monkeypatch.setattr(jax, "local_devices", lambda: local)
  monkeypatch.setattr(jax, "local_device_count", lambda: 3)
  pipeline.run(config, folder / "three", ("base", "mine"))
  hashes = [
    [
      shard["sha256"]
      for shard in json.loads((folder / run / "pairs/manifest.json").read_text())["shards"]
    ]
    for run in ("work", "three")
  ]
  assert hashes[0] == hashes[1]


def _check_weights(config, work, dataset, found):
  """Fine-tuning weighs a tile by its share of D; the job's measures are of whole cases."""
  batch = next(pair_batches.stream_of(config, work / "pairs", dataset)(0, 0)).pairs
  shares = {
    tuple(record["reference_margin"]): record["valid"]
    * np.divide(*np.where(record["valid"] > 0, record["region_sizes"], 1))
    for record in found.values()
  }
  for margin, weight in zip(batch.reference_margin, batch.weight, strict=True):
    np.testing.assert_allclose(weight, shares[tuple(margin)], rtol=1e-6)
  assert (batch.weight < 1).any() and (batch.weight > 0).any()
  results = json.loads((work / "results.json").read_text())
  assert (work / "report.html").exists()
  with np.load(work / "pairs/validation.npz") as pairs:
    size, image_size = (pairs[name] for name in ("region_size", "image_region_size"))
    at = (pairs["truth"][np.arange(len(size))[:, None], pairs[n]] for n in ("chosen", "rejected"))
    gain = np.subtract(*at)
  share = np.where(gain != 0, size / np.maximum(image_size, 1), 0)  # of the mass at step 0
  assert results["harm"]["num_pairs"] == np.count_nonzero(share) and (share <= 1).all()
  wrong = share[gain < 0].sum() / share.sum()
  assert results["harm"]["first"]["region"]["wrong_mass"] == pytest.approx(wrong, abs=1e-9)
  assert 0 < share[share > 0].min() < 1
  manifest = json.loads((work / "pairs/manifest.json").read_text())
  assert manifest["num_images"] == len(dataset.splits["unlabelled"])
  judged = json.loads((work / "pairs/judges.json").read_text())["agreement"]
  assert judged["num_cases"] == 2
