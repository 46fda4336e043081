"""The one training loop: steps, checkpoints, metrics, resume."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from rndpo_jax import errors, types
from rndpo_jax.runtime import multihost, preemption, progress
from rndpo_jax.training import checkpoint_manager, metric_writer
from rndpo_jax.training.train_step import TrainState


def fit(
  train_step: Callable,
  state: TrainState,
  batches: Callable[[int], Iterator],
  *,
  num_steps: int,
  key: jax.Array,
  directory: os.PathLike,
  description: str,
  log_every_steps: int,
  eval_every_steps: int,
  validate: Callable[[types.Params], dict[str, float]] | None = None,
  fingerprints: Mapping[str, str] | None = None,
  keep_checkpoints: int = 2,
  keep_params: bool = True,
  keep_best: bool = False,
  checkpoint_minutes: float = 0.0,
  open_rows: Callable[[int], Any] | None = None,
):
  """Trains to `num_steps`, going on from the latest checkpoint in `directory`.

  Writes `params/STEP` and `state/STEP` every `eval_every_steps` and at the end, in the background
  while the steps go on, and `metrics.jsonl`. An interrupted run ends with the arrays of an
  undisturbed one.

  Args:
    train_step: from `make_train_step`, or as it.
    state: at step 0, a TrainState or with its method `evaluated`; donated.
    batches: start step -> endless iterator of batches on the device.
    num_steps: steps in all.
    key: of the run; handed to `train_step`.
    directory: of this training.
    description: for progress and messages.
    log_every_steps: steps between rows of training metrics.
    eval_every_steps: steps between validations and checkpoints.
    validate: params -> figures of the validation split, or None.
    fingerprints: of what the training is made of, by name, see `provenance`; kept in the state,
      which goes on with the same alone.
    keep_checkpoints: states kept; those before the latest are for a latest that is corrupt.
    keep_params: whether there is a `params/STEP` at all.
    keep_best: keeps the parameters of the best validation Dice and the latest alone.
    checkpoint_minutes: minutes between further states, looked at every `log_every_steps`; 0 for
      none. They leave no mark on the result.
    open_rows: start step -> where the metrics go, with the methods of `metric_writer.Rows`, which
      it is by default.

  Returns:
    The state at `num_steps`.

  Raises:
    TrainingError: at the first loss that is not finite.
    preemption.Preempted: after a signal, the state being saved.
    errors.CheckpointError: if no checkpoint to go on from can be read.
    errors.ProvenanceError: if the checkpoint to go on from has other fingerprints.
    files.FileError: where `metrics.jsonl` does not hold what was validated before.
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    saver = stack.enter_context(
      checkpoint_manager.Saver(directory, fingerprints or {}, keep_checkpoints, checkpoint_minutes)
    )
    start, state = saver.resume(state, description)
    if keep_params and (start % eval_every_steps == 0 or start == num_steps):
      saver.save_params_if_missing(start, state)
    rows = open_rows(start) if open_rows else metric_writer.Rows(directory, start)
    stack.enter_context(contextlib.closing(rows))
    if validate is not None and not open_rows:
      rows.check_validated([s for s in kept_steps(num_steps, eval_every_steps) if s <= start])
    shown = progress.track(
      range(start + 1, num_steps + 1),
      total=num_steps,
      description=description,
      unit="steps",
      done=start,
    )
    stream = batches(start) if start < num_steps else iter(())
    pending = []
    for step in shown:
      state, aux = train_step(state, next(stream), key)
      pending.append((step, aux))
      keep = step % eval_every_steps == 0 or step == num_steps
      logged = step % log_every_steps == 0
      stop = preemption.reached(step)
      if keep or logged or stop:
        _add_steps(rows, pending, log_every_steps, description, saver)
      if keep and validate is not None:
        rows.add_validation(step, validate(state.evaluated()))
      if keep or stop or (logged and saver.is_due()):
        rows.write()
        saver.save(step, state, with_params=keep and keep_params)
      if keep and keep_best and multihost.is_first():
        saver.keep_best(step, rows.of_kind("val"))
      if stop:
        raise preemption.Preempted(f"{description}: saved at step {step}")
  return state


def kept_steps(num_steps: int, eval_every_steps: int) -> list[int]:
  """The steps at which `fit` validates and keeps parameters."""
  return sorted({*range(eval_every_steps, num_steps + 1, eval_every_steps), num_steps})


def _add_steps(rows, pending, log_every_steps, description, saver) -> None:
  """Hands over the metrics of the steps since the last time; ends at a loss that is not finite."""
  try:
    rows.add_steps(pending, log_every_steps)
  except metric_writer.NotFiniteError as error:
    saved = saver.saved()
    last = f"step {saved[-1]} in {saver.folders['params']}" if saved else "none yet"
    raise errors.TrainingError(
      f"{description}: {error}. The last good checkpoint is kept ({last}). Lower the learning rate "
      "or set a clip_norm, in a new --workdir (with --config.base.workdir where the base is done), "
      "or check the input for extreme values"
    ) from error
  pending.clear()
