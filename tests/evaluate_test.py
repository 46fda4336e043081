"""Evaluation on a tiny phantom with made-up checkpoints, and on stacks of slices made by hand."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, models, types
from rndpo_jax.checks import config_checks
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader
from rndpo_jax.evaluation import cases, delivered, label_free, metrics, predict, results
from rndpo_jax.evaluation import validation_pairs as pairs_lib
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import judges
from rndpo_jax.runtime import files
from rndpo_jax.stages import evaluate, finetune, phases, prepare
from rndpo_jax.training import checkpoint

NAMES = ("dice", "iou", "hd95", "assd", "nsd")


def _config():
  config = config_lib.base_config()
  config.data.size, config.data.crop = (16, 16), (24, 26)
  config.data.num_classes = 4
  config.data.phantom.num_cases, config.data.phantom.size = 14, (28, 24)
  config.data.num_labelled, config.data.num_val, config.data.num_test = 2, 3, 7
  config.mine.num_shards = 2
  config.model.width, config.model.depth = 4, 2
  config.finetune.num_steps, config.finetune.eval_every_steps = 4, 2
  config.evaluate.batch_size = 4
  config.evaluate.metrics = NAMES
  config_checks.validate(config)
  return config


def _write_checkpoints(config, workdir):
  """A base and two checkpoints: the first is random, the later ones a little off the base."""
  segmenter = models.build(config.model, num_classes=4, spatial_dims=2)
  image = np.zeros((1, 16, 16, 1), np.float32)
  params = jax.jit(segmenter.init)(jax.random.key(0), image)
  checkpoint.save(workdir / "base" / "params", 5, params)
  dataset = dataset_lib.open_dataset(config, workdir)
  files.write_json(
    workdir / "base" / "selected.json", {"step": 5, "fingerprints": {"data": dataset.fingerprint}}
  )
  made_of = finetune.made_of(config, workdir, workdir / "pairs", dataset, jax.device_get(params))
  files.write_json(workdir / "finetune" / "done.json", {"step": 4, "fingerprints": made_of})
  for step, seed in ((2, 1), (4, 2)):
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    moved = jax.tree.map(lambda x, k=keys: x + 0.3 * jax.random.normal(next(k), x.shape), params)
    checkpoint.save(workdir / "finetune" / "params", step, moved)


def open_evaluation(config, workdir):
  dataset = dataset_lib.open_dataset(config, workdir)
  params = evaluate.params_of_step(
    workdir, dataset, {step: place for step, *place in phases.checkpoints(config, workdir)}
  )
  return predict.open_evaluation(config, dataset, workdir / "evaluate", params)


def _write_pairs(config, workdir):
  judge = {"pair_accuracy": 0.7, "kendall_tau": None, "top1_regret": 0.1, "split": "val"}
  files.write_json(workdir / "pairs" / "judges.json", {"agreement": judge | {"used": True}})
  manifest = {
    "num_pairs": 9,
    "shards": [],
    "dropped": {"tie": 1, "score_gap": 0, "identical": 3, "region_size": 0},
    "region_size": {"p5": 1.0, "p50": 2.0, "p95": 8.0, "histogram": {"edges": [], "counts": []}},
  }
  files.write_json(workdir / "pairs" / "manifest.json", manifest)
  # Of each of 3 validation images 3 proposals, the first being the truth, and 2 pairs.
  dataset = dataset_lib.open_dataset(config, workdir)
  index = dataset.splits["val"]
  labels = [dataset_lib.load_example(dataset, i, with_labels=True)["label"] for i in index]
  masks = np.stack([[label, np.roll(label, 1, 0), np.roll(label, 3, 1)] for label in labels])
  truth = np.asarray(judges.true_scores(masks, np.stack(labels), 4))
  pairs = types.Pairs(
    chosen=np.array([[0, 2], [0, 1], [1, 0]]),
    rejected=np.array([[1, 0], [2, 0], [0, 0]]),
    score_gap=np.ones((3, 2), np.float32),
    region_size=np.array(
      [[(a != b).sum() for a, b in ((m[0], m[1]), (m[2], m[0]))] for m in masks]
    ),
    valid=np.array([[True, True], [True, True], [True, False]]),
    dropped=None,
  )
  packed = bit_planes.pack(masks, 4, 2)
  pairs_lib.write(workdir / "pairs" / "validation.npz", index, packed, truth, pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, workdir, results) of one evaluation."""
  config, workdir = _config(), tmp_path_factory.mktemp("evaluate")
  prepare.run(config, workdir)
  _write_pairs(config, workdir)
  _write_checkpoints(config, workdir)
  evaluate.run(config, workdir)
  return config, workdir, files.read_json(workdir / "results.json")


