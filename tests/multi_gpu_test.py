"""launch/multi_gpu.sh: which GPUs its processes get, signals and exit codes."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from launchers import LAUNCH, dry_run, fake


def test_one_process_or_several_that_share_the_gpus():
  visible = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,9,GPU-7"}
  code, output, _ = dry_run("multi_gpu.sh", "--config.seed=1", **visible)
  head = ["# on 8 GPUs", "source launch/setup.sh cuda12"]
  run = "python -m launch.run --config=configs/ph2.py --workdir=/runs/a --config.seed=1"
  assert code == 0 and output.splitlines() == [*head, f"{run} "]
  code, output, _ = dry_run("multi_gpu.sh", PROCESSES="4", PORT="777", **visible)
  *said, first, _, _, last, wait = output.splitlines()
  assert code == 0 and said == head and wait == "wait"
  first, last = shlex.split(first), shlex.split(last)
  assert first[:4] == ["CUDA_VISIBLE_DEVICES=0,1", "python", "-m", "launch.run"]
  assert last[0] == "CUDA_VISIBLE_DEVICES=9,GPU-7" and first[-1] == last[-1] == "&"
  assert last[-4:-1] == [
    "--coordinator_address=127.0.0.1:777", "--num_processes=4", "--process_id=3"
  ]  # fmt: skip
  code, _, error = dry_run("multi_gpu.sh", PROCESSES="3", **visible)
  assert code != 0 and "PROCESSES=3 does not divide 8 GPUs" in error


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_gpu_is_an_error(processes, visible):
  code, output, error = dry_run("multi_gpu.sh", PROCESSES=processes, CUDA_VISIBLE_DEVICES=visible)
  assert code == 2 and not output and f"PROCESSES={processes} does not divide 0 GPUs" in error


def test_mig_parts_are_not_counted_as_gpus(tmp_path, monkeypatch):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  fake(tmp_path, "nvidia-smi", "printf 'GPU 0: H100\\n  MIG 1g.10gb Device 0:\\nGPU 1: H100\\n'")
  path = f"{tmp_path}:{os.environ['PATH']}"
  _, output, _ = dry_run("multi_gpu.sh", PROCESSES="2", PATH=path)
  assert re.findall(r"^CUDA\S+", output, re.M) == [
    "CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"
  ]  # fmt: skip
  fake(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
  assert dry_run("multi_gpu.sh", PATH=path)[0] == 2


def multi_gpu(tmp_path, program, processes):
  """multi_gpu.sh on two GPUs, in processes that `program` stands for."""
  (tmp_path / "launch").mkdir()
  shutil.copy(LAUNCH / "multi_gpu.sh", tmp_path / "launch")
  (tmp_path / "launch" / "setup.sh").write_text(f"PATH={tmp_path}:$PATH\n")
  fake(tmp_path, "python", program)
  variables = {
    "CONFIG": "c", "WORKDIR": "w", "PROCESSES": str(processes), "CUDA_VISIBLE_DEVICES": "0,1"
  }  # fmt: skip
  return subprocess.Popen(
    ["bash", tmp_path / "launch" / "multi_gpu.sh"],
    env={**os.environ, **variables},
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_and_exit_codes_are_passed_on(tmp_path, processes):
  # Stands for the program: on SIGTERM it takes a moment to save, then asks to be run again.
  program = """trap 'sleep 0.3; exit 75' TERM; echo $$; for i in {1..200}; do sleep 0.1; done"""
  with multi_gpu(tmp_path, program, processes) as process:
    pids = [int(process.stdout.readline()) for _ in range(processes)]
    assert (pids == [process.pid]) == (processes == 1)  # one alone takes the script's place
    process.terminate()
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("codes,expected", [("3 0", 3), ("0 4", 4), ("3 4", 3), ("0 0", 0)])
def test_exit_code_is_that_of_the_first_process_that_failed(tmp_path, codes, expected):
  program = f"codes=({codes}); last=${{!#}}; exit ${{codes[${{last#--process_id=}}]}}"
  with multi_gpu(tmp_path, program, 2) as process:
    assert process.wait(timeout=60) == expected
