"""The time that a GPU's kernels take themselves, from JAX's profiler.

Between the calls of a small program the device waits for the next to be started; the clock counts
that, the kernels' own time does not.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import jax

from rndpo_jax.benchmark import timing

CALLS = 20


def kernels_of(variant: timing.Variant) -> tuple[float, float] | None:
  """(seconds of kernels, kernels) of a call; None on a device of which no kernels are recorded."""
  variant.wait(variant.run(0))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for turn in range(CALLS):
        outputs = variant.run(turn)
      variant.wait(outputs)
    found = next(pathlib.Path(folder).rglob("*.xplane.pb"))
    seconds, count = kernels(jax.profiler.ProfileData.from_file(str(found)).planes)
  return (seconds / CALLS, count / CALLS) if count else None


def kernels(planes: Iterable[Any]) -> tuple[float, int]:
  """Seconds and number of the events on the streams of GPUs.

  Args:
    planes: of a `jax.profiler.ProfileData`. A GPU's other lines repeat its streams' events by
      program and by operation.
  """
  seconds, count = 0.0, 0
  for plane in planes:
    for line in plane.lines if plane.name.startswith("/device:GPU") else ():
      if line.name.startswith("Stream"):
        durations = [event.duration_ns for event in line.events]
        seconds += 1e-9 * sum(durations)
        count += len(durations)
  return seconds, count
