"""parallel: flags that name the processes, and what several devices share."""

import threading

import jax
import numpy as np
import pytest

from rndpo_jax import parallel
from rndpo_jax.config import ConfigError


def initialize(address, count, index):
  return parallel.initialize(
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
  assert parallel.is_first() and parallel.agree(7) == 7
  parallel.barrier("alone")


def test_a_broken_collective_is_told_from_other_errors(monkeypatch):
  broken = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  assert not parallel.is_loss_of_another(broken)  # there is no other
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert parallel.is_loss_of_another(broken)
  assert not parallel.is_loss_of_another(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


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

  monkeypatch.setattr(parallel.os, "_exit", end)
  monkeypatch.setattr(parallel, "_LOOK_EVERY_SECONDS", 0.0)
  monkeypatch.setattr(parallel, "_ending", threading.Lock())
  return codes


def test_a_process_ends_when_another_says_that_it_has_stopped(capsys, ends):
  nothing = jax.errors.JaxRuntimeError("NOT_FOUND: Config key rndpo_jax/stopped not found.")
  busy = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded")
  with pytest.raises(SystemExit):
    parallel._watch(Store(nothing, busy, nothing, "3"), threading.Event())
  assert ends == [1]
  assert "another process of this run has stopped" in (error := capsys.readouterr().err)
  assert "(process 3)" in error and error.count("\n") == 1


def test_a_process_that_is_over_looks_no_more(ends):
  over = threading.Event()
  over.set()
  parallel._watch(Store(), over)
  assert ends == []


def test_a_process_that_stops_tells_the_others_and_speaks_alone(monkeypatch, capsys, ends):
  store = Store()
  monkeypatch.setattr(parallel.distributed.global_state, "client", store)
  with pytest.raises(SystemExit):
    parallel.stop("error: the disk is full")
  assert ends == [1] and store.told == ["0"]
  assert capsys.readouterr().err == "error: the disk is full\n"
  assert parallel._ending.locked()  # so that no other thread has a message to add


def test_split_and_join_undo_each_other():
  tree = {"a": np.arange(48).reshape(16, 3)}
  split = parallel.split_over_local_devices(tree)
  assert split["a"].shape == (8, 2, 3)
  np.testing.assert_array_equal(parallel.join_local_devices(split)["a"], tree["a"])


def test_batch_size_that_cannot_be_shared_is_refused():
  with pytest.raises(ConfigError, match="config.x: found 12.*use 8 or 16"):
    parallel.check_batch_size("config.x", 12, 8)
