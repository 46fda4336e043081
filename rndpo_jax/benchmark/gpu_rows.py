"""Rows of the GPU report: one JSON object a line, and the table made of them.

Kinds of rows: "machine" (versions, devices), "part" (started, and how it ended), "figure" (one
number with its goal), "timing" (a row of `timing.rows`). Of a part that ran twice the later run
counts.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = (
  ("variant", "variant", 1.0),
  ("compile s", "compile_seconds", 1.0),
  ("median ms", "seconds_median", 1e3),
  ("p25", "seconds_p25", 1e3),
  ("p75", "seconds_p75", 1e3),
  ("images/s", "images_per_second", 1.0),
  ("GB/s", "bandwidth_bytes_per_second", 1e-9),
  ("of copy", "fraction_of_copy_bandwidth", 1.0),
  ("memory MB", "peak_memory_bytes", 1e-6),
  ("relative time", "time_over_baseline", 1.0),
)


def write(path: pathlib.Path, kind: str, **content: Any) -> None:
  """Appends one row, at once and whole."""
  line = json.dumps({"kind": kind, **content}) + "\n"
  with path.open("a") as file:
    file.write(line)
    file.flush()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows; half a line, of a part that was killed, is left out."""
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue
  return rows


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file that appears by rename."""
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(text)
  os.replace(partial, path)


def meets(value: float, goal: tuple[str, float]) -> bool:
  """Whether a figure reaches its goal, (sign, value) with a sign of "<=", ">=" and "is"."""
  sign, limit = goal
  return {"<=": value <= limit, ">=": value >= limit, "is": value == limit}[sign]


def latest(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  """Part -> the rows of its latest run, in the order in which parts first ran."""
  parts: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    if row["kind"] == "part" and row["status"] == "started":
      parts[row["part"]] = []
    if "part" in row:
      parts.setdefault(row["part"], []).append(row)
  return parts


def describe(rows: Iterable[Mapping[str, Any]], part: str) -> list[str]:
  """One line for each figure of a part."""
  lines = []
  for row in latest(rows).get(part, []):
    if row["kind"] == "figure":
      goal = f", goal {_goal(row)}: {met(row)}" if row["goal"] else ""
      lines.append(f"{row['figure']} ({row['setting']}): {_value(row)}{goal}")
  return lines


def met(row: Mapping[str, Any]) -> str:
  """What stands beside a goal."""
  if row["met"] is None:
    return ""
  return "met" if row["met"] else "not met"


def _value(row: Mapping[str, Any]) -> str:
  note = f" ({row['note']})" if row["note"] else ""
  if row["value"] is None:
    return f"-{note}"
  return f"{_number(row['value'])} {row['unit']}".rstrip() + note


def _goal(row: Mapping[str, Any]) -> str:
  return f"{row['goal'][0]} {_number(row['goal'][1])}" if row["goal"] else ""


def _number(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
  return str(value)


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
  """The whole table."""
  rows = list(rows)
  machine = [row for row in rows if row["kind"] == "machine"][-1]
  versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
  lines = ["# GPU report", ""]
  if machine["rehearsed"]:
    lines += [
      "**Rehearsed, not measured: tiny shapes on the CPU.** No figure here says anything.",
      "",
    ]
  lines += [
    f"Device: {machine['device_kind']} (x {machine['num_devices']}); {machine['num_cores']} cores "
    f"of {machine['processor']}; {versions}.",
    "",
  ]
  parts = latest(rows)
  ends = {name: _end(some) for name, some in parts.items()}
  lines += _table(
    ("part", "what", "ended", "seconds"),
    [
      (name, end.get("what", ""), _status(end), _number(end.get("seconds", "")))
      for name, end in ends.items()
    ],
  )
  figures = [row for some in parts.values() for row in some if row["kind"] == "figure"]
  lines += ["## Figures and goals", ""]
  lines += _table(
    ("part", "figure", "setting", "value", "goal", ""),
    [(r["part"], r["figure"], r["setting"], _value(r), _goal(r), met(r)) for r in figures],
  )
  for name, end in ends.items():
    if _status(end) in ("failed", "timed out"):
      lines += [
        f"## {name}: {end['status']}, its last lines",
        "",
        "```",
        *end["last_lines"],
        "```",
        "",
      ]
  for name, some in parts.items():
    lines += _timings(name, [row for row in some if row["kind"] == "timing"])
  return "\n".join(lines)


def _end(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
  return [row for row in rows if row["kind"] == "part"][-1]


def _status(end: Mapping[str, Any]) -> str:
  """Of a part that started and has no other row: the report was cut off."""
  return "cut off" if end["status"] == "started" else end["status"]


def _timings(part: str, rows: list[Mapping[str, Any]]) -> list[str]:
  """A table for each setting of a part."""
  by_setting: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    by_setting.setdefault(row["setting"], []).append(row)
  lines = []
  for setting, some in by_setting.items():
    lines += [f"## {part}: {setting}", ""]
    lines += _table([title for title, _, _ in COLUMNS], [_cells(row["row"]) for row in some])
  return lines


def _cells(row: Mapping[str, Any]) -> list[str]:
  if row["status"] != "ok":
    return [f"{row['variant']}: {row['status']}, {row['reason']}", *["-"] * (len(COLUMNS) - 1)]
  cells = [row["variant"]]
  for _, key, scale in COLUMNS[1:]:
    cells.append("-" if row[key] is None else _number(float(row[key] * scale)))
  return cells


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(list(head))]
  lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
  return [*lines, ""]
