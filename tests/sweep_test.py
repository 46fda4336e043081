"""The sweep: members are jobs of the stage finetune, validation selects, a killed one goes on."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import files, preemption
from rndpo_jax.sweep import sweep, sweep_results
from rndpo_jax.training import metric_writer

ROOT = pathlib.Path(__file__).parent.parent
GRID = {"betas": [10.0, 30.0], "learning_rates": [1e-3, 3e38], "seeds": [0, 1]}


@pytest.fixture(scope="module")
def swept(tiny_run, tmp_path_factory):
  """(config, work directory) of a copy of the tiny run with a sweep of eight members."""
  config, first = tiny_run
  workdir = tmp_path_factory.mktemp("sweep") / "run"
  shutil.copytree(first, workdir)
  sweep.run(config, workdir, **GRID)
  return config, workdir


def member(content, **which):
  (found,) = [m for m in content["members"] if all(m[k] == v for k, v in which.items())]
  return found


def test_the_member_of_the_config_is_what_the_stage_made(swept):
  config, workdir = swept
  content = files.read_json(workdir / "sweep" / "sweep.json")
  own = member(content, seed=config.seed, beta=config.finetune.beta, learning_rate=1e-3)
  stage = metric_writer.read_rows(workdir / "finetune", "val")
  assert [row["step"] for row in own["curve"]] == [row["step"] for row in stage] == [4, 8]
  found = [row["val_dice"] for row in own["curve"]]
  np.testing.assert_allclose(found, [row["val_dice"] for row in stage], atol=2e-3)
  folder = sweep_results.member_directory(
    workdir / "sweep", config.seed, config.finetune.beta, 1e-3
  )
  mine, theirs = (metric_writer.read_rows(d, "train") for d in (folder, workdir / "finetune"))
  assert [row["step"] for row in mine] == list(range(1, 9)) and set(mine[0]) == set(theirs[0])
  losses = [[row["loss"] for row in rows] for rows in (mine, theirs)]
  np.testing.assert_allclose(*losses, rtol=1e-3)
  # Other seeds and betas go other ways.
  others = [member(content, seed=s, beta=b, learning_rate=1e-3) for s, b in ((0, 30.0), (1, 10.0))]
  assert all(other["curve"] != own["curve"] for other in others)


def test_what_diverged_is_told_and_never_chosen(swept, capsys):
  config, workdir = swept
  content = sweep.run(config, workdir, **GRID)
  assert "[sweep] done before" in capsys.readouterr().out
  lost = [m for m in content["members"] if m["learning_rate"] > 1]
  assert len(lost) == 4 and all(m["diverged"] == 2 and m["last"] is None for m in lost)
  assert all(m["curve"] == [] for m in lost)
  kept = [m for m in content["members"] if m["learning_rate"] < 1]
  assert all(m["diverged"] is None and m["last"] == m["curve"][-1]["val_dice"] for m in kept)
  table = sweep_results.summary(content)
  assert table.count("diverged") == 6 and "test split was not touched" in table
  assert content["num_devices"] == 8 and content["form"] == "map"
  assert not list((workdir / "sweep" / "state").iterdir())


def test_a_sweep_of_another_base_is_refused(swept, tmp_path):
  config, first = swept
  workdir = tmp_path / "run"
  shutil.copytree(first, workdir)
  path = workdir / "sweep" / "sweep.json"
  content = files.read_json(path)
  # That of the stage, which stands beside it.
  assert (
    content["fingerprints"] == files.read_json(workdir / "finetune" / "done.json")["fingerprints"]
  )
  files.write_json(path, {**content, "fingerprints": {"base": "0123456789abcdef"}})
  with pytest.raises(errors.ProvenanceError, match="not made from this data: SHA-256 None"):
    sweep.run(config, workdir, **GRID)


def test_the_best_is_that_of_the_mean_over_seeds_at_the_last_step(tmp_path):
  grid = {"betas": [1.0, 2.0, 3.0], "learning_rates": [0.1], "seeds": [0, 1]}
  curves = {  # beta -> (first, last) of each seed
    1.0: [(0.9, 0.70), (0.9, 0.70)],  # best before the end
    2.0: [(0.5, 0.68), (0.5, 0.74)],
    3.0: [(0.5, 0.99), (0.5, None)],  # one diverged
  }
  for beta, seeds in curves.items():
    for seed, dice in enumerate(seeds):
      rows = metric_writer.MetricWriter(folder := sweep_folder(tmp_path, seed, beta))
      rows.resume(0)
      for step, value in zip((4, 8), dice, strict=True):
        if value is not None:
          rows.add({"step": step, "kind": "val", "val_dice": value})
      rows.close()
      assert (folder / "metrics.jsonl").exists()
  content = sweep_results.results(grid, tmp_path, np.array([[0, 0, 0], [0, 0, 6]]), [4, 8])
  assert [row["last"] for row in content["settings"]] == [0.70, pytest.approx(0.71), None]
  assert content["best"]["beta"] == 2.0 and content["settings"][2]["num_diverged"] == 1
  assert content["members"][5]["diverged"] == 6 and content["members"][5]["curve"][0]["step"] == 4
  with pytest.raises(errors.FileError, match=r"beta-3_.* \[4\], expected \[4, 8\]; bring it back"):
    sweep_results.results(grid, tmp_path, np.zeros((2, 3), int), [4, 8])
  every = sweep_results.results(grid, tmp_path, np.full((2, 3), 5), [4, 8])
  assert every["best"] is None and "<- best" not in sweep_results.summary({**every, "base": 0.5})


def sweep_folder(directory, seed, beta):
  folder = sweep_results.member_directory(directory, seed, beta, 0.1)
  folder.mkdir(parents=True)
  return folder


def test_a_stopped_sweep_goes_on_to_the_same_result(swept, tmp_path, monkeypatch):
  config, first = swept
  workdir = tmp_path / "run"
  shutil.copytree(first, workdir)
  shutil.rmtree(workdir / "sweep")
  for number in (3, 6):
    monkeypatch.setattr(preemption, "reached", lambda step, number=number: step == number)
    with pytest.raises(preemption.Preempted, match=f"sweep: saved at step {number}"):
      sweep.run(config, workdir, **GRID)
    assert not (workdir / "sweep" / "sweep.json").exists()
  with pytest.raises(ConfigError, match=r"holds another sweep.*'seeds': \[0, 1\].*Delete"):
    sweep.run(config, workdir, **{**GRID, "seeds": [0, 2]})
  monkeypatch.setattr(preemption, "reached", lambda step: False)
  sweep.run(config, workdir, **GRID)
  assert tree(workdir / "sweep") == tree(first / "sweep")


def tree(directory):
  """Name -> bytes of the files that do not tell the time."""
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in directory.rglob("*")
    if path.is_file() and "tensorboard" not in path.parts
  }


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"betas": []}, "--betas: found"),
    ({"betas": [1.0, 1.0]}, "--betas: found"),
    ({"learning_rates": [0.1, 0.0]}, "--learning_rates: found 0.0, expected finite"),
    ({"learning_rates": [float("inf")]}, "--learning_rates: found inf"),
    ({"betas": [float("nan")]}, "--betas: found nan"),
    ({"seeds": [2, 2]}, "--seeds: found"),
    ({"seeds": [-1]}, "--seeds: found -1, expected 0 or more"),
  ],
)
def test_grids_that_cannot_be_are_refused(tiny_config, changes, message):
  with pytest.raises(ConfigError, match=message):
    sweep.check(tiny_config(), {**GRID, **changes})


def test_micro_batches_that_do_not_divide_are_refused(tiny_config):
  """A member's batch is on one device, so that 8 images in 4 parts will do on eight devices."""
  sweep.check(tiny_config(finetune__accumulate_steps=4), GRID)
  with pytest.raises(ConfigError, match="accumulate_steps: found 3, but batch_size=8"):
    sweep.check(tiny_config(finetune__accumulate_steps=3), GRID)
  phases = ({}, {"finetune.accumulate_steps": 3})  # of which the last one is swept
  with pytest.raises(ConfigError, match="accumulate_steps: found 3, but batch_size=8"):
    sweep.check(tiny_config(phases=phases), GRID)


