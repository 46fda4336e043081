"""Rows of metrics: what is not finite, and what was lost of them."""

import errno
import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

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


def events(directory):
  """Events of a TensorBoard file: a length u64, checksum u32, bytes, checksum u32 each."""
  (path,) = directory.glob("events.out.tfevents.*")
  content, found = path.read_bytes(), []
  while content:
    length = int.from_bytes(content[:8], "little")
    found.append(Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  return found


def test_tensorboard_gets_every_figure_and_is_told_where_a_run_goes_on(tmp_path):
  rows = metric_writer.MetricWriter(tmp_path)
  rows.resume(4)
  rows.add({"step": 6, "kind": "train", "loss": 0.25, "accuracy": 0.5})
  rows.write()
  (_, goes_on, *figures) = events(tmp_path / "tensorboard")  # before the run ends, too
  assert goes_on.step == 5 and goes_on.session_log.status == goes_on.session_log.START
  shown = {(e.step, v.tag): v.simple_value for e in figures for v in e.summary.value}
  assert shown == {(6, "train/loss"): 0.25, (6, "train/accuracy"): 0.5}
  rows.close()


def test_a_full_disk_under_tensorboard_stops_the_training_and_does_not_hang_it(
  tmp_path, monkeypatch
):
  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  rows = metric_writer.MetricWriter(tmp_path)
  rows.resume(0)
  with monkeypatch.context() as patch:
    patch.setattr(metric_writer.EventsWriter, "flush", full)
    with pytest.raises(OSError, match="No space left"):
      for step in range(100):
        rows.add({"step": step, "kind": "train", "loss": 0.25})
        rows.write()
  rows.close()