def test_what_was_measured_on_other_data_is_not_used(run):
  config, workdir, _ = run
  evaluation = open_evaluation(config, workdir)
  params = evaluation.params(0)
  other = evaluation._replace(dataset=evaluation.dataset._replace(fingerprint="of other pixels"))
  found = [cases._fingerprint(one, params) for one in (evaluation, evaluation, other)]
  assert found[0] == found[1] != found[2]


def _masks_by_definition(config, workdir, step):
  """Record index -> (mask, label), one image at a time, by np.argmax on the record's own grid."""
  dataset = dataset_lib.open_dataset(config, workdir)
  segmenter = models.build(config.model, num_classes=4, spatial_dims=2)
  folder = workdir / ("finetune" if step else "base") / "params"
  params = checkpoint.restore_params(folder, step or 5, stage_directory=folder)
  apply = jax.jit(segmenter.apply)
  found = {}
  for index in dataset.splits["test"]:
    image = dataset_lib.load_example(dataset, index, with_labels=False)["image"]
    logits = np.asarray(apply(params, image[None]))[0]
    native = dataset_lib.load_native(dataset, index, with_labels=True)
    mask = np.argmax(loader.to_native(logits, native["label"].shape, config.data.crop), axis=-1)
    found[index] = (mask.astype(np.uint8), native["label"])
  return found


@pytest.mark.parametrize("model, step", [("base", 0), ("finetuned", 4)])
def test_test_metrics_follow_the_definition(run, model, step):
  config, workdir, found = run
  rows = []
  for mask, label in _masks_by_definition(config, workdir, step).values():
    row = {
      "dice": np.mean(metrics.dice(mask, label, 4, 2)),
      "iou": np.mean(metrics.iou(mask, label, 4, 2)),
    }
    surface = [metrics.surface_metrics(mask == c, label == c, None, 2.0) for c in (1, 2, 3)]
    rows.append(row | {name: np.mean([s[name] for s in surface]) for name in metrics.SURFACE})
  assert len(rows) == 7
  for name in NAMES:
    want = np.mean([row[name] for row in rows])
    assert found[model]["test"][name] == pytest.approx(want, rel=1e-5), name


def test_results_hold_the_contract(run):
  _, workdir, found = run
  assert (workdir / "evaluate" / "rankseg" / "curve-0.json").exists()
  points = found["label_free"]["checkpoints"]
  assert [point["step"] for point in points] == [0, 2, 4] and found["label_free"]["oracle"]
  assert points[0]["kl"] == 0 and points[0]["agreement"] == 1 and points[1]["kl"] > 0
  for split in ("val", "test"):
    assert list(found["rankseg"][split]) == ["dice", "iou"]
    assert 0 < found["rankseg"][split]["dice"] < 1
  assert found["dataset"] == "phantom" and found["seed"] == 0
  assert found["objective"] == "rn_dpo" and found["judge"] == "agreement"
  assert found["num_labelled_cases"] == 2 and not found["study"]
  for model in ("base", "finetuned", "selected", "delivered"):
    for split in ("val", "test"):
      assert list(found[model][split]) == list(NAMES)
  assert [point["step"] for point in found["curve"]] == [0, 2, 4]
  for point, model in ((found["curve"][0], "base"), (found["curve"][2], "finetuned")):
    assert point["test_dice"] == found[model]["test"]["dice"]
    assert point["val_dice"] == found[model]["val"]["dice"]
  best = max(found["curve"], key=lambda point: point["val_dice"])
  assert found["selected"]["step"] == best["step"] and found["selected"]["rule"] == "validation"
  assert found["selected"]["test"]["dice"] == best["test_dice"]
  assert found["sustained"]["final"] == found["curve"][2]["test_dice"]
  assert found["judges"]["agreement"]["kendall_tau"] is None
  assert found["pairs"]["count"] == 9 and found["pairs"]["dropped_identical"] == 3
  assert found["spacing_unit"] == "voxel" and found["units"]["hd95"] == "voxel"
  assert found["empty_masks"]["base"]["test"]["total"] == 7 * 3


