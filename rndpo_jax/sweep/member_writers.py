"""The metrics of a sweep's members, each in a folder of its own."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath

from rndpo_jax.runtime import progress, sharding
from rndpo_jax.sweep import sweep_results
from rndpo_jax.training import metric_writer


class MemberWriters:
  """As `metric_writer.MetricWriter`, one for each member, which ends where the member diverges.

  Args:
    directory: `sweep/`.
    grid: what the sweep goes over, see `sweep.run`.
  """

  def __init__(self, directory: epath.Path, grid: dict[str, list]):
    self._members = sweep_results.members_of(grid)
    self._writers, self._diverged = [], np.zeros(len(self._members), np.int32)
    for member in self._members:
      folder = sweep_results.member_directory(directory, *member)
      folder.mkdir(parents=True, exist_ok=True)
      self._writers.append(metric_writer.MetricWriter(folder))

  def resume(self, start: int, validated: list[int] | None) -> None:
    del validated  # a member that diverged has none since; `sweep_results` looks at the others
    for writer in self._writers:
      writer.resume(start)

  def add_steps(self, steps: list[tuple[int, dict[str, jax.Array]]], every: int) -> None:
    # The latest are fetched in any case: they say which members a validation is of.
    for step, aux in [(n, aux) for n, aux in steps if n % every == 0 or n == steps[-1][0]]:
      aux = sharding.fetch(aux)
      self._tell(aux.pop("diverged").ravel())
      if step % every == 0:
        self._add("train", step, aux)

  def add_validation(self, step: int, figures: dict[str, np.ndarray]) -> None:
    self._add("val", step, figures)

  def _add(self, kind: str, step: int, figures: dict[str, np.ndarray]) -> None:
    for place in np.flatnonzero(self._diverged == 0):
      row = {name: float(values.ravel()[place]) for name, values in sorted(figures.items())}
      self._writers[place].add({"step": step, "kind": kind, **row})

  def _tell(self, diverged: np.ndarray) -> None:
    for place in np.flatnonzero((diverged > 0) & (self._diverged == 0)):
      seed, beta, rate = self._members[place]
      progress.say(
        f"sweep: seed {seed}, beta {beta:g}, learning rate {rate:g} has no finite loss or gradient "
        f"at step {diverged[place]}; it stays as it was before, the others go on"
      )
    self._diverged = diverged

  def write(self) -> None:
    for writer in self._writers:
      writer.write()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
