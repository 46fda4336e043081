"""Whole jobs in the native mode, in 2D and 3D; masks of evaluation against a form of their own."""

import itertools
import json
import shutil

import jax
import native_data
import nibabel
import nnunet_models
import numpy as np
import own_files
import pytest
import tiny_jobs
from scipy import ndimage

from configs import nnunet as nnunet_config
from configs import nnunet_model as nnunet_model_config
from rndpo_jax import config as config_lib
from rndpo_jax import errors, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native, resample, tiles
from rndpo_jax.evaluation import predict, sliding_window
from rndpo_jax.losses import bit_planes
from rndpo_jax.nnunet import imported
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.predict import job as predict_job
from rndpo_jax.predict import native_network, native_run, trained
from rndpo_jax.predict import run as predict_run
from rndpo_jax.stages import base, evaluate
from rndpo_jax.training import checkpoint

TINY = tiny_jobs.TINY | {
  "data.num_labelled": 3,
  "data.num_val": 2,
  "data.num_test": 3,
  "model.depth": 2,
  "augment.turn": 0.0,
  "proposals.mix": "base:1,threshold:3",
  "judge.compare": (),
}
GEOMETRY = {
  2: {"data.spacing": (1.5, 0.0), "data.patch_size": (12, 10)},
  3: {"data.spacing": (1.5, 0.0, 3.0), "data.patch_size": (8, 10, 4), "data.spatial_dims": 3},
}
NEW_SPACING = (1.5, 1.25, 3.0)


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def job(request, tmp_path_factory):
  """(config, work directory, folder of the source) of a finished job."""
  folder = tmp_path_factory.mktemp(f"native{request.param}d")
  root = native_data.write(folder / "raw")
  config = nnunet_config.get_config("")
  with config.unlocked():
    config.update_from_flattened_dict(TINY | GEOMETRY[request.param] | {"data.root": str(root)})
  pipeline.run(config, folder / "work")
  return config, folder / "work", root


def test_the_job_is_whole_and_its_pairs_are_of_tiles(job):
  config, workdir, _ = job
  dataset = dataset_lib.open_dataset(config, workdir)
  results = json.loads((workdir / "results.json").read_text())
  assert results["base"]["test"]["dice"] > 0.3 and results["pairs"]["count"] > 0
  view = tiles.view(dataset)
  unlabelled = set(view.splits["unlabelled"].tolist())
  table = shards.read(workdir / "pairs")
  mined = {int(table[row]["index"]) for row in range(len(table))}
  assert mined <= unlabelled and len(unlabelled) > len(dataset.splits["unlabelled"])
  assert view.size == tuple(config.data.patch_size) and dataset.native.spacing[1] == 1.25
  assert (workdir / "report.html").exists() and results["rankseg"]["test"]["dice"] > 0.3


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
  options = {"spacing": spacing, "new_spacing": NEW_SPACING[:dims]}
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
      name: sum(_dice(mask, other) for other in drawn.values()) for name, mask in drawn.items()
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


def _dice(one, other):
  """Mean over classes 1 and 2; 1 of a class that both lack."""
  classes = [(one == c, other == c) for c in (1, 2)]
  sums = [(2 * np.sum(a & b), np.sum(a) + np.sum(b)) for a, b in classes]
  return np.mean([shared / total if total else 1.0 for shared, total in sums])


def _own_pairs(logits):
  """[(chosen, rejected), ...] of a whole image by agreement: the best against the worst ones."""
  background = np.array([1.0, 0.0, 0.0])
  shifted = [logits - shift * background for shift in (0.0, -4.0, 0.0, 4.0)]
  masks = [np.argmax(one, axis=-1) for one in shifted]
  scores = [sum(_dice(m, o) for o in masks) - 1 for m in masks]
  best = int(np.argmax(scores))
  others = [k for k in sorted(range(4), key=lambda k: scores[k]) if (masks[k] != masks[best]).any()]
  return [(masks[best], masks[k]) for k in others[:2]]


