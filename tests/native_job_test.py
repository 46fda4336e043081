"""Whole jobs in the native mode, in 2D and 3D; masks of evaluation against a form of their own."""

import itertools
import json
import shutil

import jax
import native_jobs
import nibabel
import numpy as np
from scipy import ndimage

from rndpo_jax import models
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import native, tiles
from rndpo_jax.evaluation import predict
from rndpo_jax.pairs import shards
from rndpo_jax.predict import job as predict_job
from rndpo_jax.predict import native_network, native_run, trained
from rndpo_jax.predict import run as predict_run
from rndpo_jax.stages import base, evaluate


def test_the_job_is_whole_and_its_pairs_are_of_tiles(native_job):
  config, workdir, _ = native_job
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
  wanted = (*native_jobs.NEW_SPACING[: len(patch)], *spacing[len(patch) :])
  rows = zip(crop.shape[:-1], spacing, wanted, strict=True)
  on_spacing = _zoom(crop, [round(n * a / b) for n, a, b in rows], 3).astype(np.float32)
  if len(patch) == 2:
    slices = [on_spacing[:, :, z] for z in range(on_spacing.shape[2])]
    logits = np.stack([native_jobs.logits(apply, one, patch) for one in slices], axis=2)
  else:
    logits = native_jobs.logits(apply, on_spacing, patch)
  mask = np.zeros(image.shape, np.uint8)
  mask[box] = np.argmax(_zoom(logits, crop.shape[:-1], 1), axis=-1)
  return mask


def test_masks_equal_those_of_another_form(native_job):
  config, workdir, root = native_job
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


def test_prediction_of_a_run_equals_evaluation_bit_for_bit(native_job, tmp_path):
  config, workdir, root = native_job
  dataset = dataset_lib.open_dataset(config, workdir)
  cases = sorted({dataset.records[int(i)]["case_id"] for i in dataset.splits["test"]})
  for case in cases:
    shutil.copy(root / "imagesTr" / f"{case}_0000.nii.gz", tmp_path)
  mirror = dataset.spatial_dims == 2
  config = config.copy_and_resolve_references()
  config.evaluate.mirror = mirror
  network = native_network.of_run(trained.load(workdir, "base"))
  assert network.schemes == dataset.native.schemes == ("zscore_in_mask",)  # as prepare decided
  assert dataset.in_mask == (True,)
  options = predict_job.Options(scores=False, mirror=mirror)
  predict_run.run(native_run.job(network, options), str(tmp_path), tmp_path / "masks", options)
  params = base.load(workdir, dataset)
  config.augment.flip = 0.0  # as a phase may; the base has learned flips all the same
  axes = evaluate.mirror_axes(config, workdir, dataset)
  evaluation = predict.open_evaluation(config, dataset, workdir / "other", lambda _: params, axes)
  found = dict(predict.predict(evaluation, params, [int(i) for i in dataset.splits["test"]]))
  for case in cases:
    masks = [found[index] for index in evaluation.groups["test", case]]
    mask = np.stack(masks, axis=2) if dataset.spatial_dims == 2 else masks[0]
    written = np.asarray(nibabel.load(tmp_path / "masks" / f"{case}.nii.gz").dataobj)
    np.testing.assert_array_equal(mask, written)


def test_tiles_cover_every_pixel_and_are_cut_from_their_record(native_job):
  config, workdir, _ = native_job
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
