"""Orbax checkpoints: parameters of every kept step, and the states that resume a run.

Orbax writes a step under a temporary name and renames it when it is whole, so a kill leaves the
step before it as the latest. Inside, `sha256.json` vouches for every file: TensorStore itself
reads a changed byte of an array without a word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import files, multihost, processes, progress

_SUMS = "sha256.json"
# Orbax writes both after the sums; the first marks a step as whole on every kind of storage.
_WHOLE, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
# Orbax shares an array's writing out among the devices that hold it, by a program for each shape
# and device: for a small one compiling them takes longer than they save.
_MIN_SHARE_BYTES = 2**20
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)  # Orbax warns of what `override` asks for
ocp.type_handlers.register_type_handler(
  jax.Array,
  ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SHARE_BYTES),
  override=True,
)
logging.set_verbosity(_verbosity)
_UNREADABLE = (ValueError, KeyError, TypeError, OSError, AttributeError)


def steps(directory: epath.PathLike) -> list[int]:
  """Steps with a whole checkpoint in `directory`, ascending; [] if there is none."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdigit() and (path / _WHOLE).exists()
  )


class Writer:
  """Writes the checkpoints of one folder in the background, one at a time.

  The arrays are on the host when `save` returns, so the caller may donate them. Call `close`,
  which waits for the last one. With `alone` this process writes all, and waits for
  no other.
  """

  def __init__(self, directory: epath.PathLike, alone: bool = False):
    self._directory = epath.Path(directory).resolve()
    self._path = self._directory
    if self._directory.exists() and multihost.is_first():
      for left in self._directory.glob("*.orbax-checkpoint-tmp*"):  # by a run that was killed
        left.rmtree()
    # Several writers of a process must not meet at each other's barriers.
    prefix = f"{self._directory.parent.name}_{self._directory.name}"
    self._checkpointer = ocp.StandardCheckpointer(
      async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_sums),
      multiprocessing_options=_alone(prefix)
      if alone
      else ocp.options.MultiprocessingOptions(primary_host=0, barrier_sync_key_prefix=prefix),
    )

  def save(self, step: int, tree: Any) -> None:
    """Starts to write a pytree of arrays as `directory`/`step`; replaces one that is there.

    Raises:
      OSError: with ENOSPC, if the disk was too full for this one or the one before.
      CheckpointError: if it cannot be written for another reason, or not in time.
    """
    self.wait()
    self._path = self._directory / str(step)
    with _failed_write_named(self._path):
      self._checkpointer.save(self._path, tree, force=True)

  def wait(self) -> None:
    """Returns when the last checkpoint is whole; raises as `save` does."""
    with _failed_write_named(self._path):
      self._checkpointer.wait_until_finished()

  def close(self) -> None:
    """Waits, raises as `save` does, and ends the background threads."""
    with _failed_write_named(self._path):
      self._checkpointer.close()

  def _write_sums(self) -> None:
    """Runs on process 0 once every process has written, before the step counts as whole."""
    written = self._checkpointer.get_temporary_path(self._path).get()
    files.write_json(written / _SUMS, _sums(written))


def save(directory: epath.PathLike, step: int, tree: Any, alone: bool = False) -> None:
  """Writes `directory`/`step` and waits for it; arguments as of `Writer`, raises as its `save`."""
  writer = Writer(directory, alone)
  try:
    writer.save(step, tree)
  finally:
    writer.close()


def restore_latest(directory: epath.PathLike, like: Any) -> tuple[int, Any] | None:
  """Reads the latest checkpoint that every process can read; says so if there is a later one.

  It is read into the structure, shapes, dtypes and shardings of `like`; each process reads its part
  of the arrays for itself. What process 0 finds in the folder is what there is. Those after the one
  read are deleted, since the run writes them again.

  Returns:
    (step, tree), or None if there is no checkpoint.

  Raises:
    CheckpointError: on every process if there are checkpoints and none can be read by all;
      nothing is deleted then.
  """
  there = multihost.broadcast_list(lambda: steps(directory))
  refused = None  # the latest: its path, why, and by which processes
  for step in reversed(there):
    path, tree, failed = _path(directory, step), None, None
    try:
      tree = _read(path, like)
    except _UNREADABLE as error:
      failed = error
      progress.say(f"checkpoint {path}: {_first_line(error)}")
    unable = multihost.processes_where(failed is not None)
    if unable:
      why = "see its output" if failed is None else _first_line(failed)
      refused = refused or (path, why, _by(unable))
      continue
    if refused:
      latest, _, by = refused
      progress.say(f"checkpoint {latest} cannot be read{by}; going back to that of step {step}")
      keep_only(directory, [old for old in there if old <= step])
    return step, tree
  if refused:
    path, why, by = refused
    raise _unreadable(path, why, directory, "the stage starts", by)
  return None


