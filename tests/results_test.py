"""The figures of results.json against values computed by hand."""

import json

import numpy as np
import pytest

from rndpo_jax.evaluation import results


def _case(split, case_id, rows, surface=None):
  """rows: (shared, in mask, in label) of each foreground class."""
  counts = np.array([(0, 0, 0), *rows], np.int64).T
  return results.Case(split, case_id, counts, surface)


CASES = [
  _case("val", "v", [(1, 1, 1), (0, 0, 0)]),  # Dice 1, 1
  _case("test", "a", [(2, 4, 4), (0, 0, 3)]),  # Dice 1/2, 0; IoU 1/3, 0
  _case("test", "b", [(3, 3, 3), (0, 2, 0)]),  # Dice 1, 0
  _case("test", "c", [(1, 2, 2), (1, 1, 1)]),  # Dice 1/2, 1; IoU 1/3, 1
]


def test_mean_is_over_classes_then_cases_and_keeps_empty_masks():
  got = results.mean_metrics(CASES, "test", ["dice", "iou"])
  assert got["dice"] == pytest.approx((0.25 + 0.5 + 0.75) / 3)
  assert got["iou"] == pytest.approx((1 / 6 + 0.5 + 2 / 3) / 3)
  assert results.mean_metrics(CASES, "val", ["dice"]) == {"dice": 1.0}
  assert results.case_dice(CASES[3]) == 0.75


def test_a_split_without_cases_is_unknown():
  some = [case for case in CASES if case.split == "val"]
  point = results.curve_point(5, some)
  assert point == {"step": 5, "val_dice": 1.0, "test_dice": None}
  assert set(results.sustained([point, point]).values()) == {None}
  assert results.select_step([results.curve_point(0, CASES[1:])]) is None
  assert results.empty_masks(some, "test") == dict.fromkeys(results.empty_masks(CASES, "test"), 0)


def test_surface_metrics_are_read_class_by_class():
  surface = [{"hd95": 1.0, "assd": 0.5, "nsd": 1.0}, {"hd95": 4.0, "assd": 2.5, "nsd": 0.5}]
  case = CASES[0]._replace(surface=surface)
  assert results.case_values(case, ["hd95"]) == {"hd95": [1.0, 4.0]}
  want = {"hd95": 2.5, "assd": 1.5, "nsd": 0.75, "dice": 1.0}
  assert results.mean_metrics([case], "val", list(want)) == want


def test_empty_masks_are_counted_by_kind():
  assert results.empty_masks(CASES, "test") == {
    "total": 6,
    "both": 0,
    "mask_only": 1,
    "label_only": 1,
  }
  assert results.empty_masks(CASES, "val")["both"] == 1


def _curve(val, test):
  return [
    {"step": 10 * i, "val_dice": v, "test_dice": t}
    for i, (v, t) in enumerate(zip(val, test, strict=True))
  ]


def test_sustained_by_hand():
  curve = _curve([0] * 8, [0.8, 0.7, 0.9, 0.8, 0.85, 0.83, 0.82, 0.86])
  got = results.sustained(curve)  # 7 checkpoints: the last third is 2, the base is none of them
  assert got["peak"] == 0.9 and got["final"] == 0.86
  assert got["last_third_mean"] == pytest.approx(0.84)
  assert got["fraction_above_base"] == pytest.approx(5 / 7)  # equal to the base is not above
  assert got["drop_from_peak"] == pytest.approx(0.04)


def test_sustained_of_one_checkpoint_and_of_a_base_that_is_best():
  got = results.sustained(_curve([0, 0], [0.8, 0.7]))
  assert got == {
    "peak": 0.7,
    "final": 0.7,
    "last_third_mean": 0.7,
    "fraction_above_base": 0.0,
    "drop_from_peak": 0.0,
  }


def test_selection_is_by_validation_first_on_ties():
  assert results.select_step(_curve([0.5, 0.8, 0.8, 0.7], [0, 0, 1, 1])) == 10
  assert results.select_step(_curve([0.8, 0.8], [0, 1])) == 0
  assert results.curve_point(7, CASES) == {
    "step": 7,
    "val_dice": 1.0,
    "test_dice": pytest.approx(0.5),
  }


def test_gallery_takes_best_median_and_worst_of_both_orders():
  before = {c: 0.5 for c in "abcdefg"} | {"g": 0.0}
  after = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.3, "f": 0.5, "g": 0.45}
  got = results.gallery_choice(before, after)
  # Changes: g .45, a .4, b .3, c .2, d .1, f 0, e -.2; afterwards: a, b, c, d, f, g, e.
  assert got == {
    "g": "best change",
    "e": "worst change",
    "c": "median change",
    "a": "best Dice after",
    "f": "worst Dice after",  # g and e, lower still, are taken
    "d": "median Dice after",
  }
  few = results.gallery_choice({"x": 0.1, "y": 0.2}, {"x": 0.3, "y": 0.2})
  assert set(few) == {"x", "y"}


def test_fullest_slice_prefers_the_middle_of_equals():
  masks = np.zeros((2, 3, 3, 5), np.uint8)
  assert results.fullest_slice(masks) == 2
  masks[1, 0, 0, 4] = 3
  assert results.fullest_slice(masks) == 4


def test_plain_gives_strict_json():
  value = {"a": np.float32(0.5), "b": [np.int64(2), np.nan, float("inf")], "c": np.bool_(True)}
  text = json.dumps(results.plain(value), allow_nan=False)
  assert json.loads(text) == {"a": 0.5, "b": [2, None, None], "c": True}


@pytest.mark.parametrize(
  "base,final,peak,accuracy,interval,said",
  [
    (0.85, 0.891, 0.9, 0.71, [0.6, 0.8], []),  # 0.009 below the peak
    (0.85, 0.889, 0.9, 0.71, None, ["lies 0.011 Dice below the peak on test (0.900)"]),
    (0.85, 0.84, 0.84, None, None, ["worse than the base on test: Dice 0.840 against 0.850"]),
    (0.009, 0.3, 0.3, 0.71, [0.6, 0.8], ["base has learned nothing: its test Dice is 0.009"]),
    (0.01, 0.3, 0.3, 0.71, [0.6, 0.8], []),
    (0.8, 0.8, 0.8, 0.6, [0.5, 0.7], ["told from chance: its pair accuracy is 0.600 (0.500 to"]),
    (0.8, 0.8, 0.8, 0.4, [0.3, 0.49], ["judge agreement is worse than chance"]),
    (0.8, 0.8, 0.8, 0.5, [None, None], ["told from chance: its pair accuracy is 0.500, and"]),
    (0.8, 0.8, 0.8, 0.4, None, ["is worse than chance: its pair accuracy is 0.400, and"]),
    (0.0, 0.0, 0.2, 0.5, None, ["has learned nothing", "below the peak", "told from chance"]),
  ],
)
def test_warnings(base, final, peak, accuracy, interval, said):
  content = {
    "base": {"test": {"dice": base}},
    "sustained": {"final": final, "peak": peak, "drop_from_peak": peak - final},
    "judge": "agreement",
    "judges": {"agreement": {"pair_accuracy": accuracy, "pair_accuracy_ci": interval}},
  }
  found = results.warnings(content, has_beta=True, is_judged=True)
  assert len(found) == len(said)
  assert all(part in text for part, text in zip(said, found, strict=True)), found
  # Without preferences there is no beta to change, and without pairs no judge to doubt.
  found = results.warnings(content, has_beta=False, is_judged=False)
  assert len(found) == sum("chance" not in part for part in said)
  assert not any("beta" in text or "judge" in text for text in found)
