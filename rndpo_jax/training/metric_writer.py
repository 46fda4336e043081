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

from rndpo_jax import errors
from rndpo_jax.runtime import files, multihost


def read_rows(directory: os.PathLike, kind: str) -> list[dict[str, Any]]:
  """Rows of `metrics.jsonl` of one kind, "train" or "val"; what is null there is NaN.

  Raises:
    files.FileError: if a line is no JSON object with a step and a kind.
  """
  path = epath.Path(directory) / "metrics.jsonl"
  return _of_kind(_parse(path, path.read_text().splitlines()), kind)


def _parse(path: epath.Path, lines: list[str]) -> list[dict[str, Any]]:
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      rows.append({"step": int(row["step"]), "kind": str(row["kind"]), **row})
    except (ValueError, KeyError, TypeError) as error:
      raise errors.FileError(
        f"{path}: line {number} is no row of metrics ({error}); {_delete(path)}"
      ) from error
  return rows


def _delete(path: epath.Path) -> str:
  return (
    f"delete the folder {path.parent} and run the same command again: its training starts again"
  )


def _of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
  rows = [row for row in rows if row["kind"] == kind]
  return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


class NotFiniteError(ArithmeticError):
  """A loss or gradient norm that is no finite number; the message names the step."""


class MetricWriter:
  """Rows of metrics.jsonl and TensorBoard, of one training.

  Rows are kept here until `write`, which writes the file whole: object stores cannot append. A
  state must not count as whole before its rows are written, so call it before saving one.

  TensorBoard's events are written here and now. SummaryWriter would leave them to a thread: on a
  full disk that dies, and the next rows wait for it forever.

  Process 0 has rows and writes; in the others every method does nothing.
  """

  def __init__(self, directory: os.PathLike):
    """For a folder that is there; `resume` comes before all else."""
    self._directory = epath.Path(directory)
    self._path = self._directory / "metrics.jsonl"
    self._lines: list[str] = []
    self._writes = multihost.is_first()

  def resume(self, start: int, validated: list[int] | None = None) -> None:
    """Takes up the rows there, dropping those that a run from step `start` repeats.

    Args:
      start: the step that training goes on from.
      validated: the steps up to it that were validated: a row that is lost may have been the best.
        None if that is not looked at.

    Raises:
      files.FileError: if a line cannot be read, or a validation is missing, naming the file and
        what to delete.
    """
    if not self._writes:
      return
    if self._path.exists():
      # Half a line at the end is of a version that appended, and was killed.
      whole = self._path.read_text().splitlines(keepends=True)
      lines = [line.rstrip() for line in whole if line.endswith("\n")]
      parsed = zip(lines, _parse(self._path, lines), strict=True)
      self._lines = [line for line, row in parsed if row["step"] <= start]
    found = [row["step"] for row in self.of_kind("val")]
    if validated is not None and found != validated:
      raise errors.FileError(
        f"{self._path}: holds the validations of steps {found}, expected {validated}; bring it "
        f"back, or {_delete(self._path)}"
      )
    (self._directory / "tensorboard").mkdir(exist_ok=True)
    self._events = EventsWriter(str(self._directory / "tensorboard" / "events"))
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
    return _of_kind(_parse(self._path, self._lines), kind)

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