def _delivered_dice(config, workdir, step):
  """Mean test Dice of the parameters in `delivered/`, by hand."""
  folder = workdir / "delivered"
  params = checkpoint.restore_params(folder / "params", step, stage_directory=folder)
  dataset = dataset_lib.open_dataset(config, workdir)
  evaluation = predict.open_evaluation(config, dataset, workdir / "again", lambda _: params)
  return results.mean_metrics(cases.overlap_cases(evaluation, 9), "test", ["dice"])["dice"]


@pytest.mark.parametrize("asked,near", [(0.9, False), (0.0, False), (0.9, True)])
def test_delivered_holds_the_model_that_results_name(run, tmp_path, monkeypatch, asked, near):
  """Of 3 cases nothing is shown at 0.9: the base, or what is near it; 0 takes the last."""
  monkeypatch.setattr(label_free, "passes", lambda points, max_kl: [near] * (len(points) - 1))
  monkeypatch.setattr(delivered, "NEAR_PROBABILITY", 0.0)
  shutil.copytree(run[1], tmp_path / "run")
  config, workdir = _config(), tmp_path / "run"
  config.evaluate.delivered_min_probability = asked
  (workdir / "results.json").unlink()
  evaluate.run(config, workdir)
  found = files.read_json(workdir / "results.json")["delivered"]
  content = files.read_json(workdir / "delivered" / "delivered.json")
  passing = [c["step"] for c in content["checkpoints"] if near or c["probability"] >= asked]
  assert found["step"] == content["step"] == max(passing, default=0)
  assert found["is_base"] == (asked == 0.9 and not near) and found["reason"] == content["reason"]
  assert checkpoint.steps(workdir / "delivered" / "params") == [found["step"]]
  assert _delivered_dice(config, workdir, found["step"]) == found["test"]["dice"]
  assert content["fingerprints"].keys() == {"data", "base", "params"}


def test_margins_of_validation_pairs_follow_the_definition(run):
  """sum_{p in D} (z_p[y+_p] - z_p[y-_p]) of each pair, one image at a time."""
  config, workdir, found = run
  pairs = pairs_lib.read(workdir / "pairs" / "validation.npz")
  evaluation = open_evaluation(config, workdir)
  got = pairs_lib.margins(config, evaluation, pairs, [0, 4])
  segmenter = models.build(config.model, num_classes=4, spatial_dims=2)
  for step, rows in zip((0, 4), got, strict=True):
    for n, index in enumerate(pairs["index"]):
      image = dataset_lib.load_example(evaluation.dataset, index, with_labels=False)["image"]
      z = np.float64(segmenter.apply(evaluation.params(step), image[None]))[0]
      masks = np.asarray(bit_planes.unpack(pairs["masks"][n], (16, 16), 4)).astype(np.int64)
      of = [np.take_along_axis(z, m[..., None], -1).sum() for m in masks]
      want = [of[a] - of[b] for a, b in zip(pairs["chosen"][n], pairs["rejected"][n], strict=True)]
      np.testing.assert_allclose(rows[n], want, rtol=1e-4, atol=1e-4)
  assert np.abs(got[1] - got[0]).max() > 1
  # Image 0: right, wrong; 1: right, wrong; 2: wrong.
  assert found["harm"]["num_pairs"] == 5 and found["harm"]["wrong_share"] == pytest.approx(3 / 5)
  content = files.read_json(workdir / "evaluate" / "harm.json")
  assert content["curve"][0] == found["harm"]["first"] and len(content["curve"]) == 3
  assert content["curve"][0]["h_per_pixel"] == {"right": 0.0, "wrong": 0.0}
  assert content["curve"][0]["region"]["wrong_mass"] == pytest.approx(3 / 5)


