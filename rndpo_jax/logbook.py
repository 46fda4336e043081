"""Rows of metrics: `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rndpo_jax import parallel


def read_rows(directory: os.PathLike, kind: str) -> list[dict[str, Any]]:
  """Rows of `metrics.jsonl` of one kind, "train" or "val"."""
  path = epath.Path(directory) / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [row for row in rows if row["kind"] == kind]


class Rows:
  """Appends to metrics.jsonl and TensorBoard, first dropping rows that a resumed run repeats.

  TensorBoard's events are written here and now. SummaryWriter would leave them to a thread: on a
  full disk that dies, and the next rows wait for it forever.

  Process 0 writes; in the others every method does nothing.
  """

  def __init__(self, directory: epath.Path, start: int):
    self._writes = parallel.is_first()
    if not self._writes:
      return
    path = directory / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text().splitlines(keepends=True):
        # A killed run can leave half a line: it belongs to a step that is repeated.
        if line.endswith("\n") and json.loads(line)["step"] <= start:
          kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
    self._file = path.open("a")
    (directory / "tensorboard").mkdir(exist_ok=True)
    self._events = EventsWriter(str(directory / "tensorboard" / "events"))
    self._add_event(start + 1, session_log=SessionLog(status=SessionLog.START))  # drops later steps

  def add(self, row: dict[str, Any]) -> None:
    if not self._writes:
      return
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    for name, value in row.items():
      if name not in ("step", "kind"):
        self._add_event(row["step"], summary=summary.scalar(f"{row['kind']}/{name}", value))
    self._events.flush()

  def _add_event(self, step: int, **content) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **content))

  def close(self) -> None:
    if not self._writes:
      return
    self._file.close()
    self._events.close()
