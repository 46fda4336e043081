"""Rows of metrics: `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rndpo_jax import files, processes


def read_rows(directory: os.PathLike, kind: str) -> list[dict[str, Any]]:
  """Rows of `metrics.jsonl` of one kind, "train" or "val"; what is null there is NaN."""
  path = epath.Path(directory) / "metrics.jsonl"
  return _of_kind(path.read_text().splitlines(), kind)


def _of_kind(lines: list[str], kind: str) -> list[dict[str, Any]]:
  rows = [row for row in map(json.loads, lines) if row["kind"] == kind]
  return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


class NotFiniteError(ArithmeticError):
  """A loss or gradient norm that is no finite number; the message names the step."""


class Rows:
  """Rows of metrics.jsonl and TensorBoard, first dropping those that a resumed run repeats.

  Rows are kept here until `write`, which writes the file whole: object stores cannot append. A
  state must not count as whole before its rows are written, so call it before saving one.

  TensorBoard's events are written here and now. SummaryWriter would leave them to a thread: on a
  full disk that dies, and the next rows wait for it forever.

  Process 0 has rows and writes; in the others every method does nothing.
  """

  def __init__(self, directory: epath.Path, start: int):
    self._lines: list[str] = []
    self._writes = processes.is_first()
    if not self._writes:
      return
    self._path = directory / "metrics.jsonl"
    if self._path.exists():
      for line in self._path.read_text().splitlines(keepends=True):
        # Half a line at the end is of a version that appended, and was killed.
        if line.endswith("\n") and json.loads(line)["step"] <= start:
          self._lines.append(line.rstrip())
    (directory / "tensorboard").mkdir(exist_ok=True)
    self._events = EventsWriter(str(directory / "tensorboard" / "events"))
    self._add_event(start + 1, session_log=SessionLog(status=SessionLog.START))  # drops later steps

  def add(self, row: dict[str, Any]) -> None:
    if not self._writes:
      return
    # JSON has no NaN, as the quantiles of a batch are in which no pair informs.
    known = {
      name: None if isinstance(value, float) and not math.isfinite(value) else value
      for name, value in row.items()
    }
    self._lines.append(json.dumps(known, allow_nan=False))
    for name, value in row.items():
      if name not in ("step", "kind"):
        self._add_event(row["step"], summary=summary.scalar(f"{row['kind']}/{name}", value))

  def add_steps(self, steps: list[tuple[int, dict[str, jax.Array]]], every: int) -> None:
    """Looks at the metrics of training steps, and adds those of every `every`-th.

    Raises:
      NotFiniteError: at the first loss or gradient norm that is not finite, on every process.
    """
    for step, aux in jax.device_get(steps):
      if not math.isfinite(aux["loss"]) or not math.isfinite(aux["grad_norm"]):
        raise NotFiniteError(f"loss {aux['loss']}, gradient norm {aux['grad_norm']} at step {step}")
      if step % every == 0:
        self.add({"step": step, "kind": "train", **{k: float(v) for k, v in sorted(aux.items())}})

  def add_validation(self, step: int, figures: dict[str, float]) -> None:
    self.add({"step": step, "kind": "val", **figures})

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """As `read_rows`, of all that were added."""
    return _of_kind(self._lines, kind)

  def write(self) -> None:
    """Brings all that were added to the disk."""
    if not self._writes:
      return
    files.write_text(self._path, "".join(f"{line}\n" for line in self._lines))
    self._events.flush()

  def _add_event(self, step: int, **content) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **content))

  def close(self) -> None:
    if not self._writes:
      return
    try:
      self.write()
    finally:
      self._events.close()
