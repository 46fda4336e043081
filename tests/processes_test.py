"""processes: flags that name them, and how one that stops tells the others."""

import threading

import jax
import pytest

from rndpo_jax import processes
from rndpo_jax.config import ConfigError


def initialize(address, count, index):
  return processes.initialize(
    address, count, index, detect=False, connect_seconds=1, heartbeat_seconds=10
  )


@pytest.mark.parametrize(
  "arguments,message",
  [
    (("host:1", None, 0), "--num_processes: missing"),
    ((None, 2, 0), "--coordinator_address: missing"),
    (("host:1", 2, None), "--process_id: missing"),
    (("host", 2, 0), "--coordinator_address: found 'host', expected HOST:PORT"),
    ((":1", 2, 0), "--coordinator_address: found ':1', expected HOST:PORT"),
    (("host:port", 2, 0), "--coordinator_address: found 'host:port'"),
    (("host:1", 2, 2), "--process_id: found 2, expected 0..1"),
    (("host:1", 2, -1), "--process_id: found -1, expected 0..1"),
  ],
)
def test_flags_that_do_not_fit_are_named(arguments, message):
  with pytest.raises(ConfigError, match=message):
    initialize(*arguments)


def test_one_process_needs_nothing():
  assert initialize(None, None, None) is False
  assert processes.is_first() and processes.agree(lambda: 7) == 7
  assert processes.any_of(True) and not processes.any_of(False)
  assert processes.which(True) == [0] and processes.which(False) == []
  assert processes.agree_on_list(lambda: [20, 40]) == [20, 40]
  assert processes.agree_on_list(lambda: []) == []
  processes.barrier("alone")


def test_a_broken_collective_is_told_from_other_errors(monkeypatch):
  broken = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  assert not processes.is_loss_of_another(broken)  # there is no other
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert processes.is_loss_of_another(broken)
  assert not processes.is_loss_of_another(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


def test_the_others_do_not_look(monkeypatch):
  monkeypatch.setattr(processes, "is_first", lambda: False)
  assert processes.agree(lambda: pytest.fail("it looked")) == 0


class Store:
  """Stands for the distributed runtime's store: each answer is raised or returned once."""

  def __init__(self, *answers):
    self.answers, self.told = list(answers), []

  def key_value_try_get(self, key):
    answer = self.answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  def key_value_set(self, key, value, allow_overwrite):
    self.told.append(value)
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused")


@pytest.fixture
def ends(monkeypatch):
  """Codes that the process would have ended with, which here end the call alone."""
  codes = []

  def end(code):
    codes.append(code)
    raise SystemExit(code)

  monkeypatch.setattr(processes.os, "_exit", end)
  monkeypatch.setattr(processes, "_LOOK_EVERY_SECONDS", 0.0)
  monkeypatch.setattr(processes, "_ending", threading.Lock())
  return codes


def test_a_process_ends_when_another_says_that_it_has_stopped(capsys, ends):
  nothing = jax.errors.JaxRuntimeError("NOT_FOUND: Config key rndpo_jax/stopped not found.")
  busy = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded")
  with pytest.raises(SystemExit):
    processes._watch(Store(nothing, busy, nothing, "3"), threading.Event())
  assert ends == [1]
  assert "another process of this run has stopped" in (error := capsys.readouterr().err)
  assert "(process 3)" in error and error.count("\n") == 1


def test_a_process_that_is_over_looks_no_more(ends):
  over = threading.Event()
  over.set()
  processes._watch(Store(), over)
  assert ends == []


def test_a_process_that_stops_tells_the_others_and_speaks_alone(monkeypatch, capsys, ends):
  store = Store()
  monkeypatch.setattr(processes.distributed.global_state, "client", store)
  with pytest.raises(SystemExit):
    processes.stop("error: the disk is full")
  assert ends == [1] and store.told == ["0"]
  assert capsys.readouterr().err == "error: the disk is full\n"
  assert processes._ending.locked()  # so that no other thread has a message to add
