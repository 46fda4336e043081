"""The launchers: what they install and run, and that shellcheck finds nothing."""

import os
import shutil
import subprocess

import pytest
from launchers import LAUNCH, SCRIPTS, dry_run, fake


def test_quickstart_passes_its_arguments_to_the_program(tmp_path):
  (tmp_path / "launch").mkdir()
  for name in ("quickstart.sh", "setup.sh"):
    shutil.copy(LAUNCH / name, tmp_path / "launch")
  (tmp_path / "setup.cfg").touch()
  fake(tmp_path / ".venv" / "bin", "python", 'echo "$*"')  # runs pip and the program
  (tmp_path / ".venv" / "bin" / "activate").write_text("PATH=$PWD/.venv/bin:$PATH\n")
  for extra, editable in (("", ".[run]"), ("cuda12", ".[run,cuda12]")):
    done = subprocess.run(
      ["bash", tmp_path / "launch" / "quickstart.sh", "--config.seed=1"],
      env={**os.environ, "PYTHON": "true", "VENV": ".venv", "WORKDIR": "w", "EXTRA": extra},
      capture_output=True,
      text=True,
    )
    installed, ran = done.stdout.splitlines()
    assert installed.endswith(f" --editable {editable}"), done
    assert ran == "-m launch.run --config=configs/quickstart.py --workdir=w --config.seed=1"


def test_failed_install_is_tried_again(tmp_path):
  (tmp_path / "setup.cfg").touch()
  fake(tmp_path / ".venv" / "bin", "python", "exit 3")
  (tmp_path / ".venv" / "bin" / "activate").touch()
  for _ in range(2):  # as in an interactive shell, which goes on after an error and must not end
    done = subprocess.run(
      ["bash", "-c", f"source {LAUNCH / 'setup.sh'} cuda12; echo $?"],
      cwd=tmp_path,
      env={**os.environ, "PYTHON": "true", "VENV": ".venv"},
      capture_output=True,
      text=True,
    )
    assert done.stdout == "3\n"


@pytest.mark.parametrize(
  "script,variables,processes",
  [
    ("quickstart.sh", {}, 1),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "2"}, 2),
    ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "."}, 2),  # one of them loads JAX on every node
  ],
)
def test_dry_run_prints_commands_that_run(tmp_path, script, variables, processes):
  flags = ["--config.data.root=a b", "--config.data.case_pattern=(case\\d+)_z\\d+$"]
  variables = {"EXTRA": "tpu gcs", "WORKDIR": "/my runs/a", **variables}
  _, output, _ = dry_run(script, *flags, **variables)
  fake(tmp_path, "python", """printf '%s\\n' "$@" >$$.call""")
  fake(tmp_path, "srun", 'until [ "$1" = python ]; do shift || exit; done; exec "$@"')
  fake(tmp_path / "launch", "setup.sh", 'echo "$1" >installed; PATH=$PWD:$PATH')
  subprocess.run(["bash"], input=output, cwd=tmp_path, text=True, check=True)
  assert (tmp_path / "installed").read_text() == "tpu gcs\n"
  calls = [path.read_text().splitlines() for path in tmp_path.glob("*.call")]
  assert len(calls) == processes
  runs = [call for call in calls if "launch.run" in call]
  assert len(runs) == processes - (script == "slurm.sbatch")
  assert all({"--workdir=/my runs/a", *flags} <= set(call) for call in runs), calls


@pytest.mark.parametrize(
  "script,variables",
  [
    ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "."}),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "2"}),
    ("tpu_vm.sh", {"NAME": "slice", "ZONE": "zone"}),
  ],
)
def test_launchers_run_the_program_that_is_named(script, variables):
  code, output, error = dry_run(script, "--betas=3,10", PROGRAM="launch.sweep", **variables)
  assert code == 0 and "error" not in error  # of tpu_vm.sh perhaps the warning about this checkout
  assert "launch.run" not in output and "--betas" in output
  found = output.replace("\\", "").count("-m launch.sweep --")
  assert found == int(variables.get("PROCESSES", 1))
  if script == "tpu_vm.sh":
    assert "slice:/runs/a/sweep/sweep.json" in output and "results.json" not in output


@pytest.mark.parametrize("script", ["multi_gpu.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_missing_variable_is_named(script):
  code, _, error = dry_run(script, CONFIG="")
  assert code != 0 and ("CONFIG" in error or "NAME" in error)


@pytest.mark.parametrize("name", [*SCRIPTS, "gke_jobset.yaml"])
def test_launchers_are_short_and_clean(name):
  text = (LAUNCH / name).read_text()
  assert len(text.splitlines()) <= 60
  if name in SCRIPTS and shutil.which("shellcheck"):
    done = subprocess.run(
      ["shellcheck", "-x", f"launch/{name}"], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
