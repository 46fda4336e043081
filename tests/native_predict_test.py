"""launch.predict --nnunet_folder: masks of an nnU-Net model folder, by loops in nnU-Net's order."""

import csv
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import nibabel
import nnunet_folder_test
import nnunet_reference
import numpy as np
import pth_files
import pytest
from PIL import Image
from scipy import ndimage

from rndpo_jax import errors
from rndpo_jax.data import native, records, resample
from rndpo_jax.evaluation import sliding_window, stitched
from rndpo_jax.nnunet import folder as folder_lib
from rndpo_jax.predict import (
  inputs,
  native_cases,
  native_network,
  native_run,
  output_folder,
  restore,
  run,
  score_table,
)
from rndpo_jax.predict.job import Options

AFFINE = np.array([[0, -1.5, 0, 7], [2.5, 0, 0, -3], [0, 0, 9, 11], [0, 0, 0, 1.0]])
PATCH = (4, 6)  # (y, x)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(folder, weights of its folds 0 and 1, which flipped y in training)."""
  place = tmp_path_factory.mktemp("nnUNetTrainer__nnUNetPlans__2d")
  named = nnunet_folder_test.write(place)
  # Near 0 nearly everywhere, logits would tell little.
  head = "decoder.seg_layers.0"
  named |= {
    f"{head}.weight": 40 * named[f"{head}.weight"], f"{head}.bias": np.array([0, 8.1], np.float32)
  }  # fmt: skip
  other = {name: x if name.startswith(head) else 0.9 * x[::-1] for name, x in named.items()}
  for fold, weights in enumerate((named, other)):
    path = place / f"fold_{fold}" / "checkpoint_final.pth"
    pth_files.write(path, weights, inference_allowed_mirroring_axes=(0,))
  return place, (named, other)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A folder with a volume f32 (x, y, z) that has a border of zeros, and the volume."""
  folder = tmp_path_factory.mktemp("images")
  volume = np.zeros((11, 9, 4), np.float32)
  volume[1:, 2:8, :3] = np.random.default_rng(0).normal(9, 3, (10, 6, 3))
  _save(volume, folder / "a_0000.nii.gz")
  return folder, volume


def _save(array, path, affine=AFFINE):
  image = nibabel.Nifti1Image(array, affine)
  image.header.set_xyzt_units("mm")
  nibabel.save(image, path)


def _run(place, source, output, folds="0", **options):
  output_folder.check(str(source), str(output))
  network = native_network.read_nnunet(place, folder_lib.parse_folds(folds, "--fold"))
  options = Options(**options)
  run.run(native_run.job(network, options), str(source), output, options)


def _zoom(image, shape, order):
  factors = [m / n for n, m in zip(image.shape, shape, strict=True)]
  out = ndimage.zoom(image, factors, order=order, mode="nearest", grid_mode=True)
  return np.clip(out, image.min(), image.max())


def _tiles(image, weights, flips):
  """Weighted mean of the tiles' logits, f64[C, y, x]."""
  total, weight = np.zeros((2, *image.shape)), np.zeros(image.shape)
  own = sliding_window.weights(PATCH)
  for start in sliding_window.positions(image.shape, PATCH):
    place = tuple(slice(s, s + p) for s, p in zip(start, PATCH, strict=True))
    for axes in flips:
      x = np.flip(image[place], axes)[None]
      logits = nnunet_reference.forward(weights, nnunet_folder_test.MADE, x)
      total[:, *place] += own * np.flip(logits, [axis + 1 for axis in axes]) / len(flips)
    weight[place] += own
  return total / weight


def _reference(volume, members, flips=((),)):
  """Logits f64[x, y, z, C] of the whole volume; outside of the crop the background has all."""
  image = np.float64(volume.transpose(2, 1, 0))
  box = ndimage.find_objects(np.int32(image != 0))[0]
  crop = image[box]
  crop = (crop - crop.mean()) / crop.std()
  new = (round(1.5 / 1.5 * crop.shape[1]), round(2.5 / 2.0 * crop.shape[2]))
  logits = np.zeros((2, *image.shape))
  logits[0] = 50
  for z, image in enumerate(crop):
    found = [_tiles(_zoom(image, new, 3), weights, flips) for weights in members]
    for c, channel in enumerate(np.mean(found, axis=0)):
      logits[c, z + box[0].start, *box[1:]] = _zoom(channel, image.shape, 1)
  return logits.transpose(3, 2, 1, 0)


