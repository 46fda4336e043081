"""Rows of metrics: what is not finite, and what was lost of them."""

import json
import math

import pytest

from rndpo_jax import errors
from rndpo_jax.training import metric_writer


def open_writer(directory):
  writer = metric_writer.MetricWriter(directory)
  writer.resume(0)
  return writer


def test_metrics_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
  rows = open_writer(tmp_path)
  rows.add({"step": 1, "kind": "train", "h_p5": math.nan, "loss": 0.5, "h_p95": math.inf})
  rows.add({"step": 2, "kind": "val", "val_dice": 0.25})
  rows.close()

  def refuse(name):
    raise ValueError(name)

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  first = json.loads(lines[0], parse_constant=refuse)
  assert first == {"step": 1, "kind": "train", "h_p5": None, "loss": 0.5, "h_p95": None}
  (read,) = metric_writer.read_rows(tmp_path, "train")
  assert math.isnan(read["h_p5"]) and math.isnan(read["h_p95"]) and read["loss"] == 0.5
  assert rows.of_kind("val") == [{"step": 2, "kind": "val", "val_dice": 0.25}]


def test_rows_that_lack_a_validation_are_refused(tmp_path):
  rows = open_writer(tmp_path)
  for step in (20, 40):
    rows.add_validation(step, {"val_dice": 0.5})
  rows.close()

  def check(start, steps):
    rows = metric_writer.MetricWriter(tmp_path)
    rows.resume(start, steps)
    rows.close()

  check(40, [20, 40])
  with pytest.raises(
    errors.FileError, match=r"steps \[20, 40\], expected \[10, 20, 40\]; .*delete"
  ):
    check(40, [10, 20, 40])
  check(30, [20])  # the later one is made again, and gone from the file
  with pytest.raises(
    errors.FileError, match=r"metrics.jsonl: holds .* \[20\], expected \[20, 40\]"
  ):
    check(40, [20, 40])


@pytest.mark.parametrize("line", ['{"step": 3, "ki', "[1, 2]", '{"kind": "val"}', "3"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
  good = '{"step": 1, "kind": "val", "val_dice": 0.5}'
  (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n")
  for read in (
    lambda: metric_writer.read_rows(tmp_path, "val"),
    lambda: metric_writer.MetricWriter(tmp_path).resume(9),
  ):
    with pytest.raises(errors.FileError, match=f"line 2 is no row .*delete the folder {tmp_path}"):
      read()
