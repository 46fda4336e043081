"""Pairs of files and of preferences in the native mode: they are cut into tiles as labels are."""

import json

import jax
import native_data
import native_jobs
import nibabel
import nnunet_models
import numpy as np
import own_files
import pytest

from configs import nnunet_model as nnunet_model_config
from rndpo_jax import config as config_lib
from rndpo_jax import errors, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import resample, tiles
from rndpo_jax.losses import bit_planes
from rndpo_jax.nnunet import imported
from rndpo_jax.pairs import shards
from rndpo_jax.stages import base
from rndpo_jax.training import checkpoint

GENERATORS = ("a", "b", "c")


def _drawn(root, case, place):
  """Masks of a case on its own grid: its label, without class 2, and moved along two axes."""
  label = np.asarray(nibabel.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
  moved = np.roll(label, (2, 3 + place % 2), (0, 1))
  return dict(zip(GENERATORS, (label, np.where(label == 2, 1, label), moved), strict=True))


def _write_drawn(root, folder, cases):
  """NAME/ID.nii.gz of each case, on its grid."""
  for place, case in enumerate(cases):
    affine = nibabel.load(root / "labelsTr" / f"{case}.nii.gz").affine
    for name, drawn in _drawn(root, case, place).items():
      (folder / name).mkdir(parents=True, exist_ok=True)
      image = nibabel.Nifti1Image(drawn.astype(np.uint8), affine)
      nibabel.save(image, folder / name / f"{case}.nii.gz")


def _on_tile(view, root, index, mask):
  """The part of a mask on a case's own grid that a tile sees, by nnU-Net's steps."""
  entry, size = view.records[index], view.size
  dims = len(size)
  stored = nibabel.load(root / "imagesTr" / f"{entry['case_id']}_0000.nii.gz")
  places = np.argwhere(np.asarray(stored.dataobj))
  box = [slice(a, b) for a, b in zip(places.min(0), places.max(0) + 1, strict=True)]
  box = (*box[:2], entry["slice"]) if dims == 2 else tuple(box)
  spacing = tuple(float(z) for z in stored.header.get_zooms()[:dims])
  lengths = [s.stop - s.start for s in box[:dims]]
  options = {"spacing": spacing, "new_spacing": native_jobs.NEW_SPACING[:dims]}
  shape = resample.resampled_shape(lengths, **options)
  found = resample.resample_mask(mask[box], shape, **options, ids=(1, 2))
  # A tile may go beyond the image on all sides, where the background is.
  start = [int(s) for s in entry["record_id"].partition("@")[2].split(",")]
  padded = np.pad(found, [(n, n) for n in size])
  return padded[tuple(slice(s + n, s + 2 * n) for s, n in zip(start, size, strict=True))]


def _by_agreement(root, cases):
  """Case -> names of the pairs of the best of three masks with the worst, then the second one."""
  found = {}
  for place, case in enumerate(cases):
    drawn = _drawn(root, case, place)
    scores = {
      name: sum(native_jobs.dice(mask, other) for other in drawn.values())
      for name, mask in drawn.items()
    }
    best, second, worst = sorted(drawn, key=scores.get, reverse=True)
    found[case] = ((best, worst), (best, second))
  return found


def _expected(view, root, cases, index, orders):
  """[(chosen, rejected)] of the tile's masks that differ, by the case's names of each pair."""
  entry = view.records[index]
  drawn = _drawn(root, entry["case_id"], cases.index(entry["case_id"]))
  masks = {name: _on_tile(view, root, index, mask) for name, mask in drawn.items()}
  order = orders[entry["case_id"]]
  pairs = [(masks[better], masks[worse]) for better, worse in order]
  return [pair for pair in pairs if (pair[0] != pair[1]).any()]


def _check_pairs(config, workdir, base_dir, root, cases, orders):
  """Every pair of the unlabelled tiles, and its margin under the base."""
  config = imported.resolve(config)
  dataset = dataset_lib.open_dataset(config, base_dir)
  view, found = tiles.view(dataset), {}
  for record in shards.read(workdir / "pairs"):
    masks = [bit_planes.unpack(record[side], view.size, 3) for side in ("chosen", "rejected")]
    rows = zip(*map(np.asarray, masks), record["reference_margin"], strict=True)
    found[int(record["index"])] = [row for row, v in zip(rows, record["valid"], strict=True) if v]
  segmenter = models.build(config.model, num_classes=3, spatial_dims=dataset.spatial_dims)
  params, apply = base.load(base_dir, dataset), jax.jit(segmenter.apply)
  count = 0
  for index in map(int, view.splits["unlabelled"]):
    if view.records[index]["case_id"] not in cases:
      continue
    expected = _expected(view, root, cases, index, orders)
    got = found.pop(index, [])
    assert len(got) == len(expected)
    if expected:
      image = dataset_lib.load_example(view, index, with_labels=False)["image"]
      logits = np.asarray(apply(params, np.repeat(image[None], 8, axis=0))[0], np.float64)
    for own, (chosen, rejected, margin) in zip(expected, got, strict=True):
      np.testing.assert_array_equal(chosen, own[0])
      np.testing.assert_array_equal(rejected, own[1])
      picked = [np.take_along_axis(logits, m[..., None].astype(int), -1).sum() for m in own]
      np.testing.assert_allclose(margin, picked[0] - picked[1], rtol=1e-3, atol=1e-3)
    count += len(expected)
  assert (
    not found and count == json.loads((workdir / "pairs/manifest.json").read_text())["num_pairs"]
  )
  return count


def test_proposals_from_files_are_cut_as_the_labels_are(native_job, tmp_path):
  """Without class 2 is taken for the worst, so the pairs are a over b, then a over c."""
  config, workdir, root = native_job
  splits = json.loads((workdir / "splits.json").read_text())
  cases = splits["unlabelled"] + splits["val"]
  _write_drawn(root, tmp_path / "own", cases)
  rows = [(case, *row) for case in cases for row in (("a", 3), ("b", 1), ("c", 2))]
  own_files.write_rows(tmp_path / "own/scores.csv", ("image", "proposal", "score"), rows)
  changes = {
    "base.workdir": str(workdir), "data.proposals": str(tmp_path / "own"), "judge.name": "file",
    "proposals.mix": "file:3", "mine.rule": "top_vs_bottom",
  }  # fmt: skip
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  stages = config_lib.STAGES if config.data.spatial_dims == 2 else ("base", "mine")
  pipeline.run(config, tmp_path / "work", stages)
  orders = dict.fromkeys(cases, (("a", "b"), ("a", "c")))
  assert _check_pairs(config, tmp_path / "work", workdir, root, cases, orders) > 20
  judged = json.loads((tmp_path / "work/pairs/judges.json").read_text())["file"]
  assert judged["pair_accuracy"] is not None and judged["num_cases"] == 2
  if config.data.spatial_dims == 3:  # scores of files are of images, so whole ones have these pairs
    config = config.copy_and_resolve_references()
    # By a vote that agreement, right in all pairs, wins over the files' scores, right in 2 of 3.
    config.mine.whole_images, config.judge.name = True, "fused"
    config.judge.compare = ("file", "agreement")
    pipeline.run(config, tmp_path / "whole", ("base", "mine"))
    orders = _by_agreement(root, cases)
    assert _check_pairs(config, tmp_path / "whole", workdir, root, cases, orders) > 20
    judged = json.loads((tmp_path / "whole/pairs/judges.json").read_text())
    shares = [judged[name]["pair_accuracy"] for name in ("fused", "agreement", "file")]
    assert shares == [1, 1, pytest.approx(2 / 3)] and judged["fused"]["mined"]["num_pairs"] == 4
    weights = judged["fused"]["weights"]
    assert weights == pytest.approx({"file": np.log(2), "agreement": np.log(99)}, rel=1e-6)


def test_preferences_on_a_trained_nnunet_are_cut_as_the_labels_are(tmp_path):
  """The whole job on the model's own grid, which is that of the 2D job; one line a case.

  There are no validation cases, so that `label_free` chooses, by tiles.
  """
  root = native_data.write(tmp_path / "raw")
  nnunet_models.write(tmp_path / "model")
  changes = {
    key: native_jobs.TINY[key]
    for key in native_jobs.TINY
    if key.startswith(("data.", "mine.", "finetune."))
  }
  changes |= {
    "base.nnunet_folder": str(tmp_path / "model"), "data.root": str(root),
    "data.preferences": str(tmp_path / "own/lines.csv"), "evaluate.batch_size": 8,
  }  # fmt: skip
  config = nnunet_model_config.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  own_files.write_rows(tmp_path / "own/lines.csv", ("image", "chosen", "rejected"), [("x", 1, 2)])
  with pytest.raises(errors.DataError, match="lines.csv, line 2: the data set has no image 'x'"):
    pipeline.run(config, tmp_path / "work", ("prepare",))
  cases = ["c05", "c06", "c07", "c08"]
  split = {"unlabelled": cases, "labelled": ["c00"], "val": [], "test": ["c03"]}
  (tmp_path / "split.json").write_text(json.dumps(split))
  _write_drawn(root, tmp_path / "own", cases)
  rows = [(case, f"c/{case}.nii.gz", f"a/{case}.nii.gz") for case in cases]
  own_files.write_rows(tmp_path / "own/lines.csv", ("image", "chosen", "rejected"), rows)
  with config.unlocked():
    for key in ("num_labelled", "num_val", "num_test"):
      config.data[key] = config_lib.base_config().data[key]
    config.data.split_file = str(tmp_path / "split.json")
  work = tmp_path / "work"
  pipeline.run(config, work)
  assert _check_pairs(config, work, work, root, cases, dict.fromkeys(cases, (("c", "a"),))) > 20
  results = json.loads((work / "results.json").read_text())
  assert results["judge"] == "preferences" and (work / "report.html").exists()
  assert results["num_cases"]["val"] == 0 and results["delivered"]["chosen_by"] == "label_free"
  _check_label_free(imported.resolve(config), work, results["label_free"]["checkpoints"])


def _check_label_free(config, work, points):
  """The figures of the last checkpoint, of 16 tiles each."""
  view = tiles.view(dataset_lib.open_dataset(config, work))
  segmenter = models.build(config.model, num_classes=3, spatial_dims=view.spatial_dims)
  apply = jax.jit(segmenter.apply)
  tuned = checkpoint.restore_params(work / "finetune/params", 3, stage_directory="")
  found = {}
  for split in ("labelled", "unlabelled"):
    own = view.splits[split]
    own = own[np.linspace(0, len(own) - 1, 16).round().astype(int)]
    rows = [dataset_lib.load_example(view, int(i), with_labels=split == "labelled") for i in own]
    images = np.stack([row["image"] for row in rows])
    logits = [np.float64(apply(params, images)) for params in (base.load(work, view), tuned)]
    logs = [z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in logits]
    found[split] = np.argmax(logits, axis=-1), logs, [row["label"] for row in rows]
  masks, _, labels = found["labelled"]
  scores = [[native_jobs.dice(m, y) for m, y in zip(own, labels, strict=True)] for own in masks]
  for point, own in zip(points, scores, strict=True):
    assert point["labelled_dice"] == pytest.approx(np.mean(own), rel=1e-4)
  masks, (before, after), _ = found["unlabelled"]
  assert points[1]["kl"] == pytest.approx(
    np.mean(np.sum(np.exp(after) * (after - before), axis=-1)), rel=1e-2
  )
  dice = np.mean([native_jobs.dice(*pair) for pair in zip(*masks, strict=True)])
  assert points[1]["dice_to_base"] == pytest.approx(dice, rel=1e-4)
