"""Prediction around the network: names, batches, probabilities, and the table of scores."""

import csv

import jax
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.evaluation import predict as evaluation_lib
from rndpo_jax.predict import (
  case_reader,
  grid_run,
  inputs,
  programs,
  score_table,
)


def test_probabilities_on_the_own_grid_belong_to_the_mask():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 4, 6, 3)).astype(np.float32)
  shapes = [(9, 8), (5, 12)]
  resize = evaluation_lib.resize_matrices(shapes, (4, 6), (6, 10))
  masks = np.asarray(evaluation_lib.native_masks(logits, resize))
  probs = np.asarray(programs.native_probabilities(logits, resize))
  assert probs.dtype == np.float16
  for row, (h, w) in enumerate(shapes):
    native = dataset_lib.to_native(logits[row], (h, w), (6, 10))
    want = np.asarray(jax.nn.softmax(native))
    np.testing.assert_allclose(probs[row, :h, :w], want, atol=1e-3)
    np.testing.assert_array_equal(masks[row, :h, :w], native.argmax(-1))


def test_new_images_have_no_files_and_no_other_members():
  mix = "base:1, file:3,member+threshold:2, threshold:4"
  assert programs.drawn_mix(mix) == "base:1,threshold:4"
  default = config_lib.base_config().proposals.mix
  assert programs.drawn_mix(default) == default
  assert programs.drawn_mix("base:1,file:3") == programs.drawn_mix("file:3") == default


def test_a_slice_counts_by_what_is_seen_in_it():
  parts = {"agreement": [0.5, 1.0, 0.8], "confidence": [0.1, 1.0, 0.2], "entropy": [-1, 0, -3]}
  found = score_table.of_case({**parts, "weight": [30, 0, 10]})
  assert found == pytest.approx({"agreement": 0.575, "confidence": 0.125, "entropy": -1.5})
  assert score_table.of_case({**parts, "weight": [0, 0, 0]})["confidence"] == pytest.approx(1.3 / 3)


def test_the_worst_case_has_rank_one():
  def row(case_id, agreement, confidence):
    scores = {"agreement": agreement, "confidence": confidence, "entropy": -0.1}
    return {"case_id": case_id, "mask": "m", "scores": scores, "foreground_pixels": 3}

  rows = [row("a", 0.9, 0.5), row("b", 0.2, 0.9), row("=c", 0.9, 0.4)]
  found = list(csv.DictReader(score_table.text(rows).splitlines()))
  assert [(one["case_id"], one["rank"]) for one in found] == [("a", "3"), ("b", "1"), ("'=c", "2")]


def _case(name, shape, count=1):
  source = inputs.Input(name, (), ".png")
  return case_reader.Case(source, "", [None] * count, shape, count > 1)


def test_batches_are_of_one_size_and_few_records_wait():
  cases = [_case("v", (20, 30), 7), _case("a", (70, 30)), _case("b", (64, 64)), _case("c", (9, 9))]
  found = [
    [(case.source.case_id, place) for case, place in rows]
    for rows in grid_run.batches(iter(cases), 4)
  ]
  rest = [("v", n) for n in range(4, 7)]
  assert found == [[("v", n) for n in range(4)], [*rest, ("b", 0)], [("a", 0)], [("c", 0)]]
  pulled = 0

  def sizes():
    nonlocal pulled
    for pulled in range(1, 1001):
      yield _case(str(pulled), (64 * pulled, 64))

  stream = grid_run.batches(sizes(), 2)
  assert next(stream)[0][0].source.case_id == "1" and pulled == 9


def test_names_say_which_files_make_a_case(tmp_path):
  for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a10_0000.nii", "a10_0001.nii", "a2_0000.nii"):
    (tmp_path / name).touch()
  found = inputs.list_inputs(str(tmp_path), 2)
  assert [one.case_id for one in found] == ["a2", "a10", "b"]
  assert [file.name for file in found[2].files] == ["b_0000.nii.gz", "b_0001.nii.gz"]
  assert "a2_0000.nii" in found[0].problem and "0000 to 0001" in found[0].problem
  assert found[1].problem == "" and found[1].mask_name == "a10.nii"
  one = inputs.list_inputs(str(tmp_path / "b_0001.nii.gz"), 2)
  assert one == [found[2]]
  (tmp_path / "plain.nii").touch()
  assert len(inputs.list_inputs(str(tmp_path), 1)) == 6
  assert inputs.Input("x", (), ".JPG").mask_name == "x.png"


def test_images_of_formats_that_are_not_read_are_named(tmp_path):
  names = ("a.hdr", "b.mgz", "c.mnc", "d.jp2")
  for name in (*names, "a.img", "e.nii", "notes.txt"):
    (tmp_path / name).touch()
  found = inputs.list_inputs(str(tmp_path), 1)
  assert [one.files[0].name for one in found if one.problem] == list(names)
  assert [one.case_id for one in found if not one.problem] == ["e"]


@pytest.mark.parametrize(
  "make, source, message",
  [
    ([], "gone", "gone: no such folder or file"),
    (["notes.txt"], ".", r"no images; expected files .nii.gz"),
    (["imagesTs/"], ".", r"give .*imagesTs"),
    (["p/", "p/q/", "p/q/im.png", "p/n.txt"], ".", r"1 images such as .*p/q/im.png: .*as q_im.png"),
    (["a.png", "a.tif"], ".", r"a.tif: second file of the id 'a', beside .*a.png"),
  ],
)
def test_bad_input_is_one_line(tmp_path, make, source, message):
  for name in make:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
  with pytest.raises(errors.DataError, match=message) as caught:
    inputs.list_inputs(str(tmp_path / source), 1)
  assert "\n" not in str(caught.value)
