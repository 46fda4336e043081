"""Evaluation of records that are slices of cases, and masks on the native grid."""

import types as python_types

import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.data import loader
from rndpo_jax.evaluation import cases, gallery, metrics, predict, results
from rndpo_jax.stages import evaluate

# A case of three slices and one of a single slice, of 2 x 4 pixels; spacing 1 and 2 mm, 5 mm apart.
_LABELS = np.zeros((4, 2, 4), np.uint8)


_LABELS[:3, :, 1:3] = 1


_LABELS[3, 0, 0] = 1


def _stack_evaluation(folder, masks):
  """An Evaluation whose network gives `masks`, records listed out of slice order."""
  entries = [
    {"case_id": case, "slice": z, "shape": [2, 4], "spacing": [1.0, 2.0], "slice_spacing": 5.0}
    for case, z in (("a", 2), ("a", 0), ("a", 1), ("b", 0))
  ]
  dataset = python_types.SimpleNamespace(
    records=entries,
    splits={"val": np.array([3]), "test": np.array([0, 1, 2])},
    num_classes=2,
    spacing_unit="mm",
    size=(2, 4),
    crop=(),
    normalization="zscore",
    native=None,
    fingerprint="",
  )

  def batches(indices):
    images = masks[list(indices)].astype(np.float32)[..., None]
    yield types.Batch(images, images, np.array(indices), np.ones(len(indices), bool))

  return predict.Evaluation(
    folder=folder,
    dataset=dataset,
    tolerance=2.0,
    groups=predict.group_cases(dataset),
    predict_batch=lambda params, images, resize: predict.native_masks(
      np.concatenate([0.5 - images, images - 0.5], axis=-1), resize
    ),
    params=lambda step: {"w": np.zeros(1)},
    batches=batches,
    label=lambda index: _LABELS[index],
    mirror_axes=(),
  )


def test_slices_of_a_case_count_together(tmp_path):
  masks = _LABELS.copy()
  masks[0] = 0  # slice z = 2 of case a is missed: Dice 2 * 8 / (8 + 12), not the mean of 1, 1, 0
  evaluation = _stack_evaluation(tmp_path, masks)
  assert evaluation.groups == {("val", "b"): [3], ("test", "a"): [1, 2, 0]}
  counted = cases.overlap_cases(evaluation, 0)
  measured = {c.case_id: c for c in cases.surface_cases(evaluation, 0, counted)}
  assert metrics.overlap(measured["a"].counts)["dice"] == [0.8]
  assert metrics.overlap(measured["b"].counts)["dice"] == [1.0]
  # Of the truth, the 4 pixels of the missed slice are 5 mm from the mask; every pixel of so thin
  # a volume is on its boundary, and all others coincide.
  assert measured["a"].surface == [
    {"hd95": 5.0, "hd100": 5.0, "assd": pytest.approx(20 / 20), "nsd": 16 / 20}
  ]
  assert measured["b"].surface == [{"hd95": 0.0, "hd100": 0.0, "assd": 0.0, "nsd": 1.0}]


def test_predictions_where_the_label_is_ignored_count_nowhere(tmp_path, monkeypatch):
  masks, labels = 1 - _LABELS, np.full_like(_LABELS, types.IGNORED)
  labels[:, :, 2:], masks[:, :, 2:] = _LABELS[:, :, 2:], _LABELS[:, :, 2:]
  evaluation = _stack_evaluation(tmp_path, masks)._replace(label=lambda index: labels[index])
  counted = cases.overlap_cases(evaluation, 0)
  measured = {c.case_id: c for c in cases.surface_cases(evaluation, 0, counted)}
  np.testing.assert_array_equal(measured["a"].counts, [[6, 6], [6, 6], [6, 6]])
  assert measured["a"].surface == [{"hd95": 0.0, "hd100": 0.0, "assd": 0.0, "nsd": 1.0}]
  # No outline of what is ignored, and no slice chosen for it.
  label = np.zeros((2, 4), np.uint8)
  labels[0] = types.IGNORED
  assert gallery._fullest_record(evaluation, [0, 1]) == 1
  label[:, 2] = 1
  np.testing.assert_array_equal(gallery._known(labels[1]), label)


def test_spacing_is_in_voxels_where_any_is_unknown(tmp_path):
  dataset = _stack_evaluation(tmp_path, _LABELS).dataset
  assert cases.case_spacing(dataset, [1, 2, 0]) == (1.0, 2.0, 5.0)
  assert cases.case_spacing(dataset, [3]) == (1.0, 2.0)
  dataset.spacing_unit = "voxel"
  assert cases.case_spacing(dataset, [1, 2, 0]) is None


def test_slices_of_different_sizes_are_filled_with_background():
  volume = cases.stack_slices([np.ones((2, 3), np.uint8), np.ones((3, 2), np.uint8)])
  assert volume.shape == (3, 3, 2)
  assert volume[..., 0].sum() == 6 and volume[2, :, 0].sum() == 0
  assert volume[..., 1].sum() == 6 and volume[:, 2, 1].sum() == 0


def test_gallery_shows_the_fullest_slice(tmp_path, monkeypatch):
  evaluation = _stack_evaluation(tmp_path, _LABELS)
  volume = np.zeros((4, 5, 6), np.uint8)
  volume[1:3, 1:3, 2:] = 1
  volume[0, 0, 4] = 1
  image = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None], (4, 5, 6, 1))
  evaluation.dataset.records[:] = [{"case_id": "v", "has_mask": True, "spacing": None}]
  evaluation.dataset.blind_source = [{"image": image, "affine": np.eye(4)}]
  evaluation = evaluation._replace(groups={("test", "v"): [0]}, label=lambda index: volume)
  monkeypatch.setattr(predict, "predict", lambda *_: iter([(0, 1 - volume)]))
  case = results.Case("test", "v", metrics.pixel_counts(1 - volume, volume, 2))
  gallery.write(evaluation, [case], [case], 7)
  with np.load(tmp_path / "gallery.npz") as content:
    assert content["case_id"].tolist() == ["v"] and content["base_dice"].tolist() == [0.0]
    np.testing.assert_array_equal(content["image_0"], np.full((4, 5, 1), 4))
    np.testing.assert_array_equal(content["label_0"], volume[..., 4])
    np.testing.assert_array_equal(content["finetuned_0"], 1 - volume[..., 4])


@pytest.mark.parametrize("crop", [(), (12, 9, 6)])
def test_masks_on_the_native_grid_equal_those_by_way_of_the_host(crop):
  logits = np.random.default_rng(0).normal(size=(3, 6, 4, 5, 3)).astype(np.float32)
  shapes = [(11, 13, 7), (6, 4, 5), (70, 8, 5)]
  resize = predict.resize_matrices(shapes, (6, 4, 5), crop)
  masks = np.asarray(predict.native_masks(logits, resize))
  for row, shape in enumerate(shapes):
    want = np.argmax(loader.to_native(logits[row], shape, crop), axis=-1)
    got = masks[row][tuple(slice(n) for n in shape)]
    np.testing.assert_array_equal(got, want)
    assert want.any() and not want.all()


def test_cells_of_the_table_are_no_formulas():
  case = results.Case("test", "=HYPERLINK(1)", np.array([[4, 4], [4, 4], [4, 4]]))
  text = evaluate.csv_text({"base": 0}, {"base": [case]}, ["dice"], ["background", "-1+2"])
  assert "base,0,test,'=HYPERLINK(1),1,'-1+2,1.0,0,0" in text
  assert [results.quoted(name) for name in ("+a", "@a", "a=b", "")] == ["'+a", "'@a", "a=b", ""]