def _probabilities(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  "folds, mirror, flips", [("0", False, [()]), ("0", True, [(), (0,)]), ("0,1", False, [()])]
)
def test_masks_and_probabilities_are_nnunets(tmp_path, model, images, folds, mirror, flips):
  place, weights = model
  _run(place, images[0], tmp_path / "out", folds, mirror=mirror, probabilities=True)
  want = _probabilities(_reference(images[1], weights[: len(folds.split(","))], flips))
  with np.load(tmp_path / "out" / "a.npz") as content:
    got = content["probabilities"]
  assert got.dtype == np.float16
  np.testing.assert_allclose(got, want, atol=2e-3)
  found = nibabel.load(tmp_path / "out" / "a.nii.gz")
  mask = np.asarray(found.dataobj)
  sure = np.abs(want[..., 1] - 0.5) > 1e-3
  np.testing.assert_array_equal(mask[sure], (want[..., 1] > 0.5)[sure])
  assert sure.mean() > 0.9 and 0 < mask.mean() < 1
  assert mask.dtype == np.uint8 and found.header.get_xyzt_units()[0] == "mm"
  np.testing.assert_array_equal(found.affine, AFFINE)


def test_scores_follow_their_definitions(tmp_path, model, images):
  place, weights = model
  _run(place, images[0], tmp_path / "one")
  _run(place, images[0], tmp_path / "two", "0,1")
  members = [_reference(images[1], [own]) for own in weights]
  for name, logits in (("one", members[0]), ("two", np.mean(members, axis=0))):
    with (tmp_path / name / score_table.FILE).open(newline="") as file:
      (row,) = csv.DictReader(file)
    p = _probabilities(logits)
    y = logits.argmax(-1)
    soft = (2 * (p[..., 1] * y).sum() + 1) / (p[..., 1].sum() + y.sum() + 1)
    assert float(row["confidence"]) == pytest.approx(soft, abs=2e-3)
    near = np.zeros(y.shape, bool)
    for i, j, k in np.argwhere(y):
      near[max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4, k] = True
    entropy = (p * np.log(np.maximum(p, 1e-30))).sum(-1)[near].mean()
    assert float(row["entropy"]) == pytest.approx(entropy, abs=2e-3)
    if name == "one":  # the background's logit one up and one down
      masks = [logits[..., 1] > logits[..., 0] + shift for shift in (-1, 1)]
    else:
      masks = [own.argmax(-1) for own in members]
    dice = np.mean([2 * (y * m).sum() / (y.sum() + m.sum()) for m in masks])
    assert 0 < dice < 1 and float(row["agreement"]) == pytest.approx(dice, abs=0.02)


@pytest.mark.parametrize(
  "shape, spacing, new_shape, new_spacing",
  [
    ((9, 6, 20), (1, 1, 1), (7, 8, 13), (1, 1, 1)),
    ((9, 6, 20), (1, 1, 1), (7, 6, 31), (1, 1, 1)),
    ((9, 6, 20), (1, 1, 5), (7, 8, 13), (1, 1, 1)),
    ((9, 6, 20), (1, 1, 5), (9, 6, 31), (1, 1, 1)),
    ((30, 6), (1, 1), (18, 9), (1, 1)),
    ((9, 6, 20), (1, 1, 1), (9, 6, 20), (1, 1, 1)),
  ],
)
def test_parts_do_not_depend_on_the_cuts(monkeypatch, shape, spacing, new_shape, new_spacing):
  """`shape` is the crop's, of a case that is one voxel larger on every side."""
  box = tuple(slice(1, n + 1) for n in shape)
  logits = np.random.default_rng(0).normal(size=(*new_shape, 3)).astype(np.float32)
  source = inputs.Input("a", (), ".nii")
  whole = tuple(n + 2 for n in shape)
  case = native_cases.NativeCase(source, "", whole, box, spacing, new_spacing, None, new_shape)
  want = resample.resample_logits(logits, shape, spacing=new_spacing, new_spacing=spacing)
  for axis, values in itertools.product(range(len(shape)), (1, 400, 2**20)):
    monkeypatch.setattr(restore, "_PIECE_VALUES", values)
    length = new_shape[axis]
    slabs = [
      sliding_window.Slab(case, axis, low, np.take(logits, range(low, high), axis), high == length)
      for low, high in itertools.pairwise((0, 1, 4, length))
    ]
    got = np.full(shape, 255, np.uint8)
    lasts = []
    for piece in restore.pieces(slabs, 3):
      part = restore.restore(piece, with_scores=False, with_probabilities=False)
      assert (got[part.place] == 255).all()  # no pixel comes twice
      got[part.place] = part.labels
      lasts.append(part.is_last)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    np.testing.assert_array_equal(got, want.argmax(-1))


