"""What the tests of the launchers share: dry runs, and programs that stand for others."""

import os
import pathlib
import subprocess

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = (
  "multi_gpu.sh", "slurm.sbatch", "tpu_vm.sh", "tpu_slice.sh", "quickstart.sh", "setup.sh"
)  # fmt: skip


def dry_run(script, *arguments, **variables):
  environment = {
    **os.environ, "DRY_RUN": "1", "CONFIG": "configs/ph2.py", "WORKDIR": "/runs/a", **variables
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments], env=environment, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def fake(folder, name, body):
  """A program of that name, for a PATH that begins with `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
  (folder / name).chmod(0o755)
