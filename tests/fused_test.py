"""fused: weights by hand, the weighted majority, and a whole mining by the fused judge."""

import numpy as np
import pytest

from rndpo_jax import errors, pipeline
from rndpo_jax.checks import config_checks
from rndpo_jax.mining import fused
from rndpo_jax.runtime import files


def test_weights_are_log_odds_and_an_image_has_those_of_the_other_cases():
  truth = np.array([[0.1, 0.2], [0.2, 0.1], [0.1, 0.2], [0.3, 0.3]])
  up = np.tile([0.0, 1.0], (4, 1))
  # `up` is right in 1, 0, 1 of the images of cases a, a, b; c tells nothing. `down` is its mirror.
  whole, others = fused.log_odds({"up": up, "down": -up}, truth, ["a", "a", "b", "c"])
  np.testing.assert_allclose(whole, [np.log(0.75 / 0.25), 0.0], rtol=1e-6)
  sure = np.log(fused.MAX_ACCURACY / (1 - fused.MAX_ACCURACY))
  expected = [[sure, 0.0], [sure, 0.0], [0.0, 0.0], [np.log(3.0), 0.0]]
  np.testing.assert_allclose(others, expected, rtol=1e-6)
  # Where a and c are of one patient, c learns of b alone.
  again, others = fused.log_odds(
    {"up": up, "down": -up}, truth, ["a", "a", "b", "c"], group_ids=["x", "x", "y", "x"]
  )
  np.testing.assert_array_equal(again, whole)
  np.testing.assert_allclose(others, [*expected[:3], [sure, 0.0]], rtol=1e-6)


def test_two_proposals_are_told_apart_by_the_weighted_majority():
  """One judge with the odds of both others together decides as they do, and above it alone."""
  scores = np.array([[[0.1, 9.0], [2.0, 1.0], [-3.0, -4.0]]], np.float32)
  for weights, sign in (([2.0, 1.0, 0.5], 1), ([1.0, 1.0, 0.5], -1), ([1.5, 1.0, 0.5], 0)):
    found = np.asarray(fused.fuse(scores, np.float32(weights)))
    assert np.sign(found[0, 1] - found[0, 0]) == sign


def test_votes_are_a_mean_over_opponents_and_scales_do_not_matter():
  scores = np.array([[[1.0, 2.0, 2.0, np.nan], [0.3, 0.2, 0.1, 0.4]]], np.float32)
  found = np.asarray(fused.fuse(scores, np.float32([[0.6, 1.2]])))
  by_hand = [0.6 * -2 / 3 + 1.2 * 1 / 3, 0.2 - 0.4, 0.2 - 1.2, 0 + 1.2]
  np.testing.assert_allclose(found[0], by_hand, rtol=1e-5)
  scaled = np.asarray(fused.fuse(1e3 * scores - 7.0, np.float32([0.6, 1.2])))
  np.testing.assert_array_equal(found, scaled)


def test_the_fused_judge_mines_and_is_measured_like_any_other(tiny_run, tiny_config, tmp_path):
  changes = {"base__workdir": str(tiny_run[1]), "judge__name": "fused"}
  pipeline.run(tiny_config(**changes), tmp_path, ["base", "mine"])
  table = files.read_json(tmp_path / "pairs" / "judges.json")
  assert table["fused"]["used"] and set(table) == {"fused", "agreement", "confidence", "entropy"}
  assert list(table["fused"]["weights"]) == ["agreement", "confidence", "entropy"]
  for name, weight in table["fused"]["weights"].items():
    share = np.clip(table[name]["pair_accuracy"], 0.5, fused.MAX_ACCURACY)
    assert weight == pytest.approx(np.log(share / (1 - share)), rel=1e-5)
  assert table["fused"]["mined"]["num_pairs"] > 0 and table["fused"]["calibration"]
  assert files.read_json(tmp_path / "pairs" / "manifest.json")["num_pairs"] > 0
  alone = tiny_config(judge__name="fused", judge__compare=("agreement", "oracle"))
  with pytest.raises(errors.ConfigError, match="judge.compare: found .*name two or more"):
    config_checks.validate(alone)
