"""A whole study: what one line keeps, reruns and failures, the page."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from study_cells import DPO, PH2, RN, ROOT, expand, record, study
from tiny_config import get_config

from rndpo_jax.errors import ConfigError, FileError
from rndpo_jax.runtime import files, lock, preemption
from rndpo_jax.study import (
  cell_records,
  grid,
  study_groups,
  study_loop,
  study_page,
  study_plan,
  study_tables,
)


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
    points = results["label_free"]["checkpoints"]
    assert line["curve"]["kl"] == [round(point["kl"], 6) for point in points]
    means = {name: np.mean(line["cases"][name]) for name in ("base", "last", "sustained")}
    assert means["base"] == pytest.approx(results["base"]["test"]["dice"], abs=6e-5)
    assert means["last"] == pytest.approx(results["finetuned"]["test"]["dice"], abs=6e-5)
    assert means["sustained"] == pytest.approx(results["sustained"]["last_third_mean"], abs=6e-5)
    assert line["cases"]["patient"] == [0, 1, 2]
  # Cells of a seed have one base.
  assert len(list((workdir / "bases").iterdir())) == 2


def test_a_record_of_tuning_holds_no_test_figure(ran, tmp_path):
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
  assert "left_out" not in line
  folder = epath.Path(shutil.copytree(places[0], tmp_path / "cell"))
  results = files.read_json(folder / "results.json")
  files.write_json(folder / "results.json", {**results, "left_out": [{"phase": 2, "reason": "a"}]})
  assert cell_records.make(cell, folder, epath.Path(places[1]), {})["left_out"] == [2]


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
  # Head, 2 x 2 gains, 2 differences.
  assert (folder / "study.csv").read_text().count("\n") == 7
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
  assert study_plan.cell_seconds(cell, own) == (8.0, "records of the same recipe")
  assert study_plan.cell_seconds(more[1], own) == (8.0, "steps of other recipes")
  assert study_plan.base_seconds(cell, own) == 5.0
  assert study_plan.cell_seconds(cell, []) == (2.4, "a default of 90 s for 300 steps")


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


def test_a_copy_that_was_killed_is_made_again(tmp_path, monkeypatch):
  source, target = epath.Path(tmp_path) / "kept", epath.Path(tmp_path) / "cell" / "finetune"
  for name in ("done.json", "params"):
    files.write_text(source / name, name)

  def killed(path, other):
    files.write_text(epath.Path(other) / "done.json", "done.json")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
      study_loop._copy_once(source, target)
  study_loop._copy_once(source, target)
  assert sorted(path.name for path in target.iterdir()) == ["done.json", "params"]
  assert [path.name for path in target.parent.iterdir()] == ["finetune"]


def test_of_two_processes_that_copy_at_once_one_copy_stays(tmp_path, monkeypatch):
  source, target = epath.Path(tmp_path) / "kept", epath.Path(tmp_path) / "phases" / "key"
  files.write_text(source / "done.json", "mine")
  copytree = shutil.copytree

  def while_another_ends(path, other):
    copytree(path, other)
    files.write_text(target / "done.json", "its")

  monkeypatch.setattr(shutil, "copytree", while_another_ends)
  study_loop._copy_once(source, target)
  assert (target / "done.json").read_text() == "its"
  assert [path.name for path in target.parent.iterdir()] == ["key"]


def test_cells_share_their_first_phase(tiny_run, tmp_path, monkeypatch):
  """A job of one phase, and the same as the first of two: trained once, also after a cut."""
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
  timed = study_loop._timed

  def cut_off(config, folder, stages):
    if "finetune" in stages:
      raise ConfigError("cut off in the last phase")
    return timed(config, folder, stages)

  with monkeypatch.context() as patch:
    patch.setattr(study_loop, "_timed", cut_off)
    assert study_loop.run(cells[:1], tmp_path / "work", tmp_path / "records", ["all"])
  (phase,) = (base / "phases").iterdir()
  assert (phase / "finetune" / "done.json").exists()
  assert study_loop.run(cells, tmp_path / "work", tmp_path / "records", ["all"]) == []
  kept = list((base / "phases").iterdir())
  assert [path.name for path in kept] == [grid.phase_key(cells[0], 1)]
  made = [tmp_path / "work" / "cells" / cell.key for cell in cells]
  trained = (kept[0] / "finetune" / "metrics.jsonl").read_text()
  assert (made[1] / "finetune" / "metrics.jsonl").read_text() == trained
  found = cell_records.read(epath.Path(tmp_path) / "records" / cell_records.FILE)
  steps = [found[cell.key]["curve"]["step"] for cell in cells]
  assert steps == [[0, 1, 2, 3, 4], [0, 1, 2]]
