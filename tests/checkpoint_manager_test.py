"""saving: in which order checkpoints are waited for, and when they are not."""

import jax
import pytest

from rndpo_jax.runtime import preemption
from rndpo_jax.training import checkpoint_manager


class Writer:
  """Stands for `checkpoint.Writer`: notes what is asked of it, and fails where told to."""

  def __init__(self, folder):
    self.name, self.fails = folder.name, False
    NOTED.append(f"make {self.name}")

  def __getattr__(self, what):
    def note(*_):
      NOTED.append(f"{what} {self.name}")
      if self.fails and what == "wait":
        raise OSError("full")

    return note


NOTED = []
WAITS, CLOSES = ["wait params", "wait state"], {"close params", "close state"}


@pytest.fixture
def make(tmp_path, monkeypatch):
  """(number of processes) -> a CheckpointManager of noting writers."""
  monkeypatch.setattr(checkpoint_manager.checkpoint, "Writer", Writer)

  def make(processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    saver = checkpoint_manager.CheckpointManager(tmp_path, description="test", fingerprints={})
    NOTED.clear()
    return saver

  return make


class State:
  def evaluated(self):
    return None


def test_all_before_is_waited_for_in_one_order_and_nothing_between(make):
  saver = make(2)
  saver.save(3, State())
  assert NOTED == [*WAITS, "save params", "save state"]
  NOTED.clear()
  saver.save(4, State(), with_params=False)
  assert NOTED == [*WAITS, "save state"]


@pytest.mark.parametrize(
  "processes,error,waits,closes",
  [
    (2, OSError("full"), [], set()),
    (2, preemption.Preempted("saved"), WAITS, CLOSES),
    (1, OSError("full"), [], CLOSES),
  ],
)
def test_an_error_of_one_of_several_leaves_without_waiting(make, processes, error, waits, closes):
  with pytest.raises(type(error)), make(processes):
    raise error
  assert [text for text in NOTED if text.startswith("wait")] == waits
  assert {text for text in NOTED if text.startswith("close")} == closes


def test_a_write_that_failed_in_one_of_several_raises_before_any_other_is_waited_for(make):
  saver = make(2)
  saver._writers["params"].fails = True
  with pytest.raises(OSError, match="full"), saver:
    pass
  assert NOTED == ["wait params"]


def test_parameters_that_are_missing_are_written_by_all_or_none(make, monkeypatch):
  """As process 0 finds them: those that write wait for each other."""
  saver = make(2)
  monkeypatch.setattr(checkpoint_manager.checkpoint, "steps", lambda folder: [3])
  for first_finds_none, noted in ((0, []), (1, ["save params"])):
    monkeypatch.setattr(
      checkpoint_manager.multihost, "broadcast", lambda ask, answer=first_finds_none: answer
    )
    for step in (3, 4):  # here, and missing here
      NOTED.clear()
      saver.save_params_if_missing(step, State())
      assert NOTED == noted
