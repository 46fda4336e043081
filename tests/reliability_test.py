"""Reliability figures by hand, against scipy, and where they are undefined."""

import json

import numpy as np
import pytest
from scipy import stats

from rndpo_jax.mining.pair_value import calibration, smoothing_of_pairs
from rndpo_jax.mining.reliability import mined, reliability


def measure(scores, truth, cases=None, num_bootstrap=200, seed=0):
  cases = [str(n) for n in range(len(scores))] if cases is None else cases
  return reliability(scores, truth, cases, num_bootstrap=num_bootstrap, seed=seed)


def test_by_hand():
  # Informative pairs (0, 1), (0, 2), (1, 2): right, right, tied by score.
  got = measure([[0.9, 0.2, 0.2]], [[0.8, 0.6, 0.5]])
  assert got["pair_accuracy"] == pytest.approx(2.5 / 3)
  assert got["kendall_tau"] == pytest.approx(2 / np.sqrt(3 * 2))
  assert got["top1_regret"] == 0 and got["num_cases"] == 1
  # The top of the judge is proposal 1.
  got = measure([[0.1, 0.9, 0.2]], [[0.8, 0.6, 0.5]])
  assert got["pair_accuracy"] == pytest.approx(1 / 3)
  assert got["top1_regret"] == pytest.approx(0.2)


def test_proposals_that_do_not_count_change_nothing():
  scores, truth = [[0.9, 5.0, 0.2, 0.3], [0.1, 0.9, np.nan, 0.2]], [[0.8, 0.9, 0.6, 0.5]] * 2
  judged = np.array([[True, False, True, True], [False, False, False, False]])
  got = reliability(scores, truth, ["a", "b"], num_bootstrap=9, seed=0, judged=judged)
  assert got == reliability([[0.9, 0.2, 0.3]], [[0.8, 0.6, 0.5]], ["a"], num_bootstrap=9, seed=0)
  assert got["pair_accuracy"] == pytest.approx(2 / 3) and got["num_cases"] == 1
  none = reliability(scores, truth, ["a", "b"], num_bootstrap=9, seed=0, judged=0 * judged > 0)
  assert none["pair_accuracy"] is none["top1_regret"] is None and none["num_cases"] == 0


def test_perfect_and_reversed_judges():
  truth = np.random.default_rng(0).random((6, 5))
  good, bad = measure(truth, truth), measure(-truth, truth)
  assert (good["pair_accuracy"], good["kendall_tau"], good["top1_regret"]) == (1, 1, 0)
  assert (bad["pair_accuracy"], bad["kendall_tau"]) == (0, -1)
  assert bad["top1_regret"] == pytest.approx(np.mean(truth.max(1) - truth.min(1)))
  assert good["pair_accuracy_ci"] == [1, 1]


def test_kendall_tau_is_tau_b():
  rng = np.random.default_rng(1)
  scores, truth = rng.integers(0, 4, (30, 6)), rng.integers(0, 4, (30, 6))
  expected = [stats.kendalltau(s, t).statistic for s, t in zip(scores, truth, strict=True)]
  assert measure(scores, truth)["kendall_tau"] == pytest.approx(np.mean(expected))


