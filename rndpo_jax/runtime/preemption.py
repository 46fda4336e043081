"""SIGTERM and SIGINT: the work in hand is finished and saved, then the program ends.

The handler only notes the signal. Training asks at every step and saves; the loops of the other
stages ask between files and batches, where nothing is half-written. With several processes the
distributed runtime of JAX takes SIGTERM and tells all of them, whichever it came to; at the next
point where they meet they end together.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from rndpo_jax.runtime import multihost

# EX_TEMPFAIL of sysexits.h: what launchers read as 'start it again'.
EXIT_CODE = 75
# After Ctrl-C nobody wants it started again: 128 + SIGINT, as shells have it.
_EXIT_CODES = {signal.SIGTERM: EXIT_CODE, signal.SIGINT: 128 + signal.SIGINT}

# Several processes agree at every so many steps of training: that takes some milliseconds.
_AGREE_EVERY_STEPS = 5
_TICK_SECONDS = 0.25

_noted: list[signal.Signals] = []


class Preempted(Exception):
  """The program was asked to end and has saved what it has; `exit_code` says how.

  `alone` says that the other processes do not know yet that this one ends here.
  """

  def __init__(self, what: str, *, alone: bool = False):
    by = _noted[0] if _noted else signal.SIGTERM
    self.exit_code = _EXIT_CODES[by]
    self.what, self.alone = what, alone
    super().__init__(f"{by.name}: {what}; the same command goes on from here")


def install() -> None:
  """Takes the signals; the second one of a kind ends the program at once, as it did before.

  Call after `jax.distributed.initialize`, from the main thread. With several processes it leaves
  SIGTERM to the runtime, which tells all of them; of a SIGINT they tell each other where they meet.
  """
  signal.signal(signal.SIGINT, _note)
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, _note)
    return
  ended = threading.Event()
  watch = threading.Thread(target=_watch, args=[ended], daemon=True)
  watch.start()

  def end():  # before the runtime that it asks is gone
    ended.set()
    watch.join()

  atexit.register(end)


def reached(step: int) -> bool:
  """Whether to save and stop after this training step; the same answer on every process."""
  if jax.process_count() == 1:
    return bool(_noted)
  return step % _AGREE_EVERY_STEPS == 1 and _any_noted()


def _any_noted() -> bool:
  """Whether a signal has come to any process; then it counts as having come to this one, too."""
  first = multihost.maximum(_noted[0] if _noted else 0)
  if first and not _noted:
    _noted.append(signal.Signals(first))
  return bool(first)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """Work that the processes do apart; then all meet, and all end if one of them has to.

  Inside, `check` may end the work of some early. Nothing else that processes wait in may stand
  there between one that ended early and the meeting.

  Args:
    what: what is finished after it.

  Raises:
    Preempted: on every process.
  """
  try:
    yield
  except Preempted as error:
    if not error.alone:
      raise
    what = error.what
  if _any_noted():
    raise Preempted(what)


def check(what: str) -> None:
  """Raises Preempted if a signal has come; `what` says what is finished.

  With several processes it ends this one alone: call it inside `together`.
  """
  if _noted:
    raise Preempted(what, alone=True)


def _note(number: int, _) -> None:
  default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
  signal.signal(number, default)
  _note_and_say(signal.Signals(number))


def _note_and_say(number: signal.Signals) -> None:
  _noted.append(number)
  # Not print: the signal may have come in the midst of one.
  os.write(2, f"{_noted[0].name}: ending after the work in hand\n".encode())


def _watch(ended: threading.Event) -> None:
  """Notes SIGTERM once the runtime says that it has come to any process; in a thread.

  The runtime wants every process to count up, and answers True at one count alone, the next after
  the highest that any has reached. Counted by the clock it comes to all of them at about the same
  moment, also to one that waits for another; counts of steps differ between processes that mine.
  """
  start = time.monotonic()
  for tick in itertools.count(1):
    if ended.wait(max(0.0, start + tick * _TICK_SECONDS - time.monotonic())):
      return
    if multihost_utils.reached_preemption_sync_point(tick):
      return _note_and_say(signal.SIGTERM)
