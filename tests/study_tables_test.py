"""Tables of a study from records made by hand."""

import pytest
from study_cells import DPO, RN, record

from rndpo_jax.study import (
  bootstrap,
  study_groups,
  study_tables,
)


def test_gains_and_differences_are_paired_by_draw_and_seed():
  winner = [record(RN, 0, 0, (0.6, 0.8)), record(RN, 1, 0, (0.6, 0.8))]
  loser = [record(DPO, 0, 0, (0.4, 0.6)), record(DPO, 2, 0, (0.9, 0.9))]
  (group,) = study_groups.groups(winner + loser)
  assert study_groups.gain(winner).mean == pytest.approx(0.1)
  found = study_groups.difference(winner, loser)
  assert found.num_runs == 1 and found.mean == pytest.approx(0.2)
  table = study_tables.main_table(group)
  rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
  assert rows[RN]["gain, sustained"] == "+0.100 (+0.100 to +0.100)"
  assert rows[RN]["against the base"] == "better"
  # -0.1 in one run and +0.4, +0.2 in the other: nothing can be claimed; the worst is shown.
  assert rows[DPO]["against the base"] == "not told apart"
  assert rows[DPO]["worst run"] == "\u22120.100"
  (pair,) = study_tables.pair_table(group).rows
  assert pair[:4] == [DPO, RN, "4 / 4", "1"] and pair[5] == pair[7] == "one draw: no claim"
  # How long a training is tells recipes apart, as a setting such as beta does not.
  longer = [record(RN, 0, 0, (0.9, 0.9), axes={"finetune.num_steps": 9})]
  (group,) = study_groups.groups(winner + longer)
  (pair,) = study_tables.pair_table(group).rows
  assert pair[:4] == [RN, f"{RN}, finetune.num_steps=9", "4 / 4", "1"]
  # Runs that share no cases are not compared.
  # Nor those of two bases, as of one seed on two machines.
  for change in ({"ids": "others"}, {"base": [0.5, 0.71]}):
    other = [record(DPO, 0, 0, (0.4, 0.6), cases={**loser[0]["cases"], **change})]
    assert study_groups.difference(winner, other) is None


def test_what_a_phase_adds_is_seen_at_the_last_step():
  def run(draw, sustained, last):
    found = record(RN, draw, 0, sustained)
    return {**found, "cases": {**found["cases"], "last": list(last)}}

  first = [run(draw, (0.5, 0.7), (0.6, 0.8)) for draw in range(2)]
  second = [{**run(draw, (0.5, 0.7), (0.5, 0.7)), "recipe": DPO, "steps": 2} for draw in range(2)]
  (group,) = study_groups.groups(first + second)
  (pair,) = study_tables.pair_table(group).rows
  assert pair[2] == "2 / 4" and pair[5] == "not told apart" and pair[7] == "worse"
  assert pair[6] == "\u22120.100 (\u22120.100 to \u22120.100)"
  text = study_tables.csv_text(first + second)
  assert "tiny,4,dpo,rn_dpo,last,-0.10000,-0.10000,-0.10000,2,worse" in text


def test_means_are_of_draws_and_pairs_of_runs_that_have_some():
  records = [record(RN, 0, seed, (0.8, 0.8), base=(0.5, 0.5)) for seed in range(3)]
  records.append(record(RN, 1, 0, (0.6, 0.6), base=(0.3, 0.3), pairs={"count": 0}))
  records[0]["judge"] = {"name": "agreement", "pair_accuracy": 0.95}
  (group,) = study_groups.groups(records)
  table = study_tables.main_table(group)
  row = dict(zip(table.head, table.rows[0], strict=True))
  assert (row["base"], row["sustained"], row["steps"]) == ("0.400", "0.700", "4")
  assert row["pairs right"] == "0.75"
  (group,) = study_groups.groups(records[3:])
  row = dict(zip(table.head, study_tables.main_table(group).rows[0], strict=True))
  assert row["pairs right"] == "" and row["against the base"] == "one draw: no claim"


def test_runs_that_lack_a_phase_are_counted():
  records = [record(RN, 0, 0, (0.5, 0.7)), record(RN, 0, 1, (0.5, 0.7), left_out=[2])]
  (group,) = study_groups.groups(records)
  assert study_tables.main_table(group).rows[0][2] == "2, 1 with a phase left out"


def test_a_bound_beside_zero_shows_on_which_side_it_is():
  found = bootstrap.Interval(0.002, 0.0002, 0.004, 2, 2)
  assert study_tables._with_interval(found) == "+0.002 (+0.0002 to +0.004)"


def test_stability_tells_the_best_and_the_worst_value_of_an_axis():
  levels = {3.0: (0.5, 0.7), 10.0: (0.6, 0.8), 30.0: (0.3, 0.5)}
  records = [record(RN, 0, 0, dice, axes={"finetune.beta": b}) for b, dice in levels.items()]
  (group,) = study_groups.groups(records)
  (row,) = study_tables.stability_table(group).rows
  assert row[:4] == [RN, "finetune.beta", "3", "10"] and row[5] == "30" and row[-1] == "0.300"
  # Only what all values were run on counts, and without such a run there is no row.
  more = [record(RN, 1, 0, (0.9, 0.9), axes={"finetune.beta": 30.0})]
  (group,) = study_groups.groups(records + more)
  assert study_tables.stability_table(group).rows == [row]
  (group,) = study_groups.groups(records[:1] + more)
  assert not study_tables.stability_table(group).rows
  text = study_tables.csv_text(records)
  assert (
    '"rn_dpo, finetune.beta=30",base,sustained,-0.20000,-0.20000,-0.20000,1,one draw: no claim'
    in text
  )


