"""SIGTERM and SIGINT: the work in hand is finished and saved, then the program ends.

The handler only notes the signal. Training asks at every step and saves; the loops of the other
stages ask between files and batches, where nothing is half-written. With several processes the
distributed runtime of JAX takes SIGTERM, and agrees with all of them on the step to stop after.
"""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: what launchers read as 'start it again'.
EXIT_CODE = 75
# Who pressed Ctrl-C does not want it started again: 128 + SIGINT, as shells have it.
_EXIT_CODES = {signal.SIGTERM: EXIT_CODE, signal.SIGINT: 128 + signal.SIGINT}

_noted: list[signal.Signals] = []


class Preempted(Exception):
  """The program was asked to end and has saved what it has; `exit_code` says how."""

  def __init__(self, what: str):
    by = _noted[0] if _noted else signal.SIGTERM
    self.exit_code = _EXIT_CODES[by]
    super().__init__(f"{by.name}: {what}; the same command goes on from here")


def install() -> None:
  """Takes the signals; the second one of a kind ends the program at once, as it did before.

  Call after `jax.distributed.initialize`, from the main thread. With several processes it leaves
  SIGTERM to the runtime and SIGINT as it is: one that ends alone would leave the others waiting.
  """
  if jax.process_count() == 1:
    for number in _EXIT_CODES:
      signal.signal(number, _note)


def reached(step: int) -> bool:
  """Whether to save and stop after this training step; the same answer on every process."""
  if jax.process_count() == 1:
    return bool(_noted)
  return multihost_utils.reached_preemption_sync_point(step)


def check(what: str) -> None:
  """Raises Preempted where a signal has come; `what` says what is finished."""
  if _noted:
    raise Preempted(what)


def _note(number: int, _) -> None:
  default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  signal.signal(number, default)
  _noted.append(signal.Signals(number))
  # Not print: the signal may have come in the midst of one.
  os.write(2, f"{_noted[0].name}: ending after the work in hand\n".encode())
