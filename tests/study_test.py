"""Studies: the grid, what one line keeps, reruns and failures, the bootstrap, the page."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from tiny_config import get_config

from configs import recipes
from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError, FileError
from rndpo_jax.runtime import files, lock, preemption
from rndpo_jax.study import (
  bootstrap,
  cell_records,
  grid,
  study_groups,
  study_loop,
  study_page,
  study_plan,
  study_tables,
)

ROOT = pathlib.Path(__file__).parent.parent
TINY = os.fspath(pathlib.Path(__file__).parent / "tiny_config.py")
PH2 = os.fspath(ROOT / "configs" / "ph2.py")
RN, DPO = "rn_dpo", "dpo"


def study(**changes):
  """Two recipes and two seeds on the tiny phantom."""
  return {
    "data": {"tiny": {"config": TINY, "set": {"data.num_val": 3}}},
    "seeds": (0, 1),
    "set": {"finetune.batch_size": 8, "finetune.num_steps": 8},
    "arms": [{"recipes": (RN, DPO)}],
    **changes,
  }


def expand(content, **options):
  return grid.expand(content, recipes.apply, options.pop("roots", {}), **options)


# The bootstrap.


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
  worse = bootstrap.interval([run(0, 0, [-0.5, -0.5])])
  assert worse.claim == "worse"
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


# Tables of records made by hand.


def record(recipe, draw, seed, sustained, base=(0.5, 0.7), **more):
  axes = more.pop("axes", {})
  test = float(np.mean(sustained))
  return {
    "key": f"{recipe}-{axes}-{draw}-{seed}", "data": "tiny", "budget": 4, "draw": draw,
    "seed": seed, "recipe": recipe, "axes": axes, "tuning": False, "versions": {"jax": "0"},
    "device": "cpu", "seconds": {"mine": 1.0, "finetune": 3.0, "prepare": 1.0, "base": 4.0},
    "steps": 4, "base": {"val": 0.6, "test": float(np.mean(base))},
    "mb": {"base": 1.0, "cell": 2.0}, "curve": {"step": [0, 4], "test": [0.6, test]},
    "test": {"last": test, "last_third_mean": test, "peak": test, "drop": 0.0},
    "judge": {"name": "agreement", "pair_accuracy": 0.65},
    "cases": {"ids": f"draw{draw}", "patient": [0, 1], "base": list(base), "last": list(sustained),
              "sustained": list(sustained)},
    **more,
  }  # fmt: skip


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
  assert pair[:3] == [DPO, RN, "1"] and pair[4] == "worse"
  # Runs that share no cases are not compared.
  other = [record(DPO, 0, 0, (0.4, 0.6), cases={**loser[0]["cases"], "ids": "others"})]
  assert study_groups.difference(winner, other) is None


def test_stability_tells_the_best_and_the_worst_value_of_an_axis():
  levels = {3.0: (0.5, 0.7), 10.0: (0.6, 0.8), 30.0: (0.3, 0.5)}
  records = [record(RN, 0, 0, dice, axes={"finetune.beta": b}) for b, dice in levels.items()]
  (group,) = study_groups.groups(records)
  (row,) = study_tables.stability_table(group).rows
  assert row[:4] == [RN, "finetune.beta", "3", "10"] and row[5] == "30" and row[-1] == "0.300"
  text = study_tables.csv_text(records)
  assert '"rn_dpo, finetune.beta=30",base,sustained,-0.20000,-0.20000,-0.20000,1,worse' in text


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
  assert ["dpo, finetune.beta=0.1", "rn_dpo, finetune.beta=3", "1"] in [row[:3] for row in rows]
  assert study_tables.pair_table(group).rows == []  # all are points of an axis
  assert study_groups.chosen(study_groups.groups(records[3:])[0]).arms == {}


# The grid.


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


# A whole study.


@pytest.fixture(scope="module")
def ran(tiny_run, tmp_path_factory):
  """(cells, work directory, records) of a study in which one cell fails.

  One of the two bases is there before, as after an end of the study.
  """
  arms = [
    {"recipes": (RN,), "seeds": (0,), "axes": {"mine.min_score_gap": (9.0,)}},  # leaves no pair
    {"recipes": (RN,)},
    {"recipes": (DPO,), "seeds": (0,)},
  ]
  cells = expand(study(arms=arms))
  folder = tmp_path_factory.mktemp("study")
  study_loop.check(cells)
  for name in ("base", "data"):
    shutil.copytree(tiny_run[1] / name, folder / "work" / "bases" / cells[0].base_key / name)
  for name in ("config.json", "splits.json"):
    shutil.copy(tiny_run[1] / name, folder / "work" / "bases" / cells[0].base_key / name)
  times = folder / "work" / "bases" / cells[0].base_key / "seconds.json"
  files.write_json(times, {"prepare": 1.0, "base": 2.0})
  failed = study_loop.run(cells, folder / "work", folder / "records", keep=["all"])
  assert [key for key in failed if "gap=9" in key] == failed and len(failed) == 1
  return cells, folder / "work", folder / "records"


def test_records_hold_what_tables_need_and_a_failed_cell_stops_nothing(ran):
  cells, workdir, folder = ran
  found = cell_records.read(folder / "records.jsonl")
  (failure,) = cell_records.read(folder / "failures.jsonl").values()
  assert len(found) == 3 and found.keys() | {failure["key"]} == {cell.key for cell in cells}
  assert "MiningError" in failure["error"] and os.fspath(workdir) not in failure["error"]
  for key, line in found.items():
    results = files.read_json(workdir / "cells" / key / "results.json")
    assert line["config"]["finetune.num_steps"] == 8
    assert line["curve"]["step"] == [0, 4, 8] and line["seconds"].keys() > {"base", "finetune"}
    assert line["base"]["val"] == pytest.approx(results["base"]["val"]["dice"], abs=6e-5)
    assert line["test"]["last"] == pytest.approx(results["finetuned"]["test"]["dice"], abs=6e-5)
    means = {name: np.mean(line["cases"][name]) for name in ("base", "last", "sustained")}
    assert means["base"] == pytest.approx(results["base"]["test"]["dice"], abs=6e-5)
    assert means["last"] == pytest.approx(results["finetuned"]["test"]["dice"], abs=6e-5)
    assert means["sustained"] == pytest.approx(results["sustained"]["last_third_mean"], abs=6e-5)
    assert line["cases"]["patient"] == [0, 1, 2]
  # Cells of a seed have one base.
  assert len(list((workdir / "bases").iterdir())) == 2


def test_a_record_of_tuning_holds_no_test_figure(ran):
  cells, workdir, folder = ran
  cell = cells[1]
  places = workdir / "cells" / cell.key, workdir / "bases" / cell.base_key
  line = cell_records.make(cell._replace(tuning=True), *map(epath.Path, places), {})
  columns = {"step", "val", "val_kl", "kl", "agreement", "dice_to_base", "labelled_dice"}
  assert "cases" not in line and line["curve"].keys() == columns
  assert line["rankseg"].keys() == {"val"}
  del line["config"]
  assert "test" not in json.dumps(line)
  assert line["val"] == cell_records.read(folder / "records.jsonl")[cell.key]["val"]
  assert (
    study_tables.tuning_table(study_groups.groups([line], tuning=True)[0]).rows[0][-1] == "best"
  )


def test_a_rerun_makes_what_is_missing_alone(ran, capsys):
  cells, workdir, folder = ran
  cells = [cell for cell in cells if "gap=9" not in cell.key]
  path = folder / "records.jsonl"
  before = path.read_bytes()
  lines = before.splitlines(keepends=True)
  assert study_loop.run(cells, workdir, folder) == []
  assert "[cell]" not in capsys.readouterr().out and path.read_bytes() == before
  path.write_bytes(b"".join(lines[1:]))
  study_loop.run(cells, workdir, folder)
  out = capsys.readouterr().out
  assert out.count("[cell]") == 1 and "[prepare]" not in out
  old, new = (json.loads(content.splitlines()[0]) for content in (before, path.read_bytes()))
  assert {**old, "time": "", "seconds": "", "mb": ""} == {
    **new,
    "time": "",
    "seconds": "",
    "mb": "",
  }


def test_a_finished_cell_leaves_what_is_asked_for_and_a_stale_one_nothing(tmp_path):
  folder = epath.Path(tmp_path / "cell")
  for name in ("finetune/params/4", "results.json", "pairs/x"):
    files.write_text(folder / name, "")
  study_loop._clean(folder, ["all"])
  study_loop._clean(folder, ["finetune", "results.json"])
  assert sorted(path.name for path in folder.iterdir()) == ["finetune", "results.json"]
  config = get_config()
  files.write_json(folder / "config.json", {"config": json.loads(config.to_json_best_effort())})
  study_loop._drop_stale(config, folder)
  assert folder.exists()
  study_loop._drop_stale(get_config(finetune__beta=3.0), folder)
  assert not folder.exists()
  files.write_text(folder / "results.json", "")
  study_loop._clean(folder, [])
  assert not folder.exists()


def test_a_cell_with_the_config_of_another_takes_its_record(ran, capsys):
  cells, workdir, folder = ran
  arm = {"recipes": (RN,), "seeds": (0,), "axes": {"finetune.beta": (10.0,)}}
  (same,) = expand(study(arms=[arm]))
  assert study_loop.run([same], workdir, folder) == [] and "[cell]" not in capsys.readouterr().out
  found = cell_records.read(folder / "records.jsonl")
  first, second = found[cells[1].key], found[same.key]
  assert second["axes"] == {"finetune.beta": 10.0}
  names = ("key", "axes")
  assert {**first, **{k: second[k] for k in names}} == second and first["axes"] == {}
  assert cell_records.twin(same._replace(tuning=True), found) is None
  assert cell_records.twin(same._replace(data="another"), found) is None


def test_a_cell_that_another_run_holds_is_left_to_it(ran, monkeypatch):
  cells, workdir, folder = ran
  claims = workdir / "claims" / cells[0].key
  (folder / "records.jsonl").rename(folder / "kept.jsonl")

  def wait(_):
    raise preemption.Preempted("waits for the other")

  monkeypatch.setattr(study_loop.time, "sleep", wait)
  # Another live process: one of this host that is not this.
  other = subprocess.Popen([sys.executable, "-c", HOLD, os.fspath(claims)], stdout=subprocess.PIPE)
  try:
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(preemption.Preempted, match="waits"):
      study_loop.run(cells[:1], workdir, folder)
    assert not (folder / "records.jsonl").exists()
  finally:
    other.kill()
    other.wait()
    other.stdout.close()
    (folder / "kept.jsonl").rename(folder / "records.jsonl")
  with lock.hold(claims):  # the dead one is found out
    pass


HOLD = """
import sys, time
from rndpo_jax.runtime import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_the_page_is_made_from_the_records_alone(ran):
  cells, _, folder = ran
  study_page.write(folder, "tiny", cells)
  page, text = ((folder / f"study.{kind}").read_text() for kind in ("html", "md"))
  assert "Recipes: tiny, 4 labelled" in text and "Differences: tiny" in text
  assert "3 of 4 cells have a record" in text and "Failed: tiny-n4-d0-s0-rn_dpo" in text
  assert page.count("data:image/svg+xml") == 3 and "http:" not in page
  assert (folder / "study.csv").read_text().count("\n") == 6  # head, 2 x 2 gains, 1 difference
  with pytest.raises(FileError, match="none of a cell of this study"):
    study_page.write(folder, "tiny", expand(study(set={"finetune.num_steps": 6})))


