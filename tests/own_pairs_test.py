"""Pairs of proposals, scores and preferences from files: by hand, through the stages."""

import jax
import numpy as np
import own_files
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, losses, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import geometry
from rndpo_jax.losses import bit_planes
from rndpo_jax.pairs import shards
from rndpo_jax.report import summary
from rndpo_jax.runtime import files
from rndpo_jax.stages import base

SIZE = (16, 16)
NAMES = ("a", "b", "c")
# Boxes of 2, 6 and 12 rows, which differ on the model's grid too, and their scores: of an image at
# an even place, and of one at an odd place.
ROWS = {"a": 2, "b": 6, "c": 12}
SCORES = ({"a": 0.5, "b": 0.9, "c": 0.1}, {"a": 3.0, "b": -1.0, "c": 7.0})
# By top_vs_bottom: the best against the worst, then against the next.
PAIRS = ([("b", "c"), ("b", "a")], [("c", "b"), ("c", "a")])


def drawn(name):
  return own_files.mask(4, 3, ROWS[name], 8)


def on_grid(name):
  return geometry.mask_to_model(drawn(name), SIZE, ())


def write(root, splits, dataset, reverse=False):
  """Masks and scores of the unlabelled and, by their truth, of the validation images."""
  rows = []
  for place, image in enumerate(splits["unlabelled"]):
    for name in NAMES[: 3 - place % 3 // 2]:  # the third of three images lacks c
      own_files.write_mask(root / name / f"{image}.png", drawn(name))
      rows.append((image, name, SCORES[place % 2][name]))
  for place, image in enumerate(splits["val"]):
    index = list(dataset.records.ids("record_id")).index(image.encode())
    label = dataset.source[index]["mask"]
    half = label.copy()
    half[::2] = 0
    for rank, (name, one) in enumerate(zip(NAMES, (label, half, 0 * label), strict=True)):
      own_files.write_mask(root / name / f"{image}.png", one)
      rows.append((image, name, rank if place == 0 else -rank))  # all wrong in one case of three
  rows = rows[::-1] if reverse else rows
  return own_files.write_rows(root / "scores.csv", ("image", "proposal", "score"), rows).parent


@pytest.fixture
def with_files(tiny_run, tiny_config, tmp_path):
  """(config of own proposals, their folder); the base is the tiny run's."""
  _, first = tiny_run
  splits = files.read_json(first / "splits.json")
  dataset = dataset_lib.open_dataset(tiny_config(), first)
  root = write(tmp_path / "own", splits, dataset)
  options = {
    "base__workdir": str(first), "proposals__mix": "file:3", "judge__name": "file",
    "judge__compare": ("agreement",), "mine__rule": "top_vs_bottom",
  }  # fmt: skip
  return lambda folder=root, **more: tiny_config(data__proposals=str(folder), **options, **more)


def pairs_of(workdir):
  """Record index -> [(chosen, rejected, score gap, reference margin), ...]."""
  found = {}
  for record in shards.read(workdir / "pairs"):
    masks = [bit_planes.unpack(record[side], SIZE, 2) for side in ("chosen", "rejected")]
    rows = zip(
      *map(np.asarray, masks), record["score_gap"], record["reference_margin"], strict=True
    )
    valid = record["valid"] > 0
    found.setdefault(int(record["index"]), []).extend(
      row for row, is_pair in zip(rows, valid, strict=True) if is_pair
    )
  return found


def margin(config, workdir, dataset):
  """(record index, chosen, rejected) -> the base's margin."""
  segmenter = models.build(config.model, num_classes=2, spatial_dims=2)
  params, apply = base.load(workdir, dataset), jax.jit(segmenter.apply)

  def of(index, chosen, rejected):
    image = dataset_lib.load_example(dataset, index, with_labels=False)["image"]
    return losses.pair_margin(apply(params, image[None]), chosen[None], rejected[None])[0]

  return of


def test_pairs_of_files_are_those_of_their_scores(with_files, tiny_run, tmp_path, monkeypatch):
  config = with_files()
  pipeline.run(config, tmp_path / "run", ["base", "mine"])
  _, first = tiny_run
  dataset = dataset_lib.open_dataset(config, first)
  found, of_base = pairs_of(tmp_path / "run"), margin(config, first, dataset)
  splits = files.read_json(first / "splits.json")
  ids = [name.decode() for name in dataset.records.ids("record_id")]
  for place, image in enumerate(splits["unlabelled"]):
    index, expected = ids.index(image), PAIRS[place % 2]
    if place % 3 == 2:  # without c: b over a, or a over b
      expected = [("b", "a")] if place % 2 == 0 else [("a", "b")]
    assert len(found[index]) == len(expected)
    for (better, worse), (chosen, rejected, gap, reference) in zip(
      expected, found[index], strict=True
    ):
      np.testing.assert_array_equal(chosen, on_grid(better))
      np.testing.assert_array_equal(rejected, on_grid(worse))
      scores = SCORES[place % 2]
      np.testing.assert_allclose(gap, scores[better] - scores[worse], rtol=1e-6)
      expected_margin = of_base(index, on_grid(better), on_grid(worse))
      np.testing.assert_allclose(reference, expected_margin, rtol=1e-4, atol=1e-4)
  manifest = files.read_json(tmp_path / "run/pairs/manifest.json")
  count = len(splits["unlabelled"])
  assert manifest["num_pairs"] == 2 * count - count // 3 and not any(manifest["dropped"].values())
  judged = files.read_json(tmp_path / "run/pairs/judges.json")["file"]
  assert judged["pair_accuracy"] == pytest.approx(2 / 3) and judged["num_cases"] == 3
  assert judged["mined"]["pair_accuracy"] == pytest.approx(2 / 3)
  assert judged["labelled"]["pair_accuracy"] is None  # no masks of labelled images
  _check_invariance(with_files, dataset, splits, tmp_path, monkeypatch)
  # Another score, the rest being kept: the pairs are not gone on with.
  scores = tmp_path / "own/scores.csv"
  scores.write_text(scores.read_text().replace("0.5", "0.6"))
  with pytest.raises(errors.ProvenanceError, match="not made from this proposals.*delete"):
    pipeline.run(config, tmp_path / "run", ["mine"])  # though they are finished
  (tmp_path / "run/pairs/manifest.json").unlink()
  with pytest.raises(errors.ProvenanceError, match="not made from this proposals"):
    pipeline.run(config, tmp_path / "run", ["mine"])


def _check_invariance(with_files, dataset, splits, tmp_path, monkeypatch):
  """The same pairs with other devices, another folder and the lines in another order."""
  other = write(tmp_path / "other", splits, dataset, reverse=True)
  local = jax.local_devices()[:3]
  monkeypatch.setattr(jax, "local_devices", lambda: local)
  monkeypatch.setattr(jax, "local_device_count", lambda: 3)
  pipeline.run(with_files(other), tmp_path / "three", ["base", "mine"])
  hashes = [
    [shard["sha256"] for shard in files.read_json(run / "pairs/manifest.json")["shards"]]
    for run in (tmp_path / "run", tmp_path / "three")
  ]
  assert hashes[0] == hashes[1]


def test_a_judge_that_cannot_be_measured_is_said_and_refused(with_files, tmp_path, capsys):
  """Mixed with the base, whose masks have no score; validation images have no masks."""
  for path in (tmp_path / "own").rglob("*.png"):
    if any(path.stem == image for image in _validation(with_files())):
      path.unlink()
  scores = tmp_path / "own/scores.csv"
  kept = [
    line
    for line in scores.read_text().splitlines()
    if line.split(",")[0] not in _validation(with_files())
  ]
  scores.write_text("\n".join(kept))
  config = with_files(judge__gate__action="refuse").copy_and_resolve_references()
  config.proposals.mix = "base:1,file:3"
  with pytest.raises(errors.MiningError, match="the judge 'file' has an unknown share"):
    pipeline.run(config, tmp_path / "run", ["base", "mine"])
  said = capsys.readouterr()
  said = said.out + said.err
  assert "judge 'file': the proposals of base:1 have no score in a file" in said
  assert "judge 'file': how often it is right is unknown" in said
  judged = files.read_json(tmp_path / "run/pairs/judges.json")
  assert judged["file"]["pair_accuracy"] is None and judged["file"]["num_cases"] == 0
  found = files.read_json(tmp_path / "run/pairs/proposals.json")
  assert found["best_dice"] == found["mean_dice"] == pytest.approx(found["base_dice"])


def _validation(config):
  return files.read_json(f"{config.base.workdir}/splits.json")["val"]


def test_a_whole_job_of_preferences(tiny_run, tiny_config, tmp_path, capsys):
  _, first = tiny_run
  splits = files.read_json(first / "splits.json")
  for name in NAMES:
    own_files.write_mask(tmp_path / f"{name}.png", drawn(name))
  images = [*splits["unlabelled"][:8], splits["labelled"][0]]
  rows = [(f"images/{image}.png", "a.png", "b.png") for image in images]
  rows += [(images[0], "c.png", "a.png"), (images[0], "b.png", "a.png")]  # readers may differ
  table = own_files.write_rows(tmp_path / "p.csv", ("image", "chosen", "rejected"), rows)
  defaults = config_lib.leaves(config_lib.base_config())
  unread = ("proposals.mix", "judge.num_bootstrap", "judge.gate.action")
  config = tiny_config(
    base__workdir=str(first),
    data__preferences=str(table),
    **{key.replace(".", "__"): defaults[key] for key in unread},
  )
  pipeline.run(config, tmp_path / "run")
  assert "no judge scores them, and the gate is off" in "".join(capsys.readouterr())
  dataset = dataset_lib.open_dataset(config, first)
  found, of_base = pairs_of(tmp_path / "run"), margin(config, first, dataset)
  ids = [name.decode() for name in dataset.records.ids("record_id")]
  assert sorted(found) == sorted(map(ids.index, images))
  for place, image in enumerate(images):
    index = ids.index(image)
    expected = [("a", "b")] if place else [("a", "b"), ("c", "a"), ("b", "a")]
    for (better, worse), (chosen, rejected, _, reference) in zip(
      expected, found[index], strict=True
    ):
      np.testing.assert_array_equal(chosen, on_grid(better))
      np.testing.assert_array_equal(rejected, on_grid(worse))
      expected_margin = of_base(index, on_grid(better), on_grid(worse))
      np.testing.assert_allclose(reference, expected_margin, rtol=1e-4, atol=1e-4)
  manifest = files.read_json(tmp_path / "run/pairs/manifest.json")
  assert manifest["judge"] == manifest["rule"] == manifest["mix"] == "preferences"
  assert manifest["num_pairs"] == 11 and manifest["num_images"] == 10  # two records of one image
  results = files.read_json(tmp_path / "run/results.json")
  assert results["judge"] == "preferences" and list(results["judges"]) == ["preferences"]
  assert results["judges"]["preferences"]["pair_accuracy"] is None
  assert not [text for text in results["warnings"] if "min_accuracy" in text]
  assert results["pairs"]["count"] == 11 and results["harm"]["num_pairs"] == 0
  assert "preferences of readers" in (tmp_path / "run/report.html").read_text()
  assert "unknown of pairs right on val" in summary.text(tmp_path / "run")
  pipeline.run(config, tmp_path / "run")  # all done, of the same files
  own_files.write_mask(tmp_path / "a.png", drawn("c"))
  with pytest.raises(errors.ProvenanceError, match="not made from this preferences.*delete"):
    pipeline.run(config, tmp_path / "run")
  table.unlink()
  pipeline.run(config, tmp_path / "run")  # they have done their work