def test_rules_of_stopping_stand_beside_the_oracle():
  """The label-free rule stops before KL 0.05 is passed; validation took the base of one run."""
  free = {"kl": [0.0, 0.02, 0.2], "dice_to_base": [1.0, 0.9, 0.9], "agreement": [1.0] * 3,
          "labelled_dice": [0.8, 0.8, 0.7]}  # fmt: skip
  curve = {"step": [0, 2, 4], "test": [0.6, 0.63, 0.5], **free}
  rose = {**curve, "test": [0.6, 0.64, 0.7]}
  records = [
    record(RN, 0, 0, (0.4, 0.6), curve=curve, delivered={"step": 0}, config={}),
    record(RN, 0, 1, (0.6, 0.8), curve=rose, delivered={"step": 4}, config={}),
    record(RN, 0, 2, (0.6, 0.8)),  # nothing was measured
  ]
  (group,) = study_groups.groups(records)
  rows = {row[0]: row[1:] for row in study_tables.stop_table(group).rows}
  assert rows["last checkpoint"] == ["2", "+0.000", "\u22120.100", "1", "0.065", "0"]
  assert rows["as delivered"] == ["2", "+0.050", "+0.000", "0", "0.015", "1"]
  assert rows["label-free, KL below 0.05"] == ["2", "+0.035", "+0.030", "0", "0.030", "0"]
  assert rows["KL below 0.01 alone"][-1] == "2" and rows["KL below 0.3 alone"][2] == "\u22120.100"
  assert rows["best on test (oracle)"] == ["2", "+0.065", "+0.030", "0", "0.000", "0"]
  (group,) = study_groups.groups(records[2:])
  assert not study_tables.stop_table(group).rows
  # A run with a limit of its own has a row of its own.
  own = {"evaluate.delivered_max_kl": 0.01}
  more = record(RN, 0, 3, (0.6, 0.8), curve=rose, delivered={"step": 4}, config=own)
  (group,) = study_groups.groups([*records, more])
  rows = {row[0]: row[1:] for row in study_tables.stop_table(group).rows}
  assert rows["label-free, KL below 0.05"][0] == "2"
  assert rows["label-free, KL below 0.01"] == ["1", "+0.000", "+0.000", "0", "0.100", "1"]


def test_points_are_chosen_over_shared_runs_and_never_by_what_is_no_setting():
  def runs(val, seeds, **axes):
    held = [{"last": v, "last_third_mean": v} for v in val]
    return [
      record(RN, 0, s, (0.5, 0.7), axes=axes, val=v) for s, v in zip(seeds, held, strict=True)
    ]

  # More runs are no merit, nor is a seed on which validation is easy: only seed 0 is shared.
  records = runs((0.6, 0.9), (0, 1)) + runs((0.7,), (0,), **{"finetune.beta": 3.0})
  (group,) = study_groups.groups(records)
  assert list(study_groups.chosen(group).arms) == ["rn_dpo, finetune.beta=3"]
  records = runs((0.9,), (0,)) + runs((0.5, 0.5), (1, 2), **{"finetune.beta": 3.0})
  (group,) = study_groups.groups(records)
  assert list(study_groups.chosen(group).arms) == ["rn_dpo, finetune.beta=3"]  # none is shared
  # A judge that errs less often, or a longer training, is no setting that one could choose.
  for axis, values in (("judge.flip_rate", (0.1, 0.4)), ("finetune.num_steps", (400, 800))):
    records = [r for n, value in enumerate(values) for r in runs((n,), (0,), **{axis: value})]
    (group,) = study_groups.groups(records)
    assert study_groups.chosen(group).arms == {}


def test_validation_chooses_the_point_of_a_recipe_not_test():
  def point(recipe, beta, val, dice, **axes):
    held = {"last": val, "last_third_mean": val}
    return record(recipe, 0, 0, dice, axes={"finetune.beta": beta, **axes}, val=held)

  records = [
    point(RN, 3.0, 0.7, (0.6, 0.8)), point(RN, 10.0, 0.6, (0.8, 0.9)),
    point(RN, 3.0, 0.9, (0.9, 0.9), judge="oracle"), point(DPO, 0.1, 0.5, (0.5, 0.7)),
  ]  # fmt: skip
  (group,) = study_groups.groups(records)
  best = study_groups.chosen(group).arms
  assert sorted(best) == [
    "dpo, finetune.beta=0.1", "rn_dpo, finetune.beta=3", "rn_dpo, finetune.beta=3, judge=oracle",
  ]  # fmt: skip
  rows = study_tables.chosen_pair_table(group).rows
  wanted = ["dpo, finetune.beta=0.1", "rn_dpo, finetune.beta=3", "4 / 4", "1"]
  assert wanted in [row[:4] for row in rows]
  assert study_tables.pair_table(group).rows == []  # all are points of an axis
  assert study_groups.chosen(study_groups.groups(records[3:])[0]).arms == {}
