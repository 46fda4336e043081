"""What the processes of a run tell each other: who is first, barriers, broadcasts, gathers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
  """Whether this is process 0, the one that writes the files which the processes share."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here, so that what process 0 wrote can be read."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(ask: Callable[[], int]) -> int:
  """What `ask` gives on process 0, the only one to call it; all of them take the same branch.

  A file that one process looks for in vain may stay missing for it, although another has written
  it since: network file systems remember that.

  Args:
    ask: -> an int32, or a bool.
  """
  return int(multihost_utils.broadcast_one_to_all(np.int32(ask() if is_first() else 0)))


def broadcast_list(ask: Callable[[], list[int]]) -> list[int]:
  """As `broadcast`, for several numbers; their count is broadcast first."""
  found = ask() if is_first() else []
  count = broadcast(lambda: len(found))
  padded = np.array(found or [0] * count, np.int32)
  return multihost_utils.broadcast_one_to_all(padded).tolist() if count else []


def processes_where(value: bool) -> list[int]:
  """The processes on which `value` is true: an all-gather, which every process must call."""
  everywhere = multihost_utils.process_allgather(np.array(value))
  return np.flatnonzero(everywhere).tolist()


def any_process(value: bool) -> bool:
  """Whether `value` is true on any process: an all-gather, which every process must call."""
  return bool(processes_where(value))


def maximum(value: int) -> int:
  """The largest value of any process: an all-gather, which every process must call."""
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def total(value: int) -> int:
  """The sum of the values of all processes: an all-gather, which every process must call."""
  return int(np.sum(multihost_utils.process_allgather(np.int32(value))))
