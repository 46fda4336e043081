"""bootstrap: means by hand, what is resampled together, and what may be claimed."""

import numpy as np
import pytest

from rndpo_jax.study import (
  bootstrap,
)


def run(draw, seed, values, patients=None):
  values = np.asarray(values, np.float64)
  return bootstrap.Run(draw, seed, values, np.arange(len(values)) if patients is None else patients)


def test_the_mean_is_that_over_cases_then_seeds_then_draws():
  runs = [run(0, 0, [0.0, 0.2]), run(0, 1, [0.3]), run(1, 0, [0.6, 0.6, 0.6])]
  # ((0.1 + 0.3) / 2 + 0.6) / 2
  assert bootstrap.interval(runs).mean == pytest.approx(0.4)
  assert bootstrap.interval(runs).num_runs == 3
  assert bootstrap.interval(runs) == bootstrap.interval(runs[::-1])  # whatever their order


def test_equal_differences_have_an_interval_of_no_width_and_a_claim():
  runs = [run(draw, seed, [0.25] * 4) for draw in range(3) for seed in range(2)]
  found = bootstrap.interval(runs)
  assert (found.mean, found.low, found.high, found.claim) == (0.25, 0.25, 0.25, "better")
  worse = bootstrap.interval([run(draw, 0, [-0.5, -0.5]) for draw in range(2)])
  assert worse.claim == "worse"
  assert bootstrap.interval([run(0, 0, [-0.5, -0.5])]).claim == "one draw: no claim"
  assert bootstrap.interval([run(0, 0, [0.0, 0.0])]).claim == "not told apart"


def test_draws_are_resampled_first_and_the_seeds_in_them():
  # Two draws of constant 0 and 1: none, one or both of two resampled draws are the second.
  found = bootstrap.resample([run(0, 0, [0.0] * 3), run(1, 0, [1.0] * 3)], 4000, 0)
  values, counts = np.unique(found, return_counts=True)
  assert values.tolist() == [0.0, 0.5, 1.0]
  np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
  # Two seeds in each of two draws: the second draw's are 1 and 2.
  runs = [run(0, 0, [0.0]), run(0, 1, [0.0]), run(1, 0, [1.0]), run(1, 1, [2.0])]
  found = np.unique(bootstrap.resample(runs, 4000, 0))
  assert found.tolist() == [0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_the_cases_of_a_patient_stay_together():
  # Patients of one and of three cases: both the first, one of each, both the second.
  found = bootstrap.resample([run(0, 0, [1.0, 0.0, 0.0, 0.0], np.array([7, 3, 3, 3]))], 2000, 0)
  assert np.unique(found).tolist() == [0.0, 0.25, 1.0]


def test_the_seeds_of_a_draw_are_resampled_on_the_same_patients():
  # What is hard in a patient is hard for every seed: more seeds tell no more of the patients.
  values = np.array([0.0, 1.0, 5.0])
  one = bootstrap.resample([run(0, 0, values)], 2000, 0)
  both = bootstrap.resample([run(0, 0, values), run(0, 1, values)], 2000, 0)
  assert set(np.round(3 * both)) <= {0, 1, 2, 3, 5, 6, 7, 10, 11, 15}  # sums of three patients
  assert np.std(both) == pytest.approx(np.std(one), rel=0.05)
