"""Progress of long loops: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from rich import progress as rich_progress

T = TypeVar("T")
_LINE_EVERY_SECONDS = 15.0


def say(message: str) -> None:
  """Prints one line at once, so that a log shows it when it happens, and which process."""
  which = f"[process {jax.process_index()}] " if jax.process_count() > 1 else ""
  print(f"{which}{message}", flush=True)


def track(
  iterable: Iterable[T], *, total: int, description: str, unit: str, done: int = 0
) -> Iterator[T]:
  """Yields from `iterable`, showing items done, throughput and time left.

  Args:
    iterable: what to go through.
    total: items in all, those already done among them.
    description: what the loop does.
    unit: plural name of an item.
    done: items finished by an earlier run.
  """
  if sys.stdout.isatty() and jax.process_count() == 1:  # bars of several would overwrite each other
    yield from _bar(iterable, total, description, unit, done)
  else:
    yield from _lines(iterable, total, description, unit, done)


def _bar(iterable, total, description, unit, done):
  columns = (
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[rate]}"),
    rich_progress.TimeRemainingColumn(),
  )
  start = time.monotonic()
  with rich_progress.Progress(*columns) as bar:
    task = bar.add_task(description, total=total, completed=done, rate="")
    for count, item in enumerate(iterable, 1):
      yield item
      rate = count / max(time.monotonic() - start, 1e-9)
      bar.update(task, advance=1, rate=f"{rate:.1f} {unit}/s")


def _lines(iterable, total, description, unit, done):
  start = last = time.monotonic()
  count = 0
  for count, item in enumerate(iterable, 1):  # noqa: B007, read after the loop
    yield item
    now = time.monotonic()
    if now - last >= _LINE_EVERY_SECONDS:
      last = now
      rate = count / (now - start)
      left = (total - done - count) / rate
      say(f"{description}: {done + count}/{total}, {rate:.1f} {unit}/s, {left:.0f} s left")
  seconds = time.monotonic() - start
  if count:
    rate = count / max(seconds, 1e-9)
    say(f"{description}: {done + count}/{total} in {seconds:.1f} s, {rate:.1f} {unit}/s")