def test_cases_csv_averages_to_the_results(run):
  _, workdir, found = run
  with (workdir / "evaluate" / "cases.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 4 * (3 + 7) * 3  # models, cases, classes
  for model in ("base", "finetuned", "selected"):
    for split in ("val", "test"):
      some = [row for row in rows if row["model"] == model and row["split"] == split]
      for name in NAMES:
        mean = np.mean([float(row[name]) for row in some])  # every case has as many classes
        assert found[model][split][name] == pytest.approx(mean)
  missed = [r for r in rows if r["model"] == "base" and r["split"] == "test"]
  missed = [r for r in missed if r["mask_empty"] == "1" and r["label_empty"] == "0"]
  assert len(missed) == found["empty_masks"]["base"]["test"]["mask_only"]
  assert all(float(row["dice"]) == 0 for row in missed)


def test_gallery_shows_the_masks_that_were_measured(run):
  config, workdir, _ = run
  dataset = dataset_lib.open_dataset(config, workdir)
  before = _masks_by_definition(config, workdir, 0)
  after = _masks_by_definition(config, workdir, 4)
  with np.load(workdir / "evaluate" / "gallery.npz") as gallery:
    assert len(set(gallery["case_id"].tolist())) == 6
    for n, case in enumerate(gallery["case_id"]):
      index = next(i for i in before if dataset.records[i]["case_id"] == case)
      np.testing.assert_array_equal(gallery[f"label_{n}"], before[index][1])
      np.testing.assert_array_equal(gallery[f"base_{n}"], before[index][0])
      np.testing.assert_array_equal(gallery[f"finetuned_{n}"], after[index][0])
      assert gallery[f"image_{n}"].shape == (28, 24, 1)
      dice = float(np.mean(metrics.dice(*after[index], 4, 2)))
      assert gallery["finetuned_dice"][n] == pytest.approx(dice, rel=1e-5)


def test_rerun_after_any_loss_gives_equal_files(run):
  config, workdir, _ = run
  names = ("results.json", "evaluate/cases.csv", "evaluate/curve-2.json")
  names += ("delivered/delivered.json", "evaluate/harm.json")
  want = [(workdir / name).read_bytes() for name in names]
  folder = workdir / "evaluate"
  (folder / "curve-0.json").unlink()
  (folder / "curve-2.json").write_text('{"step": 2, "fing')
  stale = json.loads((folder / "surface-4.json").read_text())
  stale["fingerprint"] = "of another checkpoint"
  stale["cases"][0]["surface"][0]["hd95"] = 1e6
  (folder / "surface-4.json").write_text(json.dumps(stale))
  (workdir / "results.json").unlink()
  kept = next((workdir / "delivered" / "params").glob("*/d/*"))
  kept.write_bytes(b"lost")
  evaluate.run(config, workdir)
  assert [(workdir / name).read_bytes() for name in names] == want


def test_what_is_known_is_not_measured_again(run, monkeypatch):
  config, workdir, _ = run
  evaluation = open_evaluation(config, workdir)
  want = cases.overlap_cases(evaluation, 2)
  batch = next(iter(evaluation.batches((0,))))
  size = tuple(evaluation.dataset.size)
  resize = predict.resize_matrices([size] * len(batch.images), size, evaluation.dataset.crop)
  masks = evaluation.predict_batch(evaluation.params(2), batch.images, resize)
  assert len(masks.sharding.device_set) == jax.local_device_count() > 1
  known = cases.surface_cases(evaluation, 0, cases.overlap_cases(evaluation, 0))
  monkeypatch.setattr(predict, "predict", None)
  got = cases.overlap_cases(evaluation, 2)
  for a, b in zip(got, want, strict=True):
    assert a.case_id == b.case_id and (a.counts == b.counts).all()
  assert known[0].surface == cases.surface_cases(evaluation, 0, known)[0].surface


def test_without_checkpoints_the_stage_to_run_is_named(run, tmp_path):
  with pytest.raises(errors.DataError, match="run the stage 'finetune' first"):
    evaluate.run(run[0], tmp_path)
