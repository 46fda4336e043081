"""The charts of the report: Dice over steps, and the curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax.report import figures
from rndpo_jax.training import metric_writer


def curve_chart(results: Mapping) -> str | None:
  """Dice on validation and test over steps, the base as dashed lines, peak and final marked.

  None if there are neither validation nor test cases.
  """
  curve = results["curve"]
  steps = [point["step"] for point in curve]
  val, test = ([point[key] for point in curve] for key in ("val_dice", "test_dice"))
  ends = [steps[0], steps[-1]]
  dashed = {"linestyle": "--", "linewidth": 1.2}
  series = {}
  for name, dice, color in (("test", test, figures.BLUE), ("validation", val, figures.ORANGE)):
    if dice[0] is not None:
      series[name] = (steps, dice, {"color": color, "marker": "."})
      series[f"{name}, base"] = (ends, [dice[0]] * 2, {"color": color, **dashed})
  if not series:
    return None
  marks = _marks(steps, test) if "test" in series else []
  return figures.lines(series, ylabel="mean Dice over cases", marks=marks, wide=True)


def _marks(steps, test) -> list[tuple]:
  """Of the peak and the last point of test Dice."""
  peak = 1 + int(np.argmax(test[1:]))
  last = len(test) - 1
  marks = [(steps[last], test[last], f"final {test[last]:.3f}", figures.GREEN)]
  if peak != last:
    marks.append((steps[peak], test[peak], f"peak {test[peak]:.3f}", figures.RED))
  else:
    marks[0] = (steps[last], test[last], f"peak and final {test[last]:.3f}", figures.GREEN)
  return marks


def harm_chart(harm: Mapping) -> str | None:
  """Share of the gradient that comes from wrong pairs, over steps; None without pairs."""
  if not harm["num_pairs"]:
    return None
  steps = [point["step"] for point in harm["curve"]]
  kinds = {"RN-DPO": ("region", figures.BLUE), "DPO at matched beta": ("none", figures.RED)}
  series = {
    label: (
      steps,
      [np.nan if (x := point[kind]["wrong_mass"]) is None else x for point in harm["curve"]],
      {"color": color, "marker": "."},
    )
    for label, (kind, color) in kinds.items()
  }
  dashed = {"color": figures.GREY, "linestyle": "--", "linewidth": 1.2}
  series["share of pairs that are wrong"] = (
    [steps[0], steps[-1]],
    [harm["wrong_share"]] * 2,
    dashed,
  )
  return figures.lines(series, ylabel="share of gradient from wrong pairs")


def training_charts(
  workdir: epath.Path, terms: Sequence[str], folder: str = "finetune"
) -> list[dict[str, str]]:
  """Charts of base training and of the last phase of fine-tuning, from their `metrics.jsonl`.

  Args:
    workdir: of the job.
    terms: of that phase.
    folder: of that phase, in `workdir`.
  """
  tuned, checked = (_rows(workdir / folder, kind) for kind in ("train", "val"))
  blue, red, orange = figures.BLUE, figures.RED, figures.ORANGE
  start = f"The loss: {' + '.join(terms)}, by weight."
  if list(terms) == ["preference"]:
    start = "Preference loss; ln 2 = 0.693 at the start of dpo and rn_dpo."
  spread = {"h_p5": figures.GREY, "h_p50": blue, "h_p95": figures.GREY}
  ratios = {"chosen_log_ratio": blue, "rejected_log_ratio": red}
  shares = dict(zip(_shares(tuned), figures.CLASS_COLORS, strict=False))
  base = _rows(workdir / "base", "val")
  charts = [
    _chart(tuned, {"loss": blue}, "loss", start),
    _chart(tuned, {"accuracy": blue}, "share", "Preference accuracy: pairs with h > 0."),
    _chart(tuned, {"h_mean": blue}, "mean h (nats)", "Mean h, the margin gained."),
    _chart(tuned, spread, "h (nats)", "Spread of h over pairs: 5th, 50th, 95th percentile."),
    _chart(
      tuned,
      ratios,
      "log-ratio (nats)",
      "Change of log-probability since the reference, of chosen and rejected masks, on the pixels "
      "where they differ.",
    ),
    _chart(
      tuned,
      shares,
      "share of gradient",
      "Share of the gradient's mass by region size: pairs below so many pixels (and not below the "
      "size before).",
    ),
    _chart(
      checked,
      {"val_kl": blue, "val_entropy": orange},
      "nats a pixel",
      "Validation images: KL divergence from the network that this fine-tuning started from, and "
      "entropy of the prediction.",
    ),
    _chart(base, {"val_dice": orange}, "Dice", "Base: validation Dice on the model's grid."),
  ]
  return [chart for chart in charts if chart]


def _shares(rows) -> list[str]:
  """Names of the gradient shares that are ever above zero, by region size."""
  names = [name for name in rows[0] if name.startswith("gradient_share_")] if rows else []
  used = [name for name in names if any(row[name] > 0 for row in rows)]
  return sorted(used, key=lambda name: float(name.rsplit("_", 1)[1]))


def _chart(rows, keys: Mapping[str, str], ylabel: str, caption: str) -> dict[str, str] | None:
  if not rows or not keys or any(key not in row for row in rows for key in keys):
    return None
  steps = [row["step"] for row in rows]
  series = {
    key.replace("_", " "): (steps, [float(row[key]) for row in rows], {"color": color})
    for key, color in keys.items()
  }
  if len(rows) == 1:
    for _, _, options in series.values():
      options["marker"] = "o"
  image = figures.lines(series, ylabel=ylabel)
  return {"image": image, "name": " and ".join(series), "caption": caption}


def _rows(directory: epath.Path, kind: str) -> list[dict[str, Any]]:
  if not (directory / "metrics.jsonl").exists():
    return []
  return metric_writer.read_rows(directory, kind)
