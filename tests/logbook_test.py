"""Rows of metrics: what is not finite."""

import json
import math

from rndpo_jax import logbook


def test_metrics_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
  rows = logbook.Rows(tmp_path, 0)
  rows.add({"step": 1, "kind": "train", "h_p5": math.nan, "loss": 0.5, "h_p95": math.inf})
  rows.add({"step": 2, "kind": "val", "val_dice": 0.25})
  rows.close()

  def refuse(name):
    raise ValueError(name)

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  first = json.loads(lines[0], parse_constant=refuse)
  assert first == {"step": 1, "kind": "train", "h_p5": None, "loss": 0.5, "h_p95": None}
  (read,) = logbook.read_rows(tmp_path, "train")
  assert math.isnan(read["h_p5"]) and math.isnan(read["h_p95"]) and read["loss"] == 0.5
  assert rows.of_kind("val") == [{"step": 2, "kind": "val", "val_dice": 0.25}]
