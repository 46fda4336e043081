"""Orbax checkpoints: parameters of every kept step, and the one state that resumes a run.

Orbax writes a step under a temporary name and renames it when it is whole, so a kill leaves the
step before it as the latest.
"""

from __future__ import annotations

import errno
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be read; the message names it and how to rebuild it."""


def steps(directory: epath.PathLike) -> list[int]:
  """Steps with a whole checkpoint in `directory`, ascending; [] where there is none."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists()
  )


def save(directory: epath.PathLike, step: int, tree: Any) -> None:
  """Writes a pytree of arrays as `directory`/`step`; replaces one that is there.

  Raises:
    OSError: with ENOSPC, where the disk is full.
  """
  path = epath.Path(directory).resolve() / str(step)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, tree, force=True)
  except ValueError as error:  # TensorStore's, when the disk is full
    if "No space left" not in str(error):
      raise
    raise OSError(errno.ENOSPC, f"checkpoint {path} cannot be written: no space left") from error


def restore(directory: epath.PathLike, step: int, like: Any) -> Any:
  """Reads `directory`/`step` into the structure, shapes, dtypes and shardings of `like`.

  Raises:
    CheckpointError: where it is missing, corrupt or of another structure.
  """
  path = epath.Path(directory).resolve() / str(step)
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  with ocp.StandardCheckpointer() as checkpointer:
    try:
      return checkpointer.restore(path, target)
    except (ValueError, KeyError, TypeError, OSError) as error:
      remedy = (
        f"Delete the folder {path} and run the same command again: the run goes on from the "
        "checkpoint before it, or from the start of its stage"
      )
      raise _unreadable(path, error, remedy) from error


def restore_params(directory: epath.PathLike, step: int, *, stage_directory) -> Any:
  """Reads `directory`/`step` as numpy arrays, in the structure that was saved.

  Args:
    stage_directory: what to delete so that the finished stage runs again; for the message.

  Raises:
    CheckpointError: where it is missing or corrupt.
  """
  path = epath.Path(directory).resolve() / str(step)
  with ocp.PyTreeCheckpointer() as checkpointer:
    try:
      metadata = checkpointer.metadata(path).item_metadata.tree
      arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
      return checkpointer.restore(path, restore_args=arguments)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
      remedy = f"Delete the folder {stage_directory} and run the same command again: its stage runs"
      raise _unreadable(path, error, f"{remedy} anew") from error


def remove_before(directory: epath.PathLike, step: int) -> None:
  """Deletes the checkpoints of earlier steps."""
  for old in steps(directory):
    if old < step:
      (epath.Path(directory) / str(old)).rmtree()


def _unreadable(path: epath.Path, error: Exception, remedy: str) -> CheckpointError:
  first = str(error).strip().splitlines()
  what = first[0] if first else type(error).__name__
  return CheckpointError(f"checkpoint {path} cannot be read ({what}). {remedy}")
