"""Whole jobs on input as users bring it, through the configs that they start from; tiny."""

import csv
import json

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image
from tiny_jobs import tiny

from configs import folder as folder_config
from configs import nnunet as nnunet_config
from rndpo_jax import errors, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.mining import judges
from rndpo_jax.predict import trained
from rndpo_jax.report import summary
from rndpo_jax.runtime import files
from rndpo_jax.stages import base, mine
from rndpo_jax.training import checkpoint


def case_rows(workdir, model="finetuned"):
  """Rows of cases.csv of one model."""
  with (workdir / "evaluate" / "cases.csv").open() as file:
    return [row for row in csv.DictReader(file) if row["model"] == model]


def nested(shape, num_classes, rng):
  """(image u8, class ids u8): boxes within boxes, brighter from class to class."""
  mask = np.zeros(shape, np.uint8)
  for c in range(1, num_classes):
    mask[tuple(slice(c, n - c) for n in shape)] = c
  return (50 * mask + rng.integers(0, 30, shape)).astype(np.uint8), mask


@pytest.fixture
def nnunet_root(tmp_path):
  """Twelve volumes of two grids: nine with labels of 4 classes, one without, two in imagesTs."""
  rng = np.random.default_rng(0)
  root = tmp_path / "Dataset001_Boxes"
  labels = {"background": 0, "a": 1, "b": 2, "c": 3}
  for part in ("imagesTr", "imagesTs", "labelsTr"):
    (root / part).mkdir(parents=True)
  description = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
  (root / "dataset.json").write_text(json.dumps(description))
  for number in range(12):
    shape = (12, 10, 8) if number % 2 else (11, 12, 9)
    image, mask = nested(shape, 4, rng)
    affine = np.diag([1.5, 2.0, 4.0, 1.0])
    parts = [("imagesTs" if number > 9 else "imagesTr", "_0000", image.astype(np.int16) - 100)]
    parts += [("labelsTr", "", mask)] if number < 9 else []
    for part, suffix, array in parts:
      file = nibabel.Nifti1Image(array, affine)
      file.header.set_xyzt_units("mm")
      nibabel.save(file, root / part / f"scan_{number:02d}{suffix}.nii.gz")
  return root


def test_volumes_from_an_nnunet_folder(nnunet_root, tmp_path):
  """Of four classes, with surfaces, and plain DPO on cached margins."""
  config = tiny(
    nnunet_config.get_config(""),
    data__root=str(nnunet_root),
    data__spatial_dims=3,
    data__size=(8, 8, 4),
    data__num_labelled=4,
    data__num_val=2,
    data__num_test=3,
    model__depth=2,
    base__augment=False,
    finetune__augment=False,
    finetune__reference="cached",
    finetune__objective="dpo",
    finetune__beta=0.1,
    evaluate__metrics=("dice", "iou", "hd95", "assd", "nsd"),
  )
  workdir = tmp_path / "run"
  pipeline.run(config, workdir)
  results = files.read_json(workdir / "results.json")
  assert results["class_names"] == ["background", "a", "b", "c"]
  assert results["num_cases"] == {"labelled": 4, "unlabelled": 3, "val": 2, "test": 3}
  unlabelled = files.read_json(workdir / "splits.json")["unlabelled"]
  assert unlabelled == ["scan_09", "scan_10", "scan_11"]
  assert results["spacing_unit"] == results["units"]["hd95"] == "mm"
  assert results["objective"] == "dpo"
  assert len(case_rows(workdir)) == (2 + 3) * 3  # a row a case and foreground class
  for model in ("base", "finetuned", "selected"):
    found = results[model]["test"]
    assert found.keys() == set(config.evaluate.metrics)
    assert 0.2 < found["dice"] < 1 and found["hd95"] > 0
  page = (workdir / "report.html").read_text()
  assert "scan_" in page and len(page) > 100_000


@pytest.fixture
def image_root(tmp_path):
  """Ten cases of two slices, grey, each case of its own size and format; three without masks."""
  rng = np.random.default_rng(1)
  root = tmp_path / "slices"
  for part in ("images", "masks"):
    (root / part).mkdir(parents=True)
  for number in range(10):
    shape = (18 + number, 25 - number)
    suffix = ("png", "tif", "jpg")[number % 3]
    for z in (9, 10):
      image, mask = nested(shape, 2, rng)
      name = f"case{number:02d}_z{z}"
      Image.fromarray(image).save(root / "images" / f"{name}.{suffix}")
      if number < 7:
        Image.fromarray(mask * 255).save(root / "masks" / f"{name}.png")
  return root


def test_slices_of_mixed_sizes_and_formats_from_a_folder(image_root, tmp_path):
  config = tiny(
    folder_config.get_config(""),
    data__root=str(image_root),
    data__size=(16, 16),
    data__case_pattern=r"(case\d+)_z\d+",
    data__num_labelled=3,
    data__num_val=2,
    data__num_test=2,
  )
  workdir = tmp_path / "run"
  pipeline.run(config, workdir)
  results = files.read_json(workdir / "results.json")
  assert results["num_cases"] == {"labelled": 3, "unlabelled": 3, "val": 2, "test": 2}
  assert files.read_json(workdir / "splits.json")["unlabelled"] == ["case07", "case08", "case09"]
  assert files.read_json(workdir / "pairs" / "manifest.json")["num_images"] == 6  # slices
  rows = case_rows(workdir)
  assert len(rows) == 4 and len({row["case_id"] for row in rows}) == 4  # a row a case, not a slice
  assert results["spacing_unit"] == "voxel" and 0.2 < results["finetuned"]["test"]["dice"] < 1


