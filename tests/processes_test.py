"""processes: flags that name them, and how one that stops tells the others."""

import threading

import jax
import pytest

from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import multihost, processes


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
def test_flags_that_do_not_fit_together_are_named(arguments, message):
  with pytest.raises(ConfigError, match=message):
    initialize(*arguments)


def test_one_process_needs_no_flags():
  assert initialize(None, None, None) is False
  assert multihost.is_first() and multihost.broadcast(lambda: 7) == 7
  assert multihost.any_process(True) and not multihost.any_process(False)
  assert multihost.processes_where(True) == [0] and multihost.processes_where(False) == []
  assert multihost.broadcast_list(lambda: [20, 40]) == [20, 40]
  assert multihost.broadcast_list(lambda: []) == []
  multihost.barrier("alone")


def test_a_broken_collective_is_told_from_other_errors(monkeypatch):
  broken = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  assert not processes.is_loss_of_another(broken)  # there is no other
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert processes.is_loss_of_another(broken)
  assert not processes.is_loss_of_another(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


def test_only_process_0_looks_at_the_file_system(monkeypatch):
  monkeypatch.setattr(multihost, "is_first", lambda: False)
  assert multihost.broadcast(lambda: pytest.fail("it looked")) == 0


class Store:
  """Stands for the distributed runtime's store; `busy` reads fail before it answers."""

  def __init__(self, values=(), busy=0):
    self.values, self.busy = dict(values), busy

  def key_value_try_get(self, key):
    self.busy -= 1
    if self.busy >= 0:
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded")
    if key not in self.values:
      raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
    return self.values[key]

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.values and not allow_overwrite:
      raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
    self.values[key] = value

  def key_value_dir_get(self, folder):
    return [item for item in self.values.items() if item[0].startswith(f"{folder}/")]


@pytest.fixture
def ends(monkeypatch):
  """Codes that the process would have ended with, which here end the call alone."""
  codes = []
  jax.devices()  # the backend starts before a test puts a stand-in for the distributed runtime

  def end(code):
    codes.append(code)
    raise SystemExit(code)

  monkeypatch.setattr(processes.os, "_exit", end)
  monkeypatch.setattr(processes, "_LOOK_EVERY_SECONDS", 0.0)
  monkeypatch.setattr(processes, "_ending", threading.Lock())
  return codes


def test_a_process_ends_when_another_says_that_it_has_stopped(capsys, ends):
  store = Store({processes._STOPPED: "process 3"}, busy=3)
  with pytest.raises(SystemExit):
    processes._watch(store, threading.Event(), [0])
  assert ends == [1]
  assert "another process of this run has stopped" in (error := capsys.readouterr().err)
  assert "(process 3)" in error and error.count("\n") == 1


class Looks:
  """Stands for the event that a program is over, which comes after so many looks."""

  def __init__(self, number):
    self.left = number

  def wait(self, seconds):
    self.left -= 1
    return self.left < 0


def test_a_thread_answers_a_roll_call_once_asked():
  store = Store()
  processes._watch(store, Looks(1), [0])
  assert store.values == {}
  store.values[processes._ROLL_CALL] = ""
  processes._watch(store, Looks(2), [0])
  assert store.values.keys() == {processes._ROLL_CALL, f"{processes._HERE}/0"}


def test_answers_of_process_0_are_counted():
  answered = [0]
  processes._watch(Store(busy=2), Looks(3), answered)
  assert answered == [4]  # six reads, of which two failed; that nothing is there is an answer, too


class Hears(Looks):
  """As `Looks`; process 0 answers in the first `answers` of them."""

  def __init__(self, number, answers, answered):
    super().__init__(number)
    self.answers, self.answered = answers, answered

  def wait(self, seconds):
    self.answers -= 1
    self.answered[0] += self.answers >= 0
    return super().wait(seconds)


def test_a_process_ends_when_process_0_is_silent(monkeypatch, capsys, ends):
  monkeypatch.setattr(processes, "_LOOK_EVERY_SECONDS", 1.0)
  processes._look_out(Hears(14, 8, answered := [0]), answered, 6.0)  # six looks of silence
  assert ends == []
  with pytest.raises(SystemExit):
    processes._look_out(Hears(15, 8, answered := [0]), answered, 6.0)
  assert ends == [1]
  assert "has stopped, see its own output (process 0, silent for 6 s)" in capsys.readouterr().err


@pytest.mark.parametrize(
  "here,who",
  [
    ((0, 2, 3), "process 1"),
    ((0, 2), "processes 1, 3"),
    ((0, 1, 2, 3), None),
  ],
)
def test_roll_call_names_the_processes_that_do_not_answer(here, who, monkeypatch, ends):
  store = Store({f"{processes._HERE}/{index}": "" for index in here})
  monkeypatch.setattr(processes.distributed.global_state, "client", store)
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  said = processes.failed_collective("Connection reset")
  assert processes._ROLL_CALL in store.values
  if who:
    assert f"another process of this run has stopped, see its own output ({who}: Conn" in said
  else:
    assert "error: process 0: the processes cannot reach each other (Connection reset)" in said
  # Others are told only of processes that are gone, and the first who tells is believed.
  assert store.values.get(processes._STOPPED) == who
  with pytest.raises(SystemExit):
    processes.stop(said)
  assert store.values[processes._STOPPED] == (who or "process 0")


def test_a_roll_call_without_a_coordinator(monkeypatch, ends):
  class Gone(Store):
    def key_value_set(self, key, value, allow_overwrite=False):
      raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused")

  monkeypatch.setattr(processes.distributed.global_state, "client", Gone())
  assert "(process 0, which the others ask, does not answer: reset)" in (
    processes.failed_collective("reset")
  )


def test_watching_ends_with_the_process(ends):
  over = threading.Event()
  over.set()
  processes._watch(Store({processes._STOPPED: "process 3"}), over, [0])
  assert ends == []


def test_a_process_that_stops_tells_the_others_in_one_message(monkeypatch, capsys, ends):
  store = Store()
  monkeypatch.setattr(processes.distributed.global_state, "client", store)
  with pytest.raises(SystemExit):
    processes.stop("error: the disk is full")
  assert ends == [1] and store.values == {processes._STOPPED: "process 0"}
  assert capsys.readouterr().err == "error: process 0: the disk is full\n"
  assert processes._ending.locked()  # so that no other thread has a message to add