def test_the_plan_counts_what_is_left(ran):
  cells, workdir, folder = ran
  more = expand(study(arms=[{"recipes": (RN, DPO), "seeds": (0, 1, 2)}]))
  lines = study_plan.describe(cells + [more[3], more[4]], workdir, folder)
  assert lines[0] == "cells: 6, with a record 3, left 3 (1 failed and are tried again)"
  assert lines[1] == "bases: 3, to make 1"
  assert "3 cells by records of the same recipe" in lines[2]
  own = [record(RN, 0, 0, (0.6, 0.8))]
  cell = more[0]._replace(data="tiny")
  assert study_plan.cell_seconds(cell, own) == (4.0, "records of the same recipe")
  assert study_plan.cell_seconds(more[1], own) == (8.0, "steps of other recipes")
  assert study_plan.base_seconds(cell, own) == 5.0
  assert study_plan.cell_seconds(cell, []) == (2.4, "a default of 90 s for 300 steps")


def test_the_studies_of_this_folder_can_be_expanded():
  for path in sorted((ROOT / "configs" / "studies").glob("[!_]*.py")):
    content = grid.load_file(path, "get_study")()
    cells = grid.expand(content, lambda config, name: None, {})
    assert cells and all(cell.config.finetune.num_steps for cell in cells), path


