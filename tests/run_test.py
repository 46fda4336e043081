"""launch.run as a user meets it: kill -9 and go on, and errors of one clear line."""

import errno
import logging
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import jax
import killable
import pytest

from launch import common
from rndpo_jax import pipeline
from rndpo_jax.runtime import preemption
from rndpo_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "tests/tiny_config.py"


def start(workdir, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.run", f"--config={CONFIG}", f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.fixture(scope="module")
def run():
  """run(work directory, *arguments) -> (exit code, output), each in a process of its own."""
  with killable.programs("launch.run") as program:

    def run(workdir, *arguments, **options):
      return program(f"--config={CONFIG}", f"--workdir={workdir}", *arguments, **options)

    yield run


def test_killed_in_each_stage_it_goes_on_to_the_same_results(run, tiny_config, tmp_path):
  """Every start is a process, killed with signal 9 half way through writing a file."""
  changes = {"judge.compare": ("learned",), "judge.learned.num_steps": 20}
  config = tiny_config(**{key.replace(".", "__"): value for key, value in changes.items()})
  undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
  pipeline.run(config, undisturbed)
  arguments = [f"--config.{key}={value}" for key, value in changes.items()]

  def kill_at(pattern):
    code, output = run(workdir, *arguments, kill_at=f"{workdir}/{pattern}")
    assert code == -signal.SIGKILL, output
    assert not list(workdir.glob(pattern))

  kill_at("splits.json")
  kill_at("base/state/40*/sha256.json")
  assert checkpoint.steps(workdir / "base" / "state") == [20]
  kill_at("pairs/judge/metrics.jsonl")
  assert not (workdir / "pairs" / "judge" / "params").exists()
  kill_at("pairs/pairs-00001-of-00002.json")
  kept = workdir / "pairs" / "pairs-00000-of-00002.json"
  written = kept.stat().st_mtime_ns
  kill_at("finetune/state/8*/sha256.json")
  assert kept.stat().st_mtime_ns == written
  assert checkpoint.steps(workdir / "finetune" / "state") == [4]
  kill_at("evaluate/curve-4.json")
  assert (workdir / "evaluate" / "curve-0.json").exists()
  assert not (workdir / "results.json").exists()
  kill_at("report.html")
  code, output = run(workdir, *arguments)
  assert code == 0, output
  assert "base: going on" not in output  # what is done is not done again
  for name in (
    "results.json",
    "base/metrics.jsonl",
    "finetune/metrics.jsonl",
    "pairs/manifest.json",
  ):
    assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
  assert "base" in output and "fine-tuned (last)" in output and "report.html" in output
  assert (workdir / "report.html").exists()


def test_the_second_of_two_runs_at_once_is_told_who_is_at_work(run, tmp_path):
  workdir = tmp_path / "run"
  with start(workdir) as first:
    while first.stdout.readline() not in ("[prepare]\n", ""):
      pass
    code, output = run(workdir, "--config.seed=1")
    first.send_signal(signal.SIGKILL)
  (line,) = output.splitlines()
  assert code == 1 and line.startswith(f"error: --workdir: process {first.pid} on host "), output
  code, output = run(workdir, "--stages=prepare")
  assert code == 0, output
  assert not list(workdir.glob(".lock-*"))


@pytest.mark.parametrize(
  "arguments,expected",
  [
    (("--config.finetune.betta=1",), "error: .*betta"),
    (("--config.finetune.beta=strong",), "beta"),
    (("--config.judge.name=nomodule:judge",), "error: config.judge: .*nomodule"),
    (("--config.finetune.batch_size=12",), "error: config.finetune.batch_size: found 12"),
    (("--config.judge.name=magic",), "error: config.judge: unknown judge 'magic'"),
    (
      (
        "--config.data.source=folder",
        "--config.data.root=/nowhere",
        "--config.data.phantom.num_cases=152",
        "--config.data.phantom.size=(72,80)",
      ),
      "error: .*/nowhere",
    ),
    (("--config.data.root=/nowhere",), "error: config.data.root: .* which nothing reads"),
  ],
)
def test_config_errors_name_the_key_before_anything_runs(run, tmp_path, arguments, expected):
  code, output = run(tmp_path / "run", *arguments)
  assert code != 0 and re.search(expected, output), output
  assert not (tmp_path / "run" / "data").exists() or not any((tmp_path / "run" / "data").iterdir())
  if expected.startswith("error"):
    assert "Traceback" not in output


# Meets a signal before any work, as the program does while it imports or waits for the others.
EARLY = """
import os, signal, sys, time
from launch import common
common.end_at_sigterm()
if sys.argv[1] == "taken":
  common.take_signals()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
from rndpo_jax.runtime import preemption
preemption.check("noted")
"""


def test_a_signal_before_any_work_asks_to_be_started_again():
  done = subprocess.run([sys.executable, "-c", EARLY, "early"], cwd=ROOT, capture_output=True)
  assert done.returncode == preemption.EXIT_CODE and b"before any work" in done.stderr


def test_signal_after_take_signals_is_noted():
  code = EARLY.replace("sleep(20)", "sleep(1)")
  done = subprocess.run([sys.executable, "-c", code, "taken"], cwd=ROOT, capture_output=True)
  assert done.returncode == 1 and b"Preempted: SIGTERM: noted" in done.stderr


def test_signal_ends_a_process_that_waits_for_the_others(tmp_path):
  """In C++, where no handler of Python runs."""
  with socket.create_server(("127.0.0.1", 0)) as coordinator:  # which never says a word
    coordinator.settimeout(120)
    several = ("--num_processes=2", "--process_id=1")
    port = coordinator.getsockname()[1]
    process = start(tmp_path / "run", f"--coordinator_address=127.0.0.1:{port}", *several)
    connection, _ = coordinator.accept()
    with connection:
      process.send_signal(signal.SIGTERM)
      output, _ = process.communicate(timeout=60)
  assert process.returncode == preemption.EXIT_CODE, output


def test_full_disk_ends_with_what_to_do(tmp_path, monkeypatch):
  from launch import run as launch_run

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))

  class Value:
    def __init__(self, value):
      self.value = value

  monkeypatch.setattr(pipeline, "run", full)
  for name in ("end_at_sigterm", "take_signals"):
    monkeypatch.setattr(common, name, lambda: None)
  monkeypatch.setattr(launch_run.cache_flag, "use", lambda: None)
  values = {"_CONFIG": None, "_WORKDIR": str(tmp_path / "run"), "_STAGES": None}
  for name, value in values.items():
    monkeypatch.setattr(launch_run, name, Value(value))
  with pytest.raises(SystemExit, match="the disk is full.*file.*free some space"):
    launch_run.main(["run"])


