"""The gate before fine-tuning: who passes, what a refusal says, whom `auto` takes."""

import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.mining import judge_gate, pair_value, reliability
from rndpo_jax.runtime import files


def _entry(figure, interval, **more):
  return {"mined": {"weighted_accuracy": figure, "weighted_accuracy_ci": interval}, **more}


TABLE = {
  "agreement": _entry(0.427, [0.38, 0.47], used=True),
  "confidence": _entry(0.61, [0.52, 0.7]),
  "entropy": _entry(0.63, [0.49, 0.8]),
  "oracle": _entry(1.0, [1.0, 1.0]),
}


def test_a_judge_below_break_even_is_refused_and_one_that_passes_is_named():
  with pytest.raises(errors.MiningError) as refusal:
    judge_gate.check(TABLE, "agreement", min_accuracy=0.5, action="refuse")
  text = str(refusal.value)
  assert "'agreement' has 0.427 (0.380 to 0.470) of the pairs right" in text
  assert "'confidence' passes with 0.610 (0.520 to 0.700)" in text  # the oracle is no remedy
  assert "min_accuracy=0.5" in text and "config.judge.gate.action=warn" in text
  assert len(text.splitlines()) == 1


def test_the_lower_bound_decides_not_the_figure():
  options = {"min_accuracy": 0.5, "action": "refuse"}
  assert judge_gate.check(TABLE, "confidence", **options) is None
  assert judge_gate.check(TABLE, "oracle", **options) is None
  for table in (TABLE, {"entropy": _entry(0.9, None)}, {"entropy": {}}):
    with pytest.raises(errors.MiningError, match="'entropy' has"):
      judge_gate.check(table, "entropy", **options)
  few = {"entropy": _entry(1.0, [1.0, 1.0])}
  few["entropy"]["mined"]["num_groups"] = 3
  with pytest.raises(errors.MiningError, match="3 groups of validation cases .* fewer than 4 do"):
    judge_gate.check(few, "entropy", **options)
  few["entropy"]["mined"]["num_groups"] = 4
  assert judge_gate.check(few, "entropy", **options) is None
  assert judge_gate.check({"entropy": {}}, "entropy", min_accuracy=0.0, action="refuse") is None
  options["min_accuracy"] = 0.53
  with pytest.raises(errors.MiningError, match="no other judge of config.judge.compare passes"):
    judge_gate.check(TABLE, "confidence", **options)


def test_warn_says_it_and_off_says_nothing():
  found = judge_gate.check(TABLE, "entropy", min_accuracy=0.5, action="warn")
  assert "'entropy' has 0.630" in found
  assert judge_gate.check(TABLE, "entropy", min_accuracy=0.5, action="off") is None


def test_a_judge_that_no_validation_case_measures_is_not_refused_but_said():
  table = {"agreement": {**TABLE["agreement"], "split": None}, "confidence": TABLE["confidence"]}
  for action in ("refuse", "warn"):
    found = judge_gate.check(table, "agreement", min_accuracy=0.5, action=action)
    assert "'agreement' is right is unknown: there are no validation cases" in found
  assert judge_gate.check(table, "agreement", min_accuracy=0.5, action="off") is None


def test_auto_is_the_best_lower_bound():
  names = ("entropy", "agreement", "confidence")
  assert judge_gate.best(TABLE, names) == "confidence"
  few = {name: _entry(figure, [0.4, 0.9]) for name, figure in (("a", 0.6), ("b", 0.8), ("c", 0.7))}
  for entry in few.values():
    entry["mined"]["num_groups"] = 3
  assert judge_gate.best(few, "abc") == "b"
  assert judge_gate.used(TABLE, "auto") == "agreement" and judge_gate.used({}, "x") == "x"
  with pytest.raises(errors.FileError, match="no judge is marked as used"):
    judge_gate.used({"entropy": {}, "version": 1}, "auto")


