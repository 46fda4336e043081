"""Records of a study -> rows of its tables; pure. A claim is made only where an interval allows it.

All gains and differences are of the sustained test Dice, the mean over the checkpoints of the last
third, unless a column says otherwise, and are paired: the same draw, seed, base and case.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rndpo_jax.evaluation import label_free
from rndpo_jax.report import tables as report_tables
from rndpo_jax.study import bootstrap, study_groups, study_stops

Record = study_groups.Record
_SIGNED = report_tables.signed
_WORSE = 0.005  # of Dice: below it a delivered model counts as worse than its base


class Table(NamedTuple):
  """A table as all forms show it: cells are text."""

  title: str
  note: str
  head: list[str]
  rows: list[list[str]]


def _runs(records) -> str:
  """How many, and how many of them lack a phase whose judge was refused."""
  left_out = sum("left_out" in record for record in records)
  return f"{len(records)}, {left_out} with a phase left out" if left_out else str(len(records))


def main_table(group: study_groups.Group) -> Table:
  """A row an arm, best first, the base of the same runs beside it."""
  rows = []
  for label, records in group.arms.items():
    held, last = study_groups.gain(records), study_groups.gain(records, "last")
    worst = min(r["test"]["last_third_mean"] - r["base"]["test"] for r in records)
    sustained, peak, drop = (
      _by_draws(records, lambda record, name=name: record["test"][name])
      for name in ("last_third_mean", "peak", "drop")
    )
    row = [
      label, _steps(records), _runs(records),
      _by_draws(records, lambda record: record["base"]["test"]), sustained, _with_interval(held),
      held.claim, _with_interval(last), peak, drop, _SIGNED(worst), _judged(records),
      _delivered(records),
    ]  # fmt: skip
    rows.append((-held.mean, row))
  head = [
    "recipe", "steps", "runs", "base", "sustained", "gain, sustained", "against the base",
    "gain, last", "peak", "drop", "worst run", "pairs right", "delivered",
  ]  # fmt: skip
  note = (
    "Test Dice, mean over draws and in them over runs. Sustained is the mean of the last third of "
    "the checkpoints of all phases, so of a short last phase the end of the one before too; steps "
    "are of all phases; gains with 95% intervals; worst run is the lowest sustained gain of a "
    "single run; pairs right is the used judge's on validation."
  )
  return Table(f"Recipes: {group.title}", note, head, [row for _, row in sorted(rows)])


def pair_table(group: study_groups.Group) -> Table:
  """A row each two arms that share runs; points of an axis of numbers only where it is LENGTH."""
  rows = []
  plain = [
    label
    for label, records in group.arms.items()
    if study_groups.numbers(records[0]["axes"]) <= {study_groups.LENGTH}
  ]
  for first, second in itertools.combinations(sorted(plain), 2):
    arms = group.arms[first], group.arms[second]
    found, last = (study_groups.difference(*arms, what) for what in ("sustained", "last"))
    if found is not None:
      row = [first, second, " / ".join(map(_steps, arms)), str(found.num_runs)]
      row += [_with_interval(found), found.claim, _with_interval(last), last.claim]
      rows.append((-abs(found.mean), row))
  head = ["recipe", "against", "steps", "shared runs", "difference, sustained", "the first is",
          "difference, last", "the first is"]  # fmt: skip
  note = (
    "Over the runs that both have, on the same bases and cases; 95% intervals. What a phase adds "
    "to the one before is seen at the last step: sustained is in part of checkpoints before it."
  )
  return Table(f"Differences: {group.title}", note, head, [row for _, row in sorted(rows)])


def chosen_table(group: study_groups.Group) -> Table:
  """The main table of what validation chose."""
  table = main_table(study_groups.chosen(group))
  note = "Of each recipe the point of its axes of numbers that is best on validation. " + table.note
  return table._replace(title=f"Chosen on validation: {group.title}", note=note)


def chosen_pair_table(group: study_groups.Group) -> Table:
  """Differences of what validation chose, each named without its axes."""
  arms = study_groups.chosen(group).arms
  table = pair_table(group._replace(
    arms={label: [{**record, "axes": {}} for record in records] for label, records in arms.items()}
  ))  # fmt: skip
  return table._replace(title=f"Differences, each chosen on validation: {group.title}")


def stability_table(group: study_groups.Group) -> Table:
  """A row a recipe and axis of numbers: its best and its worst value."""
  rows = []
  for (recipe, axis), points in study_groups.axis_points(group).items():
    values = sorted(points, key=lambda value: points[value].mean)
    worst, best = values[0], values[-1]
    spread = points[best].mean - points[worst].mean
    row = [recipe, axis, str(len(points))]
    for value in (best, worst):
      row += [f"{value:g}", _with_interval(points[value])]
    rows.append([*row, report_tables.show(spread)])
  head = ["recipe", "axis", "values", "best at", "its gain", "worst at", "its gain", "spread"]
  note = (
    "Sustained gain over the base at each value of an axis, over the runs that all of them have; "
    "the test split chooses nothing here."
  )
  return Table(f"Stability: {group.title}", note, head, rows)


def tuning_table(group: study_groups.Group) -> Table:
  """A row an arm of tuning, by validation alone; the best of each recipe is marked."""
  rows = []
  for label, records in group.arms.items():
    held = [record["val"]["last_third_mean"] for record in records]
    bases = [record["base"]["val"] for record in records]
    last = _mean(record["val"]["last"] for record in records)
    length = records[0]["recipe"], _steps(records)
    rows.append((length, float(np.mean(held)), label, len(records), bases, last))
  best = {length: max(row[1] for row in rows if row[0] == length) for length, *_ in rows}
  shown = [
    [label, length[1], str(count), _mean(bases), report_tables.show(held), last,
     "best" if held == best[length] else ""]
    for length, held, label, count, bases, last in sorted(rows, key=lambda row: (row[0], -row[1]))
  ]  # fmt: skip
  head = ["recipe", "steps", "runs", "base", "sustained", "last", "of its length"]
  return Table(f"Tuning: {group.title}", "Validation Dice; test was not looked at.", head, shown)


def stop_table(group: study_groups.Group) -> Table:
  """A row a rule that says where to stop, over the runs that have what every rule reads."""
  found: dict[str, list[tuple[float, float, float, bool]]] = {}
  for record in itertools.chain(*group.arms.values()):
    best, base = max(record["curve"]["test"]), record["base"]["test"]
    for rule, dice, is_base in study_stops.stops(record):
      found.setdefault(rule, []).append((dice, base, best, is_base))
  rows = []
  for rule, runs in found.items():  # the label-free one by its limit, which runs may set apart
    dice, base, best, is_base = map(np.array, zip(*runs, strict=True))
    row = [
      rule, str(len(runs)), _SIGNED(float(np.mean(dice - base))),
      _SIGNED(float(np.min(dice - base))), str(np.sum(dice < base - _WORSE)),
      _mean(best - dice), str(np.sum(is_base)),
    ]  # fmt: skip
    rows.append(row)
  head = [
    "rule", "runs", "gain", "worst run", f"worse than the base by over {_WORSE:g}",
    "behind the oracle", "the base delivered",
  ]  # fmt: skip
  note = (
    "Test Dice of the checkpoint that a rule takes, less the base's; mean over the runs, of any "
    "recipe and judge, in which all that the rules read was measured. The label-free rule: "
    f"{label_free.RULE}."
  )
  return Table(f"Where to stop: {group.title}", note, head, rows)


def all_tables(records: Iterable[Record]) -> list[Table]:
  """Every table that has a row."""
  records = list(records)
  made = [(main_table, False), (pair_table, False), (chosen_table, False),
          (chosen_pair_table, False), (stability_table, False), (stop_table, False),
          (tuning_table, True)]  # fmt: skip
  found = [
    make(group) for make, tuning in made for group in study_groups.groups(records, tuning=tuning)
  ]
  return [table for table in found if table.rows]


def markdown(title: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
  """The tables as a Markdown page."""
  lines = [f"# {title}", "", *itertools.chain(*((note, "") for note in notes))]
  for table in tables:
    lines += [f"## {table.title}", "", table.note, "", _line(table.head)]
    lines += [_line(["---"] * len(table.head)), *map(_line, table.rows), ""]
  return "\n".join(lines)


def csv_text(records: Iterable[Record]) -> str:
  """Every gain and difference as numbers, a line each; `against` is 'base' or another recipe."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(
    ["data", "budget", "recipe", "against", "of", "mean", "low", "high", "runs", "claim"]
  )
  for group in study_groups.groups(records):
    rows = [
      (label, "base", what, study_groups.gain(runs, what))
      for label, runs in group.arms.items()
      for what in ("sustained", "last")
    ]
    rows += [
      (first, second, what, study_groups.difference(group.arms[first], group.arms[second], what))
      for first, second in itertools.combinations(sorted(group.arms), 2)
      for what in ("sustained", "last")
    ]
    for *names, found in rows:
      if found is not None:
        numbers = [f"{value:.5f}" for value in (found.mean, found.low, found.high)]
        writer.writerow([group.data, group.budget, *names, *numbers, found.num_runs, found.claim])
  return text.getvalue()


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _mean(values: Iterable[float]) -> str:
  return report_tables.show(float(np.mean(list(values))))