def restore_params(directory: epath.PathLike, step: int, *, stage_directory) -> Any:
  """Reads `directory`/`step` as numpy arrays, in the structure that was saved.

  Each process reads for itself: none waits for another.

  Args:
    stage_directory: what to delete so that the finished stage runs again; for the message.

  Raises:
    CheckpointError: if it is missing or corrupt.
  """
  path = _path(directory, step)
  alone = _alone()
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
    try:
      _check_sums(path)
      metadata = checkpointer.metadata(path).item_metadata.tree
      arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
      return checkpointer.restore(path, restore_args=arguments)
    except _UNREADABLE as error:
      what = _first_line(error)
      raise _unreadable(path, what, stage_directory, "its stage runs") from error


def keep_only(directory: epath.PathLike, kept: Collection[int]) -> None:
  """Deletes the whole checkpoints of other steps; process 0 does so for all."""
  if multihost.is_first():
    for step in set(steps(directory)) - set(kept):
      path = epath.Path(directory) / str(step)
      (path / _WHOLE).unlink()  # first: half of a checkpoint must not count as one
      path.rmtree()


def _sums(path: epath.Path) -> dict[str, str]:
  """Name -> SHA-256 of every file of a checkpoint that Orbax does not write after the sums."""
  return {
    os.path.relpath(folder / name, path): files.sha256(folder / name)
    for folder, _, names in path.walk()
    for name in sorted(names)
    if name not in (_SUMS, _WHOLE, _METADATA)
  }


def _check_sums(path: epath.Path) -> None:
  """Raises ValueError where a file differs, or nothing says what the files are."""
  if not (path / _SUMS).exists():
    raise ValueError(f"the file {_SUMS} is missing, which vouches for the others")
  expected, found = files.read_json(path / _SUMS), _sums(path)
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      what = "is missing" if name not in found else f"is not what {_SUMS} says"
      raise ValueError(f"the file {name} {what}")


@contextlib.contextmanager
def _failed_write_named(path: epath.Path):
  """Turns TensorStore's and Orbax's errors into such that name the checkpoint."""
  try:
    yield
  except TimeoutError as error:  # by the wall clock
    raise errors.CheckpointError(
      f"checkpoint {path} was not whole in time ({str(error).splitlines()[0]}): the storage or "
      "another process is too slow, or the clock was set ahead. Run the same command again: it "
      "goes on from the checkpoint before"
    ) from error
  except ValueError as error:
    if not is_failed_write(error) or processes.is_loss_of_another(error):
      raise
    if not files.is_full_disk(error):
      raise errors.CheckpointError(
        f"checkpoint {path} cannot be written ({str(error).splitlines()[0][:300]}). Fix that and "
        "run the same command again: it goes on from the checkpoint before"
      ) from error
    raise OSError(errno.ENOSPC, f"checkpoint {path} cannot be written: no space left") from error


def is_failed_write(error: BaseException) -> bool:
  """Whether a disk or a store has failed, by what Orbax and TensorStore raise of it."""
  status = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error))
  return isinstance(error, OSError) or bool(status)


def _read(path: epath.Path, like: Any) -> Any:
  """The arrays of a checkpoint whose sums are right, in the shardings of `like`."""
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
    _check_sums(path)
    return checkpointer.restore(path, target)


def _alone(prefix: str | None = None) -> ocp.options.MultiprocessingOptions:
  """No other process is waited for: one that raises must not leave them at Orbax's barriers."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index, active_processes={index}, barrier_sync_key_prefix=prefix
  )


def _path(directory: epath.PathLike, step: int) -> epath.Path:
  return epath.Path(directory).resolve() / str(step)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def _by(unable: list[int]) -> str:
  """' by process 1, 3' if there are several processes."""
  return f" by process {', '.join(map(str, unable))}" if jax.process_count() > 1 else ""


def _unreadable(
  path: epath.Path, what: str, folder: epath.PathLike, again: str, by: str = ""
) -> errors.CheckpointError:
  return errors.CheckpointError(
    f"checkpoint {path} cannot be read{by} ({what}). Delete the folder {folder} and run the same "
    f"command again: {again}"
  )
