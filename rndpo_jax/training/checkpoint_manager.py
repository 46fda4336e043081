"""What a training leaves on disk: parameters and states, and which of them are kept."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from rndpo_jax import provenance
from rndpo_jax.runtime import multihost, preemption, progress
from rndpo_jax.training import checkpoint


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The row of the best validation Dice; the first of equals, so that a later step must earn it."""
  return max(rows, key=lambda row: row["val_dice"])


class CheckpointManager:
  """Writes `params/STEP` and `state/STEP` of one training, each in the background."""

  def __init__(
    self,
    directory: os.PathLike,
    *,
    description: str,
    fingerprints: Mapping[str, str],
    keep_checkpoints: int = 2,
    keep_params: str = "all",
    minutes: float = 0.0,
  ):
    """Opens a folder, made if it is missing.

    Args:
      directory: of the training.
      description: of the training, for messages.
      fingerprints: of what the training is made of, by name, see `provenance`; kept in the states,
        which go on with the same alone.
      keep_checkpoints: states kept; those before the latest are for a latest that is corrupt.
      keep_params: "all"; "best", those of the best validation Dice and the latest; or "none".
      minutes: between further states; 0 for none.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self.description = description
    self.keep_params = keep_params
    self.folders = {name: directory / name for name in ("params", "state")}
    self._writers = {name: checkpoint.Writer(folder) for name, folder in self.folders.items()}
    self._fingerprints = dict(fingerprints)
    self._keep_checkpoints = keep_checkpoints
    self._seconds = 60 * minutes
    self._last = time.monotonic()

  def resume(self, state: Any) -> tuple[int, Any]:
    """(step, state) of the latest checkpoint that can be read; (0, `state`) if none is."""
    found = checkpoint.restore_latest(self.folders["state"], self._content(state))
    if found is None:
      return 0, state
    step, content = found
    folder = self.folders["state"]
    provenance.check(
      folder / str(step),
      {name: bytes(array).hex() for name, array in content.get("fingerprints", {}).items()},
      self._fingerprints,
      f"bring that back, or delete the folder {folder.parent} and run the same command again",
    )
    progress.say(f"{self.description}: going on from step {step}")
    return step, content["state"]

  def save(self, step: int, state: Any, with_params: bool = True) -> None:
    """Starts to write a state, and the parameters to keep, once all before are whole."""
    self.wait()
    if with_params and self.keep_params != "none":
      self._writers["params"].save(step, state.evaluated())
    self._writers["state"].save(step, self._content(state))
    self._drop_old()
    self._last = time.monotonic()

  def wait(self) -> None:
    """Returns when all that was started is whole; raises as `checkpoint.Writer.save` does.

    Each of several processes waits for the writers in the same order, and for all of them. So that
    whose own write failed raises, and none waits for a process that waits for it.
    """
    for writer in self._writers.values():
      writer.wait()

  def save_params_if_missing(self, step: int, state: Any) -> None:
    """A kill can come when the state of a step is whole and its parameters are not.

    Every process takes the answer of the first: those that write wait for each other.
    """
    if self.keep_params == "none" or step == 0:
      return
    folder = self.folders["params"]
    if multihost.broadcast(lambda: step not in checkpoint.steps(folder)):
      self._writers["params"].save(step, state.evaluated())

  def is_due(self) -> bool:
    """Whether the minutes are over; every process takes the answer of the first."""
    if not self._seconds:
      return False
    return bool(multihost.broadcast(lambda: time.monotonic() - self._last >= self._seconds))

  def keep_best(self, step: int, rows: list[dict[str, Any]]) -> None:
    """Deletes all parameters but the latest and the best as of each state that is kept."""
    ends = {*checkpoint.steps(self.folders["state"]), step}
    known = [[row for row in rows if row["step"] <= end] for end in ends]
    best = {best_row(part)["step"] for part in known if part}
    checkpoint.keep_only(self.folders["params"], best | {step})

  def saved(self) -> list[int]:
    """Steps of the states, the one being written among them."""
    self.wait()
    return checkpoint.steps(self.folders["state"])

  def __enter__(self) -> CheckpointManager:
    return self

  def __exit__(self, kind, error: BaseException | None, trace) -> None:
    """Waits for what was started; not on an error of one of several processes.

    They would wait for each other's part of a checkpoint that is never whole.
    """
    if jax.process_count() > 1:
      if error is not None and not isinstance(error, preemption.Preempted):
        return
      self.wait()
    with contextlib.ExitStack() as stack:
      for writer in self._writers.values():
        stack.callback(writer.close)
    self._drop_old()

  def _content(self, state: Any) -> dict[str, Any]:
    arrays = {
      name: np.frombuffer(bytes.fromhex(value), np.uint8)
      for name, value in self._fingerprints.items()
    }
    return {"state": state, **({"fingerprints": arrays} if arrays else {})}

  def _drop_old(self) -> None:
    folder = self.folders["state"]
    checkpoint.keep_only(folder, checkpoint.steps(folder)[-self._keep_checkpoints :])
