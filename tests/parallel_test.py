"""parallel: flags that name the processes, and what several devices share."""

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


def test_split_and_join_undo_each_other():
  tree = {"a": np.arange(48).reshape(16, 3)}
  split = parallel.split_over_local_devices(tree)
  assert split["a"].shape == (8, 2, 3)
  np.testing.assert_array_equal(parallel.join_local_devices(split)["a"], tree["a"])


def test_batch_size_that_cannot_be_shared_is_refused():
  with pytest.raises(ConfigError, match="config.x: found 12.*use 8 or 16"):
    parallel.check_batch_size("config.x", 12, 8)
