"""Records of a study -> groups, and the gains and differences of their runs; pure.

All are of the sustained test Dice, the mean over the checkpoints of the last third, unless another
is asked for, and are paired: the same draw, seed, base and case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rndpo_jax.study import bootstrap, grid

Record = Mapping[str, Any]
# Axes of numbers that are no setting of a recipe: how often a judge errs, how long a training is.
LENGTH = "finetune.num_steps"
_GIVEN = {"judge.flip_rate", "judge.noise_level", LENGTH}


class Group(NamedTuple):
  """What is compared: the runs of one data set and label budget, by recipe and axes."""

  data: str
  budget: int
  arms: dict[str, list[Record]]

  @property
  def title(self) -> str:
    return f"{self.data}, {self.budget} labelled"


def groups(records: Iterable[Record], *, tuning: bool = False) -> list[Group]:
  """Records by data set and budget, then by recipe and axes; those of tuning apart."""
  found: dict[tuple[str, int], dict[str, list[Record]]] = {}
  for record in sorted(records, key=lambda record: record["key"]):
    if record["tuning"] == tuning:
      arms = found.setdefault((record["data"], record["budget"]), {})
      arms.setdefault(grid.label(record["recipe"], record["axes"]), []).append(record)
  return [Group(*key, found[key]) for key in sorted(found)]


def gain(records: Sequence[Record], what: str = "sustained") -> bootstrap.Interval:
  """Gain over the base, of 'sustained' or 'last', on the test cases."""
  return bootstrap.interval([_run(record, _cases(record, what, "base")) for record in records])


def difference(
  first: Sequence[Record], second: Sequence[Record], what: str = "sustained"
) -> bootstrap.Interval | None:
  """Dice of the first minus the second, over runs of the same draw, seed, base and cases."""
  others = {_pairing(record): record for record in second}
  runs = []
  for record in first:
    other = others.get(_pairing(record))
    if other is not None:
      values = np.subtract(record["cases"][what], other["cases"][what])
      runs.append(_run(record, values))
  return bootstrap.interval(runs) if runs else None


def _pairing(record: Record) -> tuple:
  # A base that was trained again, on another machine say, has other cases' Dice.
  cases = record["cases"]
  return record["draw"], record["seed"], cases["ids"], tuple(cases["base"])


def _cases(record: Record, first: str, second: str) -> np.ndarray:
  return np.subtract(record["cases"][first], record["cases"][second])


def mean(records: Sequence[Record], value: Callable[[Record], float]) -> float:
  """The mean over draws of the means over their runs, as that of gains."""
  draws: dict[int, list[float]] = {}
  for record in records:
    draws.setdefault(record["draw"], []).append(value(record))
  return float(np.mean([np.mean(values) for values in draws.values()]))


def pairs_right(record: Record) -> float | None:
  """Share of validation pairs that the used judge has right; None where no pair is trained on."""
  return record["judge"].get("pair_accuracy") if record["pairs"]["count"] else None


def _run(record: Record, values: np.ndarray) -> bootstrap.Run:
  patients = np.array(record["cases"]["patient"])
  return bootstrap.Run(record["draw"], record["seed"], values, patients)


def chosen(group: Group) -> Group:
  """Of each recipe the point of its axes of numbers with the best validation, as a group.

  The mean sustained validation Dice chooses, over the draws and seeds that all its points have;
  where there are none, among the points with the most runs. Named points, such as judges, stay
  apart, and so do those of _GIVEN: they are no setting of a recipe. Empty if nothing was chosen.
  """
  found: dict[str, dict[str, list[Record]]] = {}
  for label, records in group.arms.items():
    axes = records[0]["axes"]
    settings = numbers(axes) - _GIVEN
    named = {axis: value for axis, value in axes.items() if axis not in settings}
    found.setdefault(grid.label(records[0]["recipe"], named), {})[label] = records
  arms = {}
  for points in found.values():
    best = _best_on_validation(points)
    arms[best] = points[best]
  several = any(len(points) > 1 for points in found.values())
  return group._replace(arms=arms if several else {})


def _best_on_validation(points: Mapping[str, Sequence[Record]]) -> str:
  """The label of the point that `chosen` takes."""
  dice = {
    label: {(r["draw"], r["seed"]): r["val"]["last_third_mean"] for r in records}
    for label, records in points.items()
  }
  shared = set.intersection(*map(set, dice.values()))
  if not shared:
    most = max(map(len, dice.values()))
    dice = {label: runs for label, runs in dice.items() if len(runs) == most}
  return max(dice, key=lambda label: np.mean([dice[label][r] for r in shared or dice[label]]))


def axis_points(group: Group) -> dict[tuple[str, str], dict[float, bootstrap.Interval]]:
  """(recipe, axis) -> value -> sustained gain, over the draws and seeds that all values have.

  See `axis_records`; an axis whose values share no run is left out.
  """
  found = {}
  for key, points in axis_records(group).items():
    runs = [{(r["draw"], r["seed"]) for r in records} for records in points.values()]
    shared = set.intersection(*runs)
    if shared:
      found[key] = {
        value: gain([r for r in points[value] if (r["draw"], r["seed"]) in shared])
        for value in sorted(points)
      }
  return found


def axis_records(group: Group) -> dict[tuple[str, str], dict[float, list[Record]]]:
  """(recipe, axis) -> value -> records, of axes of two numbers and more.

  A recipe with further axes is there once for each of their points, and named with it.
  """
  found: dict[tuple[str, str], dict[float, list[Record]]] = {}
  for record in itertools.chain(*group.arms.values()):
    for axis, value in record["axes"].items():
      if axis in numbers(record["axes"]):
        others = {name: other for name, other in record["axes"].items() if name != axis}
        points = found.setdefault((grid.label(record["recipe"], others), axis), {})
        points.setdefault(value, []).append(record)
  return {key: points for key, points in found.items() if len(points) > 1}


def numbers(axes: Mapping[str, Any]) -> set[str]:
  """The axes whose values are numbers."""
  return {
    axis
    for axis, value in axes.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  }