def _by_draws(records: Sequence[Record], value: Callable[[Record], float]) -> str:
  return report_tables.show(study_groups.mean(records, value))


def _steps(records: Sequence[Record]) -> str:
  return ", ".join(map(str, sorted({record["steps"] for record in records})))


def _with_interval(found: bootstrap.Interval) -> str:
  return f"{_SIGNED(found.mean)} ({_bound(found.low)} to {_bound(found.high)})"


def _bound(value: float) -> str:
  """Four digits where three would hide on which side of zero it is."""
  return _SIGNED(value) if round(value, 3) else _SIGNED(value, 4)


def _judged(records: Sequence[Record]) -> str:
  known = map(study_groups.pairs_right, records)
  known = [value for value in known if value is not None]
  return f"{np.mean(known):.2f}" if known else ""


def _delivered(records: Sequence[Record]) -> str:
  """Mean gain of the delivered models over their bases, and the worst."""
  known = [record for record in records if _delivered_gain(record) is not None]
  if not known:
    return ""
  mean = study_groups.mean(known, _delivered_gain)
  return f"{_SIGNED(mean)}, worst {_SIGNED(min(map(_delivered_gain, known)))}"


def _delivered_gain(record: Record) -> float | None:
  test = (record.get("delivered") or {}).get("test")
  dice = test.get("dice") if isinstance(test, Mapping) else None
  return None if dice is None else dice - record["base"]["test"]