def test_a_case_weighs_once_however_many_slices_it_has():
  truth = np.array([[0.2, 0.8]] * 4)
  scores = np.array([[0, 1], [0, 1], [1, 0], [1, 0]])
  # Case a: right, right, wrong; case b: wrong.
  got = measure(scores, truth, ["a", "a", "a", "b"])
  assert got["num_cases"] == 2
  assert got["pair_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
  assert got["top1_regret"] == pytest.approx((0.2 + 0.6) / 2)
  np.testing.assert_allclose(got["pair_accuracy_ci"], [0, 2 / 3])


def test_images_without_an_informative_pair_are_left_out():
  scores, truth = [[0.1, 0.2], [0.1, 0.2]], [[0.5, 0.5], [0.1, 0.9]]
  got = measure(scores, truth)
  assert got["pair_accuracy"] == 1 and got["pair_accuracy_ci"] is None
  assert got["top1_regret_ci"] == [0, 0] and got["num_cases"] == 2


def test_undefined_is_none_and_never_nan():
  got = measure([[0.1, 0.2], [np.nan, 0.2]], [[0.5, 0.5], [0.3, 0.3]])
  assert got["pair_accuracy"] is None and got["kendall_tau"] is None
  assert got["pair_accuracy_ci"] is None and got["top1_regret"] == 0
  json.dumps(got, allow_nan=False)
  got = measure(np.zeros((0, 4)), np.zeros((0, 4)))
  assert got["top1_regret"] is None and got["num_cases"] == 0


def test_constant_and_unusable_scores_tell_nothing():
  for scores in ([[0.5, 0.5, 0.5]], [[np.nan] * 3]):
    got = measure(scores, [[0.1, 0.2, 0.3]])
    assert got["pair_accuracy"] == 0.5 and got["kendall_tau"] == 0
  # The proposal without a score is never the top; its pairs count one half.
  got = measure([[0.2, np.inf, 0.1]], [[0.3, 0.2, 0.1]])
  assert got["top1_regret"] == 0 and got["pair_accuracy"] == pytest.approx(2 / 3)


def test_intervals_are_seeded_and_hold_the_mean():
  rng = np.random.default_rng(2)
  truth = rng.random((40, 5))
  scores = truth + 0.3 * rng.normal(size=truth.shape)
  first, again, other = (measure(scores, truth, seed=s, num_bootstrap=500) for s in (0, 0, 1))
  assert first == again and first != other
  for name in ("pair_accuracy", "kendall_tau", "top1_regret"):
    low, high = first[f"{name}_ci"]
    assert low < first[name] < high
  accuracy = [measure(scores[n : n + 1], truth[n : n + 1])["pair_accuracy"] for n in range(40)]
  half = 1.96 * np.std(accuracy) / np.sqrt(40)
  low, high = first["pair_accuracy_ci"]
  assert (high - low) / 2 == pytest.approx(half, rel=0.2)


@pytest.mark.parametrize(
  "scores,truth,cases",
  [
    (np.zeros((2, 3)), np.zeros((2, 4)), ["a", "b"]),
    (np.zeros((2, 3)), np.zeros((2, 3)), ["a"]),
    (np.zeros((1, 3)), np.full((1, 3), np.nan), ["a"]),
  ],
)
def test_input_that_does_not_fit_is_refused(scores, truth, cases):
  with pytest.raises(ValueError):
    measure(scores, truth, cases)


def test_calibration_counts_right_pairs_by_gap():
  # Gaps 1, 3, 2: the first image's pairs are right at 1 and 3 and wrong at 2.
  found = calibration([[0.0, 1.0, 3.0]], [[0.0, 0.6, 0.5]], num_bins=3)
  assert len(found["gap_edges"]) == 2 and 1 < found["gap_edges"][0] < 2 < found["gap_edges"][1] < 3
  assert found["accuracy"] == [1.0, 0.0, 1.0]
  found |= {"gap_edges": [1.5, 2.5], "accuracy": [0.9, 0.3, 1.0]}
  smoothing = smoothing_of_pairs([[1.0, 2.0], [3.0, 1.4]], found)
  np.testing.assert_allclose(smoothing, [[0.1, 0.5], [0.0, 0.1]], rtol=1e-12)
  nothing = calibration([[1.0, 1.0]], [[0.0, 0.5]])
  assert nothing == {"gap_edges": [], "accuracy": [0.5]}


@pytest.mark.parametrize(
  ("gaps", "right", "asked", "share"),
  [
    ([1, 1, 1, 5, 5, 5], [1, 1, 0, 1, 1, 1], [1, 2, 5, 6], [2 / 3, 2 / 3, 1, 1]),
    ([1, 2, 2, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1], [1, 2.2, 2.7, 4], [0.75, 0.75, 1, 1]),
    ([2, 2, 2], [1, 1, 1], [1, 2, 3], [1, 1, 1]),
  ],
)
def test_equal_gaps_leave_no_gap_of_which_nothing_is_known(gaps, right, asked, share):
  # As of a judge that gives marks from 0 to 10; a gap above all that validation had counts, too.
  signs = np.where(right, 1.0, -1.0)
  found = calibration([[g, 0.0] for g in gaps], [[s, 0.0] for s in signs])
  smoothing = smoothing_of_pairs(np.array(asked, float), found)
  np.testing.assert_allclose(smoothing, 1 - np.array(share), rtol=1e-12, atol=1e-12)


def test_intervals_are_over_groups_of_cases():
  """Each case twice, in one group: the figures and their intervals are those of it once."""
  rng = np.random.default_rng(0)
  scores, truth = rng.normal(size=(2, 8, 4))
  ids = [f"case {n}" for n in (3, 1, 4, 0, 5, 9, 2, 6)]
  options = {"num_bootstrap": 300, "seed": 1}
  pairs = rng.permuted(np.tile(np.arange(4), (8, 1)), axis=1)[:, :2]
  again = [np.concatenate([x, x]) for x in (scores, truth, pairs)]
  more = [f"{name} at rest" for name in ids]
  for once, twice in (
    (
      reliability(scores, truth, ids, **options),
      reliability(*again[:2], ids + more, group_ids=ids * 2, **options),
    ),
    (
      mined(truth, pairs[:, :1], pairs[:, 1:], np.ones((8, 1)), ids, **options),
      mined(
        again[1], again[2][:, :1], again[2][:, 1:], np.ones((16, 1)), ids + more,
        group_ids=ids * 2, **options,
      ),
    ),
  ):  # fmt: skip
    for name in (name for name in once if name.startswith(("pair", "weighted", "kendall", "top1"))):
      np.testing.assert_allclose(once[name], twice[name], rtol=1e-9, err_msg=name)
    assert twice["num_cases"] == 2 * once["num_cases"]


def test_intervals_of_few_groups_are_wider_than_plain_percentiles():
  """Five groups, by hand: t of 4 degrees is 2.776, so the ends are Phi(+-3.104), below 0.00095."""
  right = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
  truth = np.stack([right, 1 - right], axis=1)
  chosen, rejected = np.zeros((5, 1), int), np.ones((5, 1), int)
  found = mined(
    truth, chosen, rejected, np.ones((5, 1)), list("abcde"), num_bootstrap=20_000, seed=0
  )
  # Of five draws none is right in 0.0003, at most one in 0.0067, at most two in 0.058: a plain
  # 2.5% would be 0.4.
  np.testing.assert_allclose(found["pair_accuracy_ci"], [0.2, 1.0])
  assert found["pair_accuracy"] == 0.8


def test_a_judge_by_chance_seldom_passes_with_few_groups():
  rng, passes = np.random.default_rng(0), 0
  for _ in range(200):
    right = rng.random((5, 1)) < 0.5
    truth = np.concatenate([right, ~right], axis=1).astype(float)
    found = mined(
      truth, np.zeros((5, 4), int), np.ones((5, 4), int), np.ones((5, 4)), list("abcde"),
      num_bootstrap=300, seed=0,
    )  # fmt: skip
    passes += found["weighted_accuracy_ci"][0] >= 0.5
  assert passes <= 0.05 * 200
