"""`scores.csv`: which cases to look at first, without truth."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from rndpo_jax.evaluation.results import quoted
from rndpo_jax.predict.programs import SCORES

FILE = "scores.csv"


def of_case(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
  """Scores of a case from those of its slices, each counted by its weight.

  So slices in which neither the mask nor a proposal sees anything, and which score 1, say nothing;
  if all are such, the plain mean is taken.

  Args:
    parts: "agreement", "confidence", "entropy" and "weight", f[n] each.
  """
  weight = np.asarray(parts["weight"], np.float64)
  weight = weight if weight.sum() > 0 else np.ones_like(weight)
  return {name: float(np.average(parts[name], weights=weight)) for name in SCORES}


def text(rows: Sequence[Mapping]) -> str:
  """The table, in the order of `rows`.

  Args:
    rows: what `case_files.write` says of each case.

  Returns:
    Columns case_id, mask (its file), rank (1 for the lowest agreement, then the lowest confidence:
    look at it first), agreement, confidence, entropy, foreground_pixels. The agreement is empty
    where an older version left it out, and counts for nothing in the rank.
  """
  keys = [(row["scores"].get("agreement", 0.0), row["scores"]["confidence"]) for row in rows]
  order = sorted(range(len(rows)), key=lambda i: (*keys[i], i))
  rank = {place: n for n, place in enumerate(order, 1)}
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(["case_id", "mask", "rank", *SCORES, "foreground_pixels"])
  for place, row in enumerate(rows):
    values = [f"{row['scores'][name]:.6f}" if name in row["scores"] else "" for name in SCORES]
    names = (quoted(row["case_id"]), quoted(row["mask"]))
    writer.writerow([*names, rank[place], *values, row["foreground_pixels"]])
  return out.getvalue()