def test_shares_of_right_pairs_by_hand():
  """Image 0 of case a: right (weight 3), wrong (1); image 1 of b: right (2), a tie, no pair."""
  truth = np.array([[0.9, 0.5, 0.95], [0.5, 0.7, 0.7]])
  chosen, rejected = np.array([[0, 0, 0], [1, 1, 0]]), np.array([[1, 2, 0], [0, 2, 0]])
  weight = np.array([[3.0, 1.0, 0.0], [2.0, 7.0, 0.0]])
  found = reliability.mined(truth, chosen, rejected, weight, ["a", "b"], num_bootstrap=500, seed=0)
  assert found["pair_accuracy"] == pytest.approx(2 / 3)
  assert found["weighted_accuracy"] == pytest.approx(5 / 6)
  assert found["num_pairs"] == 3 and found["num_cases"] == found["num_groups"] == 2
  assert found["pair_accuracy_ci"] == pytest.approx([0.5, 1.0])
  assert found["weighted_accuracy_ci"] == pytest.approx([0.75, 1.0])
  one = reliability.mined(truth, chosen, rejected, weight, ["a", "a"], num_bootstrap=9, seed=0)
  assert one["pair_accuracy"] == pytest.approx(2 / 3) and one["pair_accuracy_ci"] is None
  none = reliability.mined(truth, chosen, chosen, weight, ["a", "b"], num_bootstrap=9, seed=0)
  assert none["pair_accuracy"] is None and none["num_pairs"] == 0


def test_gradient_mass_of_each_normalization():
  size = np.array([0, 4, 100])
  options = {"exponent": 0.5, "floor": 9.0}

  def mass(*names, weights=(1.0,), **more):
    found = pair_value.gradient_mass(size, normalizations=names, weights=weights, **options, **more)
    return found.tolist()

  assert mass("none") == [0, 4, 100] and mass("region") == [0, 1, 1]
  assert mass("power") == pytest.approx([0, 4 / 3, 10])
  assert mass("none", voxel_volume=2.0) == [0, 8, 200]
  assert mass("region", "none", weights=(1.0, 0.5)) == [0, 3, 51]


@pytest.fixture(scope="module")
def mined(tiny_run, tmp_path_factory):
  """(config changes, work directory) mined by `auto` on the tiny run's base."""
  from tiny_config import get_config

  changes = {"base__workdir": str(tiny_run[1]), "judge__name": "auto"}
  workdir = tmp_path_factory.mktemp("auto") / "run"
  pipeline.run(get_config(**changes), workdir, ["base", "mine"])
  return changes, workdir


def test_auto_mines_with_the_judge_it_took(mined):
  table = files.read_json(mined[1] / "pairs" / "judges.json")
  used = [name for name, entry in table.items() if entry["used"]]
  assert used == [judge_gate.best(table, ("agreement", "confidence", "entropy"))]
  assert files.read_json(mined[1] / "pairs" / "manifest.json")["judge"] == used[0]
  with np.load(mined[1] / "pairs" / "validation.npz") as pairs:
    gain = np.take_along_axis(pairs["truth"], pairs["chosen"], 1)
    gain = gain - np.take_along_axis(pairs["truth"], pairs["rejected"], 1)
    counted = pairs["valid"] & (gain != 0)
    right = (gain > 0)[counted].mean()
  assert table[used[0]]["mined"]["pair_accuracy"] == pytest.approx(right)


def test_the_gate_fires_in_mining_also_on_a_rerun_and_says_what_to_do(mined, tiny_config, capsys):
  changes, workdir = mined
  directory = workdir / "pairs"
  strict = {"judge__gate__action": "refuse", "judge__gate__min_accuracy": 1.0}
  (directory / "manifest.json").unlink()
  with pytest.raises(errors.MiningError, match="min_accuracy=1 is asked"):
    pipeline.run(tiny_config(**changes, **strict), workdir, ["mine"])
  assert not (directory / "manifest.json").exists()
  strict["judge__gate__action"] = "warn"  # the same work directory: the gate changes no figure
  pipeline.run(tiny_config(**changes, **strict), workdir, ["mine"])
  assert "warning: the judge" in capsys.readouterr().out
  assert (directory / "manifest.json").exists()


def test_a_copy_of_the_config_has_the_judge():
  config = config_lib.base_config().lock()
  assert judge_gate.with_judge(config, "agreement") is config
  assert judge_gate.with_judge(config, "entropy").judge.name == "entropy"
  assert config.judge.name == "agreement"