def test_whole_images_are_judged_as_one_and_trained_on_by_tiles(job, tmp_path, monkeypatch):
  config, workdir, _ = job
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
    expected = _own_pairs(_logits(logits_of, image, view.size))
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


def test_proposals_from_files_are_cut_as_the_labels_are(job, tmp_path):
  """Without class 2 is taken for the worst, so the pairs are a over b, then a over c."""
  config, workdir, root = job
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
  stages = ("base", "mine") if config.data.spatial_dims == 2 else config_lib.STAGES
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
  changes = {key: TINY[key] for key in TINY if key.startswith(("data.", "mine.", "finetune."))}
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
  scores = [[_dice(m, y) for m, y in zip(own, labels, strict=True)] for own in masks]
  for point, own in zip(points, scores, strict=True):
    assert point["labelled_dice"] == pytest.approx(np.mean(own), rel=1e-4)
  masks, (before, after), _ = found["unlabelled"]
  assert points[1]["kl"] == pytest.approx(
    np.mean(np.sum(np.exp(after) * (after - before), axis=-1)), rel=1e-2
  )
  dice = np.mean([_dice(*pair) for pair in zip(*masks, strict=True)])
  assert points[1]["dice_to_base"] == pytest.approx(dice, rel=1e-4)


def _weights(patch):
  """Gaussian about patch // 2, of sigma patch / 8, f64."""
  delta = np.zeros(patch)
  delta[tuple(n // 2 for n in patch)] = 1
  return ndimage.gaussian_filter(delta, [n / 8 for n in patch], mode="constant")


def _logits(apply, image, patch):
  """f64 sums over tiles at half a patch, one tile at a time."""
  pads = [max(p - n, 0) for n, p in zip(image.shape, patch, strict=False)]
  pads = [(n // 2, n - n // 2) for n in pads]
  padded = np.pad(image, [*pads, (0, 0)])
  total, mass = 0.0, 0.0
  for start in sliding_window.positions(padded.shape[:-1], patch):
    place = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
    tile = np.asarray(apply(padded[place][None])[0], np.float64)
    own, weight = np.zeros((*padded.shape[:-1], tile.shape[-1])), np.zeros(padded.shape[:-1])
    own[place], weight[place] = _weights(patch)[..., None] * tile, _weights(patch)
    total, mass = total + own, mass + weight
  inside = tuple(slice(low, n - high) for n, (low, high) in zip(padded.shape, pads, strict=False))
  return (total / mass[..., None])[inside]


def _zoom(array, shape, order):
  """One channel at a time, as scikit-image resizes."""
  factors = [m / n for n, m in zip(array.shape, shape, strict=False)]
  channels = np.moveaxis(array, -1, 0).astype(np.float64)
  options = {"order": order, "mode": "nearest", "grid_mode": True}
  found = [np.clip(ndimage.zoom(c, factors, **options), c.min(), c.max()) for c in channels]
  return np.stack(found, axis=-1)


def _own_form(apply, image, spacing, patch):
  """Mask u8 of a volume from nnU-Net's steps, by other means than the program's."""
  places = np.argwhere(image)
  low, high = places.min(0), places.max(0) + 1
  box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
  crop = image[box].astype(np.float64)
  crop = ((crop - crop.mean()) / crop.std())[..., None]
  wanted = (*NEW_SPACING[: len(patch)], *spacing[len(patch) :])
  rows = zip(crop.shape[:-1], spacing, wanted, strict=True)
  on_spacing = _zoom(crop, [round(n * a / b) for n, a, b in rows], 3).astype(np.float32)
  if len(patch) == 2:
    slices = [on_spacing[:, :, z] for z in range(on_spacing.shape[2])]
    logits = np.stack([_logits(apply, one, patch) for one in slices], axis=2)
  else:
    logits = _logits(apply, on_spacing, patch)
  mask = np.zeros(image.shape, np.uint8)
  mask[box] = np.argmax(_zoom(logits, crop.shape[:-1], 1), axis=-1)
  return mask


def test_masks_equal_those_of_another_form(job):
  config, workdir, root = job
  dataset = dataset_lib.open_dataset(config, workdir)
  params = base.load(workdir, dataset)
  segmenter = models.build(config.model, num_classes=3, spatial_dims=dataset.spatial_dims)
  apply = jax.jit(lambda images: segmenter.apply(params, images))
  evaluation = predict.open_evaluation(config, dataset, workdir / "other", lambda step: params)
  found = dict(predict.predict(evaluation, params, [int(i) for i in dataset.splits["test"]]))
  for (split, case), group in evaluation.groups.items():
    if split != "test":
      continue
    volume = nibabel.load(root / "imagesTr" / f"{case}_0000.nii.gz")
    spacing = tuple(float(z) for z in volume.header.get_zooms())
    image = np.asarray(volume.dataobj)
    expected = _own_form(apply, image, spacing, dataset.size)
    masks = [found[index] for index in group]
    mask = np.stack(masks, axis=2) if dataset.spatial_dims == 2 else masks[0]
    assert mask.shape == expected.shape and (mask > 0).any()
    # An argmax of equals, but for rounding, may go either way.
    assert np.count_nonzero(mask != expected) <= 2
    label = np.asarray(nibabel.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
    labels = [evaluation.label(index) for index in group]
    own = np.stack(labels, axis=2) if dataset.spatial_dims == 2 else labels[0]
    np.testing.assert_array_equal(own, label)


def test_prediction_of_a_run_equals_evaluation_bit_for_bit(job, tmp_path):
  config, workdir, root = job
  dataset = dataset_lib.open_dataset(config, workdir)
  cases = sorted({dataset.records[int(i)]["case_id"] for i in dataset.splits["test"]})
  for case in cases:
    shutil.copy(root / "imagesTr" / f"{case}_0000.nii.gz", tmp_path)
  mirror = dataset.spatial_dims == 2
  config = config.copy_and_resolve_references()
  config.evaluate.mirror = mirror
  network = native_network.of_run(trained.load(workdir, "base"))
  options = predict_job.Options(scores=False, mirror=mirror)
  predict_run.run(native_run.job(network, options), str(tmp_path), tmp_path / "masks", options)
  params = base.load(workdir, dataset)
  axes = evaluate.mirror_axes(config, workdir, dataset)
  evaluation = predict.open_evaluation(config, dataset, workdir / "other", lambda _: params, axes)
  found = dict(predict.predict(evaluation, params, [int(i) for i in dataset.splits["test"]]))
  for case in cases:
    masks = [found[index] for index in evaluation.groups["test", case]]
    mask = np.stack(masks, axis=2) if dataset.spatial_dims == 2 else masks[0]
    written = np.asarray(nibabel.load(tmp_path / "masks" / f"{case}.nii.gz").dataobj)
    np.testing.assert_array_equal(mask, written)


def test_tiles_cover_every_pixel_and_are_cut_from_their_record(job):
  config, workdir, _ = job
  dataset = dataset_lib.open_dataset(config, workdir)
  view = tiles.view(dataset)
  record = next(int(i) for i in dataset.splits["val"] if native.is_seen(dataset.boxes[i]))
  whole = dataset_lib.load_on_spacing(dataset, record, with_labels=True)
  covered = np.zeros(whole["label"].shape, bool)
  for index in np.flatnonzero(view.tiles.record == record):
    example = dataset_lib.load_example(view, index, with_labels=True)
    start = [int(s) for s in view.records[index]["record_id"].partition("@")[2].split(",")]
    rows = zip(start, covered.shape, dataset.size, strict=True)
    own = [(max(s, 0), min(s + p, n)) for s, n, p in rows]
    there = tuple(slice(*span) for span in own)
    here = tuple(slice(a - s, b - s) for (a, b), s in zip(own, start, strict=True))
    covered[there] = True
    np.testing.assert_array_equal(example["image"][here], whole["image"][there])
    np.testing.assert_array_equal(example["label"][here], whole["label"][there])
    assert int(example["index"]) == index
    assert np.count_nonzero(example["image"]) == np.count_nonzero(example["image"][here])
  assert covered.all()
  splits = list(itertools.chain(*view.splits.values()))
  assert len(splits) == len(set(splits)) == len(view.records)
