"""Phases whose judge is refused are left out; what an error says to delete is made again."""

import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from phases_test import FIRST, read_phase
from tiny_config import get_config

from rndpo_jax import config as config_lib
from rndpo_jax import pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.errors import CheckpointError, MiningError, ProvenanceError
from rndpo_jax.report import summary
from rndpo_jax.runtime import files
from rndpo_jax.sweep import sweep
from rndpo_jax.training import checkpoint


class Job(NamedTuple):
  config: object
  workdir: epath.Path
  results: dict


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
  """A job of three phases, of which the gate has left out the second and the third."""
  config = get_config(
    base__workdir=str(tiny_run[1]),
    finetune__num_steps=4,
    finetune__eval_every_steps=2,
    judge__gate__action="refuse",
    judge__gate__min_accuracy=1.0,
  )
  config.phases = (FIRST, {}, {"finetune.num_steps": 5})
  workdir = epath.Path(tmp_path_factory.mktemp("left_out") / "run")
  pipeline.run(config, workdir)
  return Job(config, workdir, files.read_json(workdir / "results.json"))


@pytest.fixture
def job(finished, tmp_path):
  """A copy of it, to be changed."""
  workdir = epath.Path(shutil.copytree(finished.workdir, tmp_path / "run"))
  return Job(finished.config.copy_and_resolve_references(), workdir, finished.results)


def test_what_the_first_phase_has_made_is_evaluated_delivered_and_reported(finished):
  config, workdir, results = finished
  for place in (workdir / "phase-2", workdir):
    assert files.read_json(place / "finetune" / "done.json")["step"] == 0
    assert not (place / "finetune" / "params").exists()
    assert files.read_json(place / "pairs" / "manifest.json")["num_pairs"] == 0
  assert [point["step"] for point in results["curve"]] == [0, 2, 3]
  assert results["finetuned"]["step"] == 3 and results["delivered"]["step"] in (0, 2, 3)
  assert results["terms"] == [["labelled", "weak_to_strong"]]
  assert [entry["phase"] for entry in results["left_out"]] == [2, 3]
  for number, text in zip((2, 3), results["warnings"][:2], strict=True):
    assert text.startswith(f"Phase {number} was left out: the judge 'agreement' has")
  assert "was left out" in summary.text(workdir)
  page = (workdir / "report.html").read_text()
  assert "labelled + weak_to_strong" in page and "Phase 3 was left out" in page
  assert "The loss: labelled + weak_to_strong" in page  # the curves of what was trained
  assert "There are no pairs." in page and "Histogram of region sizes" not in page
  dataset = dataset_lib.open_dataset(config, workdir)
  first = workdir / "phase-1" / "finetune"
  last = checkpoint.restore_params(first / "params", 3, stage_directory=first)
  for number in (2, 3):
    found = read_phase(config, workdir, number, dataset)
    jax.tree.map(np.testing.assert_array_equal, found, last)
  with pytest.raises(MiningError, match="there are no pairs to train on; the judge 'agreement'"):
    sweep.run(config, workdir, betas=(1.0,), learning_rates=(1e-3,), seeds=(0,))


def test_a_first_phase_whose_judge_is_refused_ends_the_job(finished, tmp_path):
  config = finished.config.copy_and_resolve_references()
  config.phases = ({}, FIRST)
  with pytest.raises(MiningError, match=r"in a new --workdir"):
    pipeline.run(config, tmp_path / "other", ("base", "mine"))


def test_what_is_lost_is_made_again_to_the_same_results(job, capsys):
  (job.workdir / "finetune" / "done.json").unlink()
  (job.workdir / "results.json").unlink()
  pipeline.run(job.config, job.workdir, ("finetune", "evaluate"))
  assert files.read_json(job.workdir / "results.json") == job.results
  # A damaged checkpoint of an earlier phase; its error says what to delete.
  first = job.workdir / "phase-1" / "finetune"
  (first / "params" / "3" / "sha256.json").unlink()
  (job.workdir / "results.json").unlink()
  with pytest.raises(CheckpointError, match=r"[Dd]elete the folder .*phase-1/finetune"):
    pipeline.run(job.config, job.workdir)
  first.rmtree()
  capsys.readouterr()
  pipeline.run(job.config, job.workdir)
  assert "[phase 1 of 3] labelled, weak_to_strong" in capsys.readouterr().out
  assert files.read_json(job.workdir / "results.json") == job.results


def test_a_gate_that_would_let_a_left_out_phase_pass_says_what_to_delete(job):
  config, workdir, _ = job
  config.judge.gate.action = "warn"
  for stages in (config_lib.STAGES, ("finetune", "evaluate")):
    with pytest.raises(ProvenanceError, match="gate lets .* pass now; delete") as error:
      pipeline.run(config, workdir, stages)
  for place in (workdir / "phase-2", workdir):
    for name in ("pairs", "finetune"):
      assert f"{place / name}" in str(error.value)
      (place / name).rmtree()
  pipeline.run(config, workdir)
  results = files.read_json(workdir / "results.json")
  assert results["left_out"] == []
  assert [point["step"] for point in results["curve"]] == [0, 2, 3, 5, 7, 9, 11, 12]