def test_changed_keys_hold_no_path_of_this_machine():
  config = get_config(data__source="folder", data__root="/home/somebody", base__workdir="/there")
  cell = expand(study())[0]._replace(config=config)
  assert "/" not in json.dumps(grid.changed(cell))
  assert config_lib.base_config().finetune.beta == 10.0  # the default that no line repeats


def test_the_program_says_what_is_left_and_names_a_cell_that_cannot_run(tmp_path):
  path = tmp_path / "ph2_study.py"
  content = {"data": {"ph2": {"config": PH2}}, "arms": [{"recipes": (RN,)}]}
  path.write_text(f"def get_study():\n  return {content!r}\n")
  done = [
    subprocess.run(
      [sys.executable, "-m", "launch.study", f"--study={study_file}", "--dry_run",
       f"--records={tmp_path / 'records'}"],
      cwd=ROOT, capture_output=True, text=True, timeout=120,
    )
    for study_file in ("configs/studies/quick.py", path)
  ]  # fmt: skip
  assert done[0].returncode == 0 and "cells: 4, with a record 0, left 4" in done[0].stdout
  assert done[1].returncode == 1 and done[1].stderr.startswith("error: cell ph2-n10-d0-s0-rn_dpo-")
  assert "Traceback" not in done[1].stderr and not (tmp_path / "records").exists()


