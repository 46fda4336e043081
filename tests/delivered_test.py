"""Which model is delivered: never one that validation cannot tell from a worse one."""

import numpy as np
import pytest
from scipy import stats

from rndpo_jax.evaluation import delivered


def _dice(*differences):
  """Rows of a base at 0.8 and checkpoints that differ from it by case."""
  return 0.8 + np.array([np.zeros(len(differences[0])), *differences])


def _choose(*differences, asked=0.9, near=()):
  steps = list(range(0, 50 * len(differences) + 1, 50))
  return delivered.choose(steps, _dice(*differences), min_probability=asked, near=near)


GOOD = np.array([0.02, 0.01, 0.03, -0.01, 0.02, 0.015, 0.01, 0.02, 0.0, 0.03])


def test_the_last_that_passes_is_taken_not_the_best():
  found = _choose(3 * GOOD, GOOD, -GOOD)
  assert found["step"] == 100 and not found["is_base"]
  assert found["val_dice"] == pytest.approx(0.8 + GOOD.mean())
  assert found["base_val_dice"] == pytest.approx(0.8)
  assert [entry["step"] for entry in found["checkpoints"]] == [50, 100, 150]
  assert "step 100 is delivered" in found["reason"]


def test_a_mean_above_the_base_that_one_case_makes_is_not_enough():
  difference = np.array([0.4] + [-0.02] * 11)
  assert difference.mean() > 0
  found = _choose(difference)
  assert found["step"] == 0 and found["is_base"] and found["val_dice"] == found["base_val_dice"]
  assert "The base is delivered: no checkpoint" in found["reason"]
  assert "nearest, step 50" in found["reason"]


def test_what_validation_half_shows_is_taken_if_it_is_near_the_base():
  """The same differences at a probability between 0.8 and 0.9, and twice as strong a case."""
  weak, strong = np.array([0.03, -0.01, 0.03, -0.02, 0.03, -0.015, 0.015, 0.0]), np.full(8, 0.02)
  p = delivered.paired(weak)["probability"]
  assert delivered.NEAR_PROBABILITY < p < 0.9

  def step(*differences, near, **asked):
    found = _choose(*differences, near=near, **asked)
    assert found["is_base"] == (found["step"] == 0)
    assert (found["chosen_by"] == "validation, label_free") == (
      "kept the labelled" in found["reason"]
    )
    return found["step"]

  assert step(weak, weak, near=[True, True]) == 100
  assert step(weak, weak, near=[True, False]) == 50
  assert step(weak, near=[False]) == step(weak, near=()) == 0
  assert step(weak, near=[True], asked=1.0) == 0  # 1 asks for the base
  assert step(weak - 0.01, near=[True]) == 0  # more likely below than not
  assert step(strong, weak, near=[True, True]) == 50  # what validation shows goes first
  with pytest.raises(ValueError):
    step(weak, weak, near=[True])


def test_worse_everywhere_gives_the_base_and_equal_everywhere_the_checkpoint():
  assert _choose(-np.abs(GOOD) - 1e-6, asked=0.5)["is_base"]
  assert _choose(np.zeros(10))["step"] == 50
  assert _choose(np.full(60, 0.1), asked=1.0)["is_base"]  # of 60 cases 1 - 2**-60 is 1 in float64


@pytest.mark.parametrize("count,step", [(1, 0), (3, 0), (4, 50)])
def test_few_cases_show_no_more_than_chance_could(count, step):
  """All better: by chance once in 2**n times, so 3 cases give 0.875 at most and 4 give 0.9375."""
  found = _choose(np.full(count, 0.1))
  assert found["step"] == step and found["checkpoints"][0]["probability"] == 1 - 2.0**-count
  assert (found["checkpoints"][0]["ci"] is None) == (count == 1)
  assert step or f"{count} validation cases show" in found["reason"]


def test_probability_is_that_of_the_t_test_where_differences_are_normal():
  """p is near Student's T(mean / (s / sqrt(n))), s with n - 1, and below the plain share."""
  difference = stats.norm.ppf((np.arange(40) + 0.5) / 40) * 0.03 + 0.004
  found = delivered.paired(difference)
  standard = difference.std(ddof=1) / np.sqrt(40)
  assert found["probability"] == pytest.approx(
    stats.t.cdf(difference.mean() / standard, 39), abs=0.01
  )
  again = delivered.paired(difference)
  assert found == again and found["ci"][0] < found["mean"] < found["ci"][1]


def test_shapes_that_do_not_fit_are_named():
  for dice in (np.zeros((2, 0)), np.zeros((3, 4)), np.full((2, 4), np.nan)):
    with pytest.raises(ValueError, match="of 2 steps"):
      delivered.choose([0, 50], dice, min_probability=0.9)


def test_cases_of_one_group_count_as_one():
  """Two frames of each of 5 patients that say the same tell no more than one frame of each."""
  five = np.array([0.02, 0.01, -0.01, 0.03, 0.02])
  single = delivered.choose([0, 50], _dice(five), min_probability=0.97)
  patients = np.repeat(["e", "a", "d", "b", "c"], 2)
  double = delivered.choose([0, 50], _dice(np.repeat(five, 2)), patients, min_probability=0.97)
  entry, twice = single["checkpoints"][0], double["checkpoints"][0]
  assert entry["probability"] == twice["probability"] <= 1 - 2.0**-5
  np.testing.assert_allclose(entry["ci"], twice["ci"], rtol=1e-9)
  assert double["is_base"] and double["num_cases"] == 10 and double["num_groups"] == 5
  assert "10 validation cases of 5 groups show with probability 0.969 at most" in double["reason"]
  assert delivered.paired(np.array([0.1, 0.2]), ["a", "a"])["ci"] is None