def test_slices_of_a_volume_with_a_coarse_axis_in_them_are_those_of_evaluation(monkeypatch):
  """Along that axis the nearest logits are taken, as of the volume, in both."""
  spacing, own = (4.0, 1.0, 1.2), (3.0, 1.1)
  image = np.random.default_rng(0).normal(size=(8, 9, 2, 1)).astype(np.float32)

  def apply(params, images):
    return jax.numpy.concatenate([0 * images, images], axis=-1)

  case = native_cases.NativeCase(
    None, "", (6, 10, 2), (slice(0, 6), slice(0, 10), slice(0, 2)), spacing, (*own, 1.2), image,
    image.shape[:-1],
  )  # fmt: skip
  network = native_network.NativeNetwork(
    apply, ({},), 1, ("background", "a"), own, PATCH, ("none",), (None,), (), False, "", {}
  )
  window = sliding_window.make(apply, PATCH, batch_size=8)
  (found,) = native_run.predict_cases(window, {}, network, [case], Options(scores=False))
  entry = {"shape": [6, 10], "spacing": spacing[:2], "slice_spacing": 1.2}
  dataset = types.SimpleNamespace(
    size=PATCH, num_classes=2, records=[entry] * 2, boxes=np.array([[[0, 6], [0, 10]]] * 2),
    native=records.Native(own, ("none",), (None,)),
  )  # fmt: skip
  monkeypatch.setattr(
    stitched.dataset_lib, "load_on_spacing", lambda _, z, **__: {"image": image[:, :, z]}
  )
  masks = stitched.make(types.SimpleNamespace(apply=apply), dataset)({}, (0, 1))
  np.testing.assert_array_equal(np.stack([mask for _, mask in masks], axis=2), found.mask)


def test_images_with_zeros_among_the_crop_go_in_as_they_were_prepared(tmp_path):
  """Zeros at its edges are left out of the z-score and stay, those closed on all sides count."""
  volume = np.zeros((9, 8, 5), np.float32)
  volume[1:8, 2:7] = np.random.default_rng(0).normal(90, 3, (7, 5, 5))
  volume[1:4, 2:5], volume[5, 5, 2] = 0, 0
  _save(volume, tmp_path / "a.nii.gz", np.diag([1.0, 1.0, 2.0, 1.0]))
  mode = records.Native((1.0, 1.0), ("zscore_in_mask",), (None,))
  network = native_network.NativeNetwork(
    None, ({},), 1, ("background", "a"), mode.spacing, PATCH, *mode[1:], (), False, "", {}
  )
  (source,) = inputs.list_inputs(str(tmp_path), 1)
  found = native_cases.read(source, network)
  pixels = [records.Pixels(volume[:, :, z, None], None, np.eye(4)) for z in range(5)]
  for z, own in enumerate(native.on_spacing(pixels, (1.0, 1.0, 2.0), mode, 2)):
    np.testing.assert_array_equal(found.image[:, :, z], own.image)
  crop = volume[1:8, 2:7].astype(np.float64)
  inside = crop > 0
  inside[4, 3, 2] = True
  wanted = np.where(inside, (crop - crop[inside].mean()) / crop[inside].std(), 0)
  np.testing.assert_allclose(found.image[..., 0], wanted, atol=1e-4)


def test_equal_logits_give_the_lowest_class():
  logits = np.array([[1, 1, 0], [0, 2, 2], [-3, -4, -3]], np.float32)
  np.testing.assert_array_equal(restore.argmax(logits.T), [0, 1, 0])