def test_cells_share_their_first_phase(tiny_run, tmp_path):
  """A job of one phase, and the same as the first of two: trained once."""
  first = {
    "finetune.num_steps": 2, "finetune.eval_every_steps": 1, "finetune.ema_decay": 0.5,
    "finetune.batch_size": 16,
    "finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0,
  }  # fmt: skip
  second = {"finetune.terms.preference.weight": 1.0, "finetune.terms.labelled.weight": 0.0}
  two = {**first, "phases": ({}, second)}
  points = {"two": two, "one": first}
  arms = [{"recipes": ("",), "axes": {"phase": points}, "seeds": (0,)}]
  cells = expand(study(arms=arms, set={}))
  assert len({grid.phase_key(cell, 1) for cell in cells}) == 1
  base = tmp_path / "work" / "bases" / cells[0].base_key
  for name in ("data", "base"):
    shutil.copytree(tiny_run[1] / name, base / name)
  for name in ("splits.json", "config.json"):
    shutil.copy(tiny_run[1] / name, base)
  files.write_json(epath.Path(base) / "seconds.json", {"base": 1.0})
  assert study_loop.run(cells, tmp_path / "work", tmp_path / "records", ["all"]) == []
  kept = list((base / "phases").iterdir())
  assert [path.name for path in kept] == [grid.phase_key(cells[0], 1)]
  made = [tmp_path / "work" / "cells" / cell.key for cell in cells]
  trained = (kept[0] / "finetune" / "metrics.jsonl").read_text()
  assert (made[1] / "finetune" / "metrics.jsonl").read_text() == trained
  found = cell_records.read(epath.Path(tmp_path) / "records" / cell_records.FILE)
  steps = [found[cell.key]["curve"]["step"] for cell in cells]
  assert steps == [[0, 1, 2, 3, 4], [0, 1, 2]]
