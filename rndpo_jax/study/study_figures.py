"""The figures of a study, as `data:` addresses: curves, gains, gains over an axis and a judge."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rndpo_jax.report import figures
from rndpo_jax.study import bootstrap, study_groups

_COLORS = (*figures.CLASS_COLORS[:4], figures.BLUE, figures.RED, figures.GREY)
_DASHES = ("-", "--", ":", "-.")
_STYLE = {
  "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
  "grid.color": "#e5e7eb", "axes.axisbelow": True, "legend.frameon": False,
  "svg.hashsalt": "rndpo_jax",
}  # fmt: skip


def all_figures(groups: Sequence[study_groups.Group]) -> list[dict[str, str]]:
  """{"title", "note", "image"} of each figure that the records can give."""
  found = []
  for group in groups:
    found.append(_entry(
      f"Curves: {group.title}", "Test Dice above that of the run's base: mean over runs, and from "
      "the lowest run to the highest.", curves(group),
    ))  # fmt: skip
    found.append(_entry(
      f"Gains: {group.title}", "Sustained gain over the base, with 95% intervals.", gains(group),
    ))  # fmt: skip
    for axis, points in _by_axis(group).items():
      found.append(_entry(
        f"Stability over {axis}: {group.title}",
        "Sustained gain over the base, with 95% intervals.",
        over_axis(axis, points, _styles(group)),
      ))  # fmt: skip
    if (image := over_judge(group)) is not None:
      found.append(_entry(
        f"Gain over the judge: {group.title}", "A point a run: sustained gain over the base, and "
        "the share of validation pairs that the used judge gets right.", image,
      ))  # fmt: skip
  return found


def curves(group: study_groups.Group) -> str:
  """Gain on test over steps, a line an arm without axes (with them where there is no other)."""
  arms = {k: v for k, v in group.arms.items() if not v[0]["axes"]} or group.arms
  styles = _styles(group)

  def draw(axes):
    for label, records in arms.items():
      steps = records[0]["curve"]["step"]
      rows = [r["curve"]["test"] for r in records if r["curve"]["step"] == steps]
      rows = np.array([np.subtract(row, row[0]) for row in rows])
      style = styles[label]
      axes.plot(steps, rows.mean(axis=0), label=label, linewidth=1.8, **style)
      axes.fill_between(
        steps, rows.min(axis=0), rows.max(axis=0), color=style["color"], alpha=0.1, linewidth=0
      )
    axes.axhline(0.0, color=figures.GREY, linewidth=1)
    axes.set_xlabel("fine-tuning step")
    axes.set_ylabel("gain of test Dice")

  return _drawn(draw, 5.2)


def gains(group: study_groups.Group) -> str:
  """A row an arm, best first."""
  found = {label: study_groups.gain(records) for label, records in group.arms.items()}
  rows = [(label, *found[label][:3]) for label in sorted(found, key=lambda k: -found[k].mean)]
  return figures.intervals(rows, chance=0.0, label="sustained gain of test Dice")


def over_axis(axis: str, points: Mapping[str, Mapping[float, bootstrap.Interval]], styles) -> str:
  """Gains with intervals over the values of an axis, a line a recipe."""

  def draw(axes):
    for recipe, found in points.items():
      values, style = list(found), styles[recipe]
      means, lows, highs = (
        np.array([getattr(found[value], name) for value in values])
        for name in ("mean", "low", "high")
      )
      axes.errorbar(
        values, means, [means - lows, highs - means], label=recipe, marker="o", capsize=3, **style
      )
    axes.axhline(0.0, color=figures.GREY, linewidth=1)
    if min(value for found in points.values() for value in found) > 0:
      axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel("sustained gain of test Dice")

  return _drawn(draw, 4.2)


def over_judge(group: study_groups.Group) -> str | None:
  """A point a run; None if no judge's accuracy is known."""
  points: dict[str, list[tuple[float, float]]] = {}
  for records in group.arms.values():
    for record in records:
      accuracy = study_groups.pairs_right(record)
      if accuracy is not None:
        change = record["test"]["last_third_mean"] - record["base"]["test"]
        points.setdefault(record["recipe"], []).append((accuracy, change))
  if not points:
    return None
  styles = _styles(group)

  def draw(axes):
    for recipe, found in points.items():
      color = styles[recipe]["color"]
      axes.plot(*zip(*found, strict=True), "o", label=recipe, color=color, alpha=0.7)
    axes.axhline(0.0, color=figures.GREY, linewidth=1)
    axes.set_xlabel("pairs right, share on validation")
    axes.set_ylabel("sustained gain of test Dice")

  return _drawn(draw, 4.2)


def _by_axis(group) -> dict[str, dict[str, dict[float, bootstrap.Interval]]]:
  found: dict[str, dict] = {}
  for (recipe, axis), points in study_groups.axis_points(group).items():
    found.setdefault(axis, {})[recipe] = points
  return found


def _entry(title: str, note: str, image: str) -> dict[str, str]:
  return {"title": title, "note": note, "image": image}


def _styles(group: study_groups.Group) -> dict[str, dict[str, str]]:
  """Label -> line: a colour a recipe, the same in every figure, and a dash for each of its arms."""
  styles = {}
  recipes = sorted({records[0]["recipe"] for records in group.arms.values()})
  for number, recipe in enumerate(recipes):
    arms = {label for label, records in group.arms.items() if records[0]["recipe"] == recipe}
    arms |= {label for label, _ in study_groups.axis_records(group)}
    own = sorted(label for label in arms if label.partition(",")[0] == recipe)
    for place, label in enumerate(dict.fromkeys([recipe, *own])):
      dash = _DASHES[(number // len(_COLORS) + place) % len(_DASHES)]
      styles[label] = {"color": _COLORS[number % len(_COLORS)], "linestyle": dash}
  return styles


def _drawn(draw: Callable, height: float) -> str:
  """An SVG of one pair of axes, its legend at the right."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(8.2, height), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
  return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