USER_JUDGE = """
import jax.numpy as jnp


def few_edges(images, masks, probs):
  assert images.ndim == 4 and probs.shape[:-1] == masks.shape
  return -jnp.sum(masks[:, :, 1:] != masks[:, :, :-1], axis=(2, 3))
"""


def test_options_off_the_beaten_track_in_one_job(tiny_config, tmp_path, monkeypatch):
  """A judge by dotted name, two base models, last checkpoint, bfloat16, constant rate, clipping."""
  (tmp_path / "clinic").mkdir()
  (tmp_path / "clinic" / "quality.py").write_text(USER_JUDGE)
  monkeypatch.syspath_prepend(tmp_path)
  seen = []

  def agreement(images, masks, probs, context, settings):
    seen.append(context.ensemble_masks.shape)
    return judges.agreement(images, masks, probs, context, settings)

  monkeypatch.setitem(judges.JUDGES, "agreement", judges.Judge(agreement))
  config = tiny_config(
    judge__name="clinic.quality:few_edges",
    judge__compare=("agreement",),
    base__num_members=2,
    base__select="last",
    model__dtype="bfloat16",
    finetune__schedule="constant",
    finetune__clip_norm=0.01,
    finetune__num_steps=2,
    finetune__eval_every_steps=2,
  )
  workdir = tmp_path / "run"
  pipeline.run(config, workdir)
  results = files.read_json(workdir / "results.json")
  assert results["judge"] == "clinic.quality:few_edges"
  assert set(results["judges"]) == {"clinic.quality:few_edges", "agreement"}
  with np.load(workdir / "pairs" / "examples.npz") as examples:
    masks, scores = examples["masks"], examples["scores"]
  np.testing.assert_array_equal(scores, -(masks[:, :, 1:] != masks[:, :, :-1]).sum((2, 3)))
  assert scores.std() > 0
  assert seen and all(shape[1:] == (1, 16, 16) for shape in seen)  # the second base model's masks
  for member in range(2):
    directory = base.member_directory(workdir, member)
    assert files.read_json(directory / "selected.json")["step"] == 40
    assert checkpoint.steps(directory / "params") == [40]
  params = base.load(workdir, dataset_lib.open_dataset(config, workdir))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
  segmenter = models.build(config.model, num_classes=2, spatial_dims=2)
  images = np.zeros((1, 16, 16, 1), np.float32)
  assert "bf16" in str(jax.make_jaxpr(segmenter.apply)(params, images))
  assert (workdir / "report.html").exists()


def test_a_job_without_validation_and_test_cases(tiny_config, tmp_path, capsys):
  """The gate warns, `label_free` chooses, nothing is known of Dice, and prediction works."""
  config = tiny_config(
    data__num_val=0,
    data__num_test=0,
    judge__gate__action="refuse",
    judge__compare=(),
    model__depth=1,
    base__num_steps=40,
    base__learning_rate=0.05,
    base__eval_every_steps=20,
    finetune__num_steps=2,
    finetune__eval_every_steps=1,
  )
  workdir = tmp_path / "run"
  pipeline.run(config, workdir)
  assert "warning: how often the judge 'agreement' is right is unknown" in capsys.readouterr().out
  assert files.read_json(workdir / "base" / "selected.json")["step"] == 40
  results = files.read_json(workdir / "results.json")
  assert results["num_cases"] == {"labelled": 4, "unlabelled": 26, "val": 0, "test": 0}
  assert results["finetuned"]["test"] == results["selected"]["val"] == {"dice": None, "iou": None}
  assert results["selected"]["step"] is None and results["label_free"]["oracle"] is None
  assert results["judges"]["agreement"]["mined"]["weighted_accuracy"] is None
  assert results["judges"]["agreement"]["labelled"]["pair_accuracy"] is not None
  found = files.read_json(workdir / "delivered" / "delivered.json")
  assert found["chosen_by"] == "label_free" and found["step"] == results["delivered"]["step"] == 2
  assert found["checkpoints"] == results["label_free"]["checkpoints"][1:]
  said = summary.text(workdir)
  assert "there are no validation cases" in said and found["reason"] in said
  assert "selected on val" not in said
  text = (workdir / "report.html").read_text()
  assert "There are no test cases" in text and "no validation cases" in text
  assert trained.load(workdir, "delivered").step == 2
  with pytest.raises(errors.ConfigError, match="no validation cases"):
    trained.load(workdir, "best")
  pipeline.run(config, workdir)  # what is done is seen to be
  assert "[evaluate] done before" in capsys.readouterr().out
  # A job on these data whose config, by a split file, does not tell that there are none.
  config.data.split_file, config.judge.name = "splits.json", "auto"
  with pytest.raises(errors.ConfigError, match="judge.name: found 'auto'.* no validation cases"):
    mine.run(config, workdir, tmp_path / "other")
