"""preemption: a signal is noted, the second one acts at once, and both have their exit code."""

import os
import signal

import pytest

from launch import run as launch_run
from rndpo_jax import pipeline, preemption


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


def test_several_processes_leave_the_signals_to_the_runtime(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
  agreed = iter([False, True])
  sync = lambda step: next(agreed) and step == 8  # noqa: E731
  monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", sync)
  preemption.install()
  assert signal.getsignal(signal.SIGTERM) == before
  assert [preemption.reached(step) for step in (7, 8)] == [False, True]
  assert preemption.Preempted("saved").exit_code == 75


def test_the_program_ends_with_the_code_that_launchers_read(installed, monkeypatch, capsys):
  class Value:
    value = ()

  def preempted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.check("finetune: saved at step 4")

  monkeypatch.setattr(pipeline, "run", preempted)
  for name in ("_CONFIG", "_WORKDIR", "_STAGES"):
    monkeypatch.setattr(launch_run, name, Value)
  with pytest.raises(SystemExit) as end:
    launch_run.main(["run"])
  assert end.value.code == 75
  assert "stopped by SIGTERM: finetune: saved at step 4; the same" in capsys.readouterr().out