def ends_by(error, several, capsys):
  """(message, what was printed) where the program, or one of several, meets an error."""

  def stop(message):
    raise SystemExit(message)

  with pytest.raises(SystemExit) as end, common.one_line_errors(stop if several else sys.exit):
    raise error
  return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_missing_file_is_named_in_one_line(several, capsys):
  gone = FileNotFoundError(errno.ENOENT, "No such file or directory", "/run/base/selected.json")
  message, printed = ends_by(gone, several, capsys)
  assert message.startswith("error: ") and "/run/base/selected.json" in message and not printed
  assert "run the same command again" in message


def test_unexpected_error_ends_one_of_several_processes_at_once(capsys):
  message, printed = ends_by(KeyError("surprise"), True, capsys)
  assert message == "error: process 0: it stops by the error above"
  assert "Traceback" in printed and "surprise" in printed
  with pytest.raises(KeyError):  # alone it can end in order
    ends_by(KeyError("surprise"), False, capsys)


def test_errors_of_abandoned_writes_are_not_printed(monkeypatch):
  from launch import common

  shown = []
  monkeypatch.setattr(sys, "unraisablehook", shown.append)
  common.quiet_failed_writes()
  found = [types.SimpleNamespace(exc_value=RuntimeError(x)) for x in ("Event loop is closed", "x")]
  for one in found:
    sys.unraisablehook(one)
  assert shown == found[1:]


def test_log_of_a_failed_write_in_a_thread_is_hidden():
  from launch import common

  def record(error):
    return logging.LogRecord("absl", logging.ERROR, "", 1, "failed", (), (type(error), error, None))

  assert not common.is_no_failed_write(record(OSError(errno.ENOSPC, "No space left on device")))
  assert not common.is_no_failed_write(record(ValueError("NOT_FOUND: Error reading /d/x")))
  assert not common.is_no_failed_write(record(TimeoutError("Timed out after 86400 seconds.")))
  late = RuntimeError("cannot schedule new futures after interpreter shutdown")
  assert not common.is_no_failed_write(record(late))
  assert common.is_no_failed_write(record(ValueError("no such key: x")))
  assert common.is_no_failed_write(logging.LogRecord("absl", logging.ERROR, "", 1, "", (), None))


def test_a_device_out_of_memory_is_one_line_with_what_helps(capsys):
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
  message, _ = ends_by(error, False, capsys)
  assert message.startswith("error: a device is out of memory (RESOURCE_EXHAUSTED: Out of memory")
  assert "\n" not in message and "batch_size" in message
