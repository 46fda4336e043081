"""launch/slurm.sbatch: what it runs, and when it asks to be queued again."""

import os
import re
import shlex
import subprocess

import pytest
from launchers import LAUNCH, dry_run, fake


def test_one_task_per_gpu_with_time_to_save():
  code, output, _ = dry_run("slurm.sbatch", "--config.seed=1", SLURM_SUBMIT_DIR=".")
  setup, load, run, after = output.splitlines()
  assert code == 0 and setup == "source launch/setup.sh cuda12"
  assert shlex.split(load) == [
    "srun", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0",
    "python", "-c", "import jax, rndpo_jax.pipeline; jax.devices()",
  ]  # fmt: skip
  assert run == (
    "srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=120 python -m launch.run --distributed "
    "--connect_seconds=60 --config=configs/ph2.py --workdir=/runs/a --config.seed=1 "
  )
  assert after.startswith("# after exit code 75") and "scontrol requeue" in after
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert re.search(r"^#SBATCH --cpus-per-task=8$", text, re.M)
  assert re.search(r"^#SBATCH --nodes=2$", text, re.M)
  given = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_NUM_NODES": "5", "CONNECT_SECONDS": "7"}
  _, load, run, _ = dry_run("slurm.sbatch", SLURM_SUBMIT_DIR=".", **given)[1].splitlines()
  assert load.startswith("srun --ntasks=5 --ntasks-per-node=1 ")
  assert run.startswith("srun --cpus-per-task=3 ") and "--connect_seconds=7 " in run
  assert re.search(r"^#SBATCH --requeue$", text, re.M)
  assert re.search(r"^#SBATCH --open-mode=append$", text, re.M)  # a requeued job keeps its log
  assert re.search(r"^#SBATCH --signal=TERM@\d+$", text, re.M)
  tasks, gpus = (
    re.search(rf"^#SBATCH --{name}-per-node=(\d+)$", text, re.M)[1] for name in ("ntasks", "gpus")
  )
  assert tasks == gpus


@pytest.mark.parametrize(
  "load,program,code,requeued",
  [
    (0, 0, 0, False), (0, 75, 75, True), (0, 1, 1, False), (0, 137, 137, False),
    (0, 143, 143, True),  # SIGTERM, before a process could take it
    (143, 0, 143, True), (1, 0, 1, False),
    (75, 0, 75, False),  # the loading saves nothing
  ],
)  # fmt: skip
def test_job_that_sigterm_ended_is_queued_again(tmp_path, load, program, code, requeued):
  fake(tmp_path, "srun", f'case "$*" in *" -c "*) exit {load} ;; *) exit {program} ;; esac')
  fake(tmp_path, "scontrol", 'echo "scontrol $*"')
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "setup.sh").write_text("")
  environment = {
    **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "c", "WORKDIR": "w",
    "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12",
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True
  )
  assert done.returncode == code and ("scontrol requeue 12" in done.stdout) == requeued, done
