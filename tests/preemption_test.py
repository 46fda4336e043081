"""preemption: a signal is noted, the second one acts at once, and both have their exit code."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch import common
from launch import run as launch_run
from rndpo_jax import pipeline
from rndpo_jax.runtime import preemption

# A training of 40 steps, then work that process 0 does alone; a signal comes to the one that waits.
PROCESS = """
import os, signal, sys, threading, time
from rndpo_jax.runtime import preemption, processes
index, address, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processes.initialize(address, 2, index, detect=False, connect_seconds=60, heartbeat_seconds=15)
preemption.install()
try:
  assert not any(preemption.reached(step) for step in range(1, 41))
  if index == 1:
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
  with preemption.together("all is done"):
    # Only the runtime tells the other one at once, and only of a SIGTERM.
    while index == 0 and number == signal.SIGTERM:
      preemption.check("half is done")
      time.sleep(0.01)
    time.sleep(2)
except preemption.Preempted as error:
  print(error)
  sys.exit(error.exit_code)
"""


@pytest.fixture
def installed(monkeypatch):
  """The handlers, and no noted signal; both put back afterwards."""
  monkeypatch.setattr(preemption, "_noted", [])
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  preemption.install()
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def test_nothing_happens_without_a_signal(installed):
  preemption.check("all is done")
  assert not preemption.reached(3)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_noted_with_its_exit_code(installed, capfd, number, code):
  os.kill(os.getpid(), number)
  assert preemption.reached(3)
  with pytest.raises(preemption.Preempted, match=f"{number.name}: it is saved; the same") as error:
    preemption.check("it is saved")
  assert error.value.exit_code == code
  assert f"{number.name}: ending after" in capfd.readouterr().err


def test_the_second_signal_acts_at_once(installed):
  os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def two_processes(monkeypatch):
  """As if there were two, the other one with nothing to say."""
  monkeypatch.setattr(preemption, "_noted", [])
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
  monkeypatch.setattr(preemption.multihost, "maximum", int)


def test_several_processes_agree_every_few_steps(two_processes):
  assert not any(preemption.reached(step) for step in range(1, 21))
  preemption._noted.append(signal.SIGTERM)
  assert [step for step in range(1, 13) if preemption.reached(step)] == [1, 6, 11]
  assert preemption.Preempted("saved").exit_code == 75


def test_several_processes_leave_the_signals_to_the_runtime(two_processes, monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  interrupt = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(preemption, "_TICK_SECONDS", 0.001)
  ticks, ends = [], []

  def sync(tick):
    ticks.append(tick)
    return tick == 8

  monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", sync)
  monkeypatch.setattr(preemption.atexit, "register", ends.append)
  preemption.install()
  assert signal.getsignal(signal.SIGTERM) == before
  assert signal.signal(signal.SIGINT, interrupt) == preemption._note
  while not preemption._noted:  # by the thread that watches
    time.sleep(0.001)
  ends[0]()  # waits for it
  assert ticks == [*range(1, 9)] and preemption._noted == [signal.SIGTERM]


def test_the_watch_ends_with_the_program(two_processes, monkeypatch):
  monkeypatch.setattr(preemption, "_TICK_SECONDS", 1e6)
  ended = threading.Event()
  ended.set()
  preemption._watch(ended)
  assert not preemption._noted


def test_a_process_that_ended_early_meets_the_others_once(two_processes, monkeypatch):
  meetings = []

  def most(value):
    meetings.append(value)
    return int(signal.SIGTERM)

  monkeypatch.setattr(preemption.multihost, "maximum", most)
  with pytest.raises(preemption.Preempted, match="inner is done"):
    with preemption.together("outer is done"):
      with preemption.together("inner is done"):
        pass  # the signal came to the other process
  assert meetings == [0] and preemption._noted == [signal.SIGTERM]
  with pytest.raises(preemption.Preempted, match="half of it"):
    with preemption.together("outer is done"):
      preemption.check("half of it")
  assert meetings == [0, signal.SIGTERM]


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_of_two_processes_ends_both(number, code):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(index), address, str(int(number))],
      cwd=pathlib.Path(__file__).parent.parent,
      env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=100)[0] for process in processes]
  assert [process.returncode for process in processes] == [code, code], outputs
  done = ("half" if number == signal.SIGTERM else "all", "all")
  for output, what in zip(outputs, done, strict=True):
    assert f"{number.name}: {what} is done; the same" in output


def test_the_program_ends_with_the_code_that_launchers_read(
  installed, tmp_path, monkeypatch, capsys
):
  class Value:
    def __init__(self, value):
      self.value = value

  def preempted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.check("finetune: saved at step 4")

  for name in ("end_at_sigterm", "take_signals"):
    monkeypatch.setattr(common, name, lambda: None)
  monkeypatch.setattr(pipeline, "run", preempted)
  monkeypatch.setattr(launch_run.cache_flag, "use", lambda: None)
  for name, value in {"_CONFIG": (), "_WORKDIR": str(tmp_path), "_STAGES": ()}.items():
    monkeypatch.setattr(launch_run, name, Value(value))
  with pytest.raises(SystemExit) as end:
    launch_run.main(["run"])
  assert end.value.code == 75
  assert "stopped by SIGTERM: finetune: saved at step 4; the same" in capsys.readouterr().out
