"""Grids of studies: what a cell is, and which cannot run."""

import json

import pytest
from study_cells import DPO, PH2, RN, ROOT, TINY, expand, record, study
from tiny_config import get_config

from configs import recipes
from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.study import (
  grid,
  study_loop,
  study_plan,
)


def test_a_cell_is_what_its_arm_says_and_shares_its_base():
  arm = {
    "recipes": (RN,), "seeds": (3,),
    "axes": {"finetune.beta": (3.0, 30.0), "judge": {"o": {"judge.name": "oracle"}}},
  }  # fmt: skip
  arms = [arm, {"recipes": (DPO,), "seeds": (3, 4)}, arm]
  cells = expand(study(arms=arms, data={"tiny": {"config": TINY, "set": {"data.num_val": 5}}}))
  assert len(cells) == len({cell.key for cell in cells}) == 4
  first = next(cell for cell in cells if cell.axes == {"finetune.beta": 3.0, "judge": "o"})
  assert (first.config.finetune.beta, first.config.judge.name, first.config.seed) == (
    3,
    "oracle",
    3,
  )
  assert first.key.startswith("tiny-n4-d0-s3-rn_dpo-finetune.beta=3-judge=o-")
  assert first.config.finetune.batch_size == 8 and first.config.data.num_val == 5
  assert len({cell.base_key for cell in cells}) == 2  # of the two seeds
  assert [cell.key for cell in expand(study(), only="s1-dpo")] == [expand(study())[3].key]
  # What makes a base another one: the model, not the recipe, nor the folder of the files.
  wider = expand(study(set={"model.width": 4}))[0]
  assert wider.base_key != expand(study())[0].base_key
  assert expand(study(), roots={"tiny": "/elsewhere"})[0].key == expand(study())[0].key


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (study(arms=[{"recipes": (RN,), "axes": {"finetune.beta": (-1.0,)}}]), "finetune.beta=-1"),
    (study(arms=[{"recipes": (RN,), "set": {"finetune.bata": 1.0}}]), "rn_dpo: .*finetune.bata"),
    (study(arms=[{"recipes": ("no_such",)}]), "no_such: .*unknown recipe"),
    (study(set={"data.num_test": 99}), "tiny-n4-d0-s0-rn_dpo.*num_test=99"),
    (
      study(arms=[{"recipes": (RN,), "axes": {"data.phantom.num_cases": (30, 9)}}]),
      "num_cases=9-.*found 9 of 9",
    ),
    (study(set={"data.num_test": 0}), "num_test: there are no test cases, and a study is judged"),
    (study(data={"tiny": {"config": TINY, "set": {"data.num_val": 0}}}), "num_val: there are no"),
    (study(arms=[{"recipe": (RN,)}]), "unknown key 'recipe'"),
    (study(arms=[{"recipes": RN}]), "expected sequence"),
    (study(data={"tiny": {"config": "no_such.py"}}), "no_such.py: no such file"),
    (study(data={"ph2": {"config": PH2}}, set={}), "rn_dpo.*--roots: the data set 'ph2'"),
  ],
)
def test_a_grid_with_a_cell_that_cannot_run_is_refused_by_name(content, message):
  with pytest.raises(ConfigError, match=message):
    study_loop.check(expand(content))


def test_the_studies_of_this_folder_have_the_cells_of_their_records():
  for path in sorted((ROOT / "configs" / "studies").glob("[!_]*.py")):
    content = grid.load_file(path, "get_study")()
    keys = {cell.key for cell in grid.expand(content, recipes.apply, {})}
    records = ROOT / "configs" / "results" / path.stem / "records.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    assert {json.loads(line)["key"] for line in lines} <= keys, path


def test_a_phase_hangs_on_what_made_those_before_it():
  # The second phase reads no pairs, and so no judge; the first one does.
  learned = {"finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0}
  judges = {name: {"judge.name": name} for name in ("entropy", "confidence")}
  arm = {"recipes": ("",), "seeds": (0,), "axes": {"judge": judges}}
  cells = expand(study(arms=[{**arm, "set": {"phases": ({}, learned, {})}}]))
  for number in (1, 2):
    assert len({grid.phase_key(cell, number) for cell in cells}) == 2
  cells = expand(study(arms=[{**arm, "set": {"phases": (learned, learned, {})}}]))
  for number in (1, 2):
    assert len({grid.phase_key(cell, number) for cell in cells}) == 1


def test_gates_that_refuse_are_told_apart_and_those_that_only_say_are_not():
  def cells(action, bounds=(0.0, 0.9)):
    arm = {"recipes": ("",), "seeds": (0,), "axes": {"judge.gate.min_accuracy": bounds}}
    phases = {"judge.gate.action": action, "phases": ({}, {})}
    return expand(study(arms=[{**arm, "set": phases}]))

  def told(*found):
    digests = {cell.key.rpartition("-")[2] for cell in found}
    return [len(digests), len({str(grid.changed(cell)) for cell in found})] + [
      len({grid.phase_key(cell, 1) for cell in found})
    ]

  assert told(*cells("refuse")) == [2, 2, 2]
  assert told(*cells("warn"), *cells("off")) == [1, 1, 1]
  assert told(*cells("refuse", (0.5,)), *cells("warn", (0.5,))) == [2, 2, 2]


def test_an_estimate_counts_the_steps_of_every_phase():
  two = {"finetune.num_steps": 8, "phases": ({}, {"finetune.num_steps": 4})}
  (cell,) = expand(study(arms=[{"recipes": ("",), "seeds": (0,), "set": two}]))
  # Four seconds of mining and fine-tuning for four steps.
  known = [record(RN, 0, 0, (0.5, 0.5))]
  assert study_plan.cell_seconds(cell, known) == (12.0, "steps of other recipes")
  assert study_plan.cell_seconds(cell, [])[0] == 90 * 12 / 300


def test_changed_keys_hold_no_path_of_this_machine():
  config = get_config(data__source="folder", data__root="/home/somebody", base__workdir="/there")
  cell = expand(study())[0]._replace(config=config)
  assert "/" not in json.dumps(grid.changed(cell))
  assert config_lib.base_config().finetune.beta == 10.0  # the default that no line repeats


def test_arms_that_differ_in_what_no_table_shows_are_refused():
  arms = [{"recipes": (RN,)}, {"recipes": (RN,), "set": {"finetune.num_steps": 9}}]
  with pytest.raises(ConfigError, match="differ in 'set' alone.* give what differs as an axis"):
    expand(study(arms=arms))
  arms[1] = {"recipes": (RN,), "axes": {"finetune.num_steps": (9,)}}
  assert len(expand(study(arms=arms))) == 4