def test_what_cannot_be_predicted_raises_naming_it(tmp_path, model, images):
  place, weights = model
  network = native_network.read_nnunet(place, [0])
  blank = nibabel.Nifti1Image(images[1], AFFINE)
  blank.header["pixdim"][1:4] = 0
  nibabel.save(blank, tmp_path / "blank.nii")
  Image.new("RGB", (9, 9)).save(tmp_path / "rgb.png")
  sources = {one.case_id: one for one in inputs.list_inputs(str(tmp_path), 1)}
  for name, message in (("blank", "gives no spacing"), ("rgb", "3 channels, but")):
    with pytest.raises(errors.DataError, match=message):
      native_cases.read(sources[name], network)
  two = sources["blank"]._replace(files=sources["blank"].files * 2)
  with pytest.raises(errors.DataError, match="2 channels, but the network was trained on 1"):
    native_cases.read(two, network)
  deep = network._replace(patch_size=(4, 6, 4), spacing=(1, 1, 1))
  nibabel.save(nibabel.Nifti1Image(images[1][:, :, 0], AFFINE), tmp_path / "flat.nii")
  flat = inputs.Input("flat", (tmp_path / "flat.nii",), ".nii")
  for source in (flat, sources["rgb"]):
    with pytest.raises(errors.DataError, match="2D image.*trained on volumes"):
      native_cases.read(source, deep)
  with pytest.raises(errors.ConfigError, match="--mirror: .* trained without flips"):
    native_run.job(network._replace(mirror_axes=()), Options(mirror=True))
  for folds in ("", "0,0", "x", "1,-2"):
    with pytest.raises(errors.ConfigError, match="--fold: found"):
      folder_lib.parse_folds(folds, "--fold")
  with pytest.raises(errors.ConfigError, match="no fold 3; there are 0, 1"):
    native_network.read_nnunet(place, [3])
  (tmp_path / "above" / "a").mkdir(parents=True)
  (tmp_path / "above" / "a" / "plans.json").write_text("{}")
  with pytest.raises(errors.ConfigError, match="has no fold_.*; give .*above/a"):
    native_network.read_nnunet(tmp_path / "above", [0])
  _run(place, images[0], tmp_path / "out")
  with pytest.raises(errors.ConfigError, match=r"folds was \[0\], is \[1\]"):
    _run(place, images[0], tmp_path / "out", "1")


def test_pictures_of_any_size_go_through_a_network_of_pictures(tmp_path, model):
  place = tmp_path / "model"
  (place / "fold_0").mkdir(parents=True)
  for name in ("fold_0/checkpoint_final.pth", "dataset.json"):
    (place / name).write_bytes((model[0] / name).read_bytes())
  plans = json.loads((model[0] / "plans.json").read_text())
  plans["image_reader_writer"] = "NaturalImage2DIO"
  plans["configurations"]["2d"]["spacing"] = [1.0, 1.0]
  (place / "plans.json").write_text(json.dumps(plans))
  picture = np.random.default_rng(1).integers(1, 255, (3, 14), np.uint8)  # smaller than the patch
  (tmp_path / "in").mkdir()
  Image.fromarray(picture).save(tmp_path / "in" / "p.png")
  nibabel.save(nibabel.Nifti1Image(picture, AFFINE), tmp_path / "p.nii")
  of_pictures, of_others = (native_network.read_nnunet(path, [0]) for path in (place, model[0]))
  for network, path, message in (
    (of_others, tmp_path / "in" / "p.png", "p.png: a picture, .* axes .* convert it to NIfTI"),
    (of_pictures, tmp_path / "p.nii", "p.nii: no picture, .* axes .* convert it to PNG"),
  ):
    source = inputs.Input("p", (path,), path.suffix)
    with pytest.raises(errors.DataError, match=message):
      native_cases.read(source, network)
  _run(place, tmp_path / "in", tmp_path / "out")
  image = np.float64(picture)
  padded = np.pad((image - image.mean()) / image.std(), [(0, 1), (0, 0)])
  want = _tiles(padded, model[1][0], [()])[:, :3]
  with Image.open(tmp_path / "out" / "p.png") as found:
    sure = np.abs(want[1] - want[0]) > 1e-3
    np.testing.assert_array_equal(np.asarray(found)[sure], want.argmax(0)[sure])


def test_the_program_takes_one_network_and_the_home_folder(model, images, tmp_path):
  given = (f"--nnunet_folder={model[0]}", f"--input={images[0]}", "--output=~/out")
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "launch.predict", *given, flag],
      cwd=pathlib.Path(__file__).parent.parent,
      env={**os.environ, "HOME": str(tmp_path)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for flag in ("--checkpoint=last", "--fold=0,1")
  ]
  wrong, right = (process.communicate()[0] for process in started)
  assert [process.returncode for process in started] == [1, 0], wrong + right
  assert "error: --checkpoint means nothing with --nnunet_folder" in wrong
  assert "1 cases, by nnUNetTrainer__nnUNetPlans__2d" in right
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "a.nii.gz", "predict.json", "scores", "scores.csv",
  ]  # fmt: skip
