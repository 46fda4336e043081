"""The result table that a run ends with, in the terminal."""

from __future__ import annotations

import os

from etils import epath

from rndpo_jax.report import tables
from rndpo_jax.runtime import files

_ROWS = (
  ("base", "base"),
  ("fine-tuned (last)", "finetuned"),
  ("selected on val", "selected"),
  ("delivered", "delivered"),
)


def text(workdir: os.PathLike) -> str:
  """The table, from `results.json` and the mining manifest of a finished job.

  Raises:
    errors.FileError: if one of them is missing or damaged.
  """
  results = files.read_json(epath.Path(workdir) / "results.json", base=dict, finetuned=dict)
  lines = [f"{'':24}{'val Dice':>10}{'test Dice':>11}"]
  for label, key in _ROWS:
    scores = results[key]
    if key == "selected" and scores["step"] is None:
      continue
    note = ""
    if key == "delivered":
      note = "  <- the base" if scores["is_base"] else f"  <- step {scores['step']}"
    val, test = (tables.show(scores[split]["dice"], 4) for split in ("val", "test"))
    lines.append(f"{label:24}{val:>10}{test:>11}{note}")
  for name, judge in results["judges"].items():
    shown = tables.show(judge["pair_accuracy"])
    where = f"on {judge['split']}" if judge["split"] else "(there are no validation cases)"
    used = "  <- used" if name == results["judge"] and results["pairs"]["count"] else ""
    lines.append(f"judge {name:18}{shown:>10} of pairs right {where}{used}")
  pairs = results["pairs"]
  size = files.read_json(epath.Path(workdir) / "pairs" / "manifest.json")["bytes_per_pair"]
  if pairs["count"]:
    lines.append(
      f"{pairs['count']} pairs of {size:.0f} bytes, {pairs['dropped_identical']} dropped as "
      f"identical, median region size {pairs['region_size']['p50']:.0f} pixels"
    )
  lines.append(results["delivered"]["reason"])
  lines += [f"warning: {text}" for text in results["warnings"]]
  return "\n".join(lines)