def test_processes_with_other_grids_are_refused(tmp_path, monkeypatch):
  sweep._claim(tmp_path, GRID)
  monkeypatch.setattr(sweep.multihost, "is_first", lambda: False)
  sweep._claim(tmp_path, GRID)
  with pytest.raises(ConfigError, match="holds another sweep"):
    sweep._claim(tmp_path, {**GRID, "seeds": [5]})


def launch(workdir, *arguments):
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.sweep", "--config=tests/tiny_config.py",
      f"--workdir={workdir}", *arguments,
    ],
    cwd=ROOT, env=dict(os.environ), capture_output=True, text=True,
  )  # fmt: skip
  return done.returncode, done.stdout + done.stderr


def test_program_prints_the_table_and_the_command_of_the_best(swept):
  workdir = swept[1]
  code, output = launch(
    workdir, "--betas=10,30", "--learning_rates=1e-3,3e38", "--seeds=0,1",
    "--config.finetune.num_steps=8",
  )  # fmt: skip
  assert code == 0, output
  best = json.loads((workdir / "sweep" / "sweep.json").read_text())["best"]
  line = output.strip().splitlines()[-1].split()
  assert line[:4] == ["python", "-m", "launch.run", "--config=tests/tiny_config.py"]
  assert set(line[4:]) == {
    f"--workdir={workdir}-best", f"--config.base.workdir={workdir}",
    "--config.finetune.num_steps=8", f"--config.finetune.beta={best['beta']}",
    f"--config.finetune.learning_rate={best['learning_rate']}",
  }  # fmt: skip
  code, output = launch(workdir, "--betas=strong")
  assert code == 1 and "error: --betas: found 'strong', expected numbers" in output


def test_of_several_phases_the_last_one_was_swept(tiny_config):
  best = {"beta": 3.0, "learning_rate": 0.1}
  own = {"finetune.beta": 3.0, "finetune.learning_rate": 0.1}
  given = {"finetune.beta": 7.0, "finetune.learning_rate": 0.2, "seed": 4}
  assert sweep_results.overrides(tiny_config(), given, best) == {**own, "seed": 4}
  last = {"finetune.beta": 2.0, "finetune.num_steps": 3}
  found = sweep_results.overrides(tiny_config(phases=({}, last)), given, best)
  assert found == {**given, "phases": ({}, {**own, "finetune.num_steps": 3})}
  # The beta of the command was that of the last phase alone, where the first one reads no pairs.
  first = {"finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0}
  found = sweep_results.overrides(tiny_config(phases=(first, {})), given, best)
  assert found == {"finetune.learning_rate": 0.2, "seed": 4, "phases": (first, own)}
