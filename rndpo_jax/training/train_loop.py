"""The one training loop: steps, checkpoints, metrics, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax

from rndpo_jax import errors, types
from rndpo_jax.runtime import multihost, preemption, progress
from rndpo_jax.training import checkpoint_manager, metric_writer
from rndpo_jax.training.train_step import TrainState


class Schedule(NamedTuple):
  """How long a training goes on, and when it says what.

  Attributes:
    num_steps: steps in all.
    log_every_steps: steps between rows of training metrics.
    eval_every_steps: steps between validations and checkpoints.
  """

  num_steps: int
  log_every_steps: int
  eval_every_steps: int


def fit(
  train_step: Callable,
  state: TrainState,
  batches: Callable[[int], Iterator],
  schedule: Schedule,
  *,
  key: jax.Array,
  checkpoints: checkpoint_manager.CheckpointManager,
  metrics: metric_writer.MetricWriter,
  validate: Callable[[types.Params], dict[str, float]] | None = None,
):
  """Trains to `schedule.num_steps`, going on from the latest checkpoint.

  Writes `params/STEP` and `state/STEP` every `eval_every_steps` and at the end, in the background
  while the steps go on, and `metrics.jsonl`. An interrupted run ends with the arrays of an
  undisturbed one.

  Args:
    train_step: from `make_train_step`, or as it.
    state: at step 0, a TrainState or with its method `evaluated`; donated.
    batches: start step -> endless iterator of batches on the device.
    schedule: see there.
    key: of the run; handed to `train_step`.
    checkpoints: of this training; closed at the end. Its further states by the clock are looked at
      every `log_every_steps`, and leave no mark on the result.
    metrics: where they are written, or as it; closed at the end.
    validate: params -> figures of the validation split, or None.

  Returns:
    The state at `num_steps`.

  Raises:
    TrainingError: at the first loss that is not finite.
    preemption.Preempted: after a signal, the state being saved.
    errors.CheckpointError: if no checkpoint to go on from can be read.
    errors.ProvenanceError: if the checkpoint to go on from has other fingerprints.
    errors.FileError: if `metrics.jsonl` does not hold what was validated before.
  """
  num_steps, log_every_steps, eval_every_steps = schedule
  kept = kept_steps(num_steps, eval_every_steps)
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoints)
    start, state = checkpoints.resume(state)
    if start in kept:
      checkpoints.save_params_if_missing(start, state)
    metrics.resume(start, None if validate is None else [step for step in kept if step <= start])
    stack.enter_context(contextlib.closing(metrics))
    steps = _shown_steps(start, num_steps, checkpoints.description)
    stream = batches(start) if start < num_steps else iter(())
    pending = []
    for step in steps:
      state, aux = train_step(state, next(stream), key)
      pending.append((step, aux))
      keep = step % eval_every_steps == 0 or step == num_steps
      logged = step % log_every_steps == 0
      stop = preemption.reached(step)
      if keep or logged or stop:
        _add_steps(metrics, pending, log_every_steps, checkpoints)
      if keep and validate is not None:
        metrics.add_validation(step, validate(state.evaluated()))
      if keep or stop or (logged and checkpoints.is_due()):
        metrics.write()
        checkpoints.save(step, state, with_params=keep)
      if keep and checkpoints.keep_params == "best" and multihost.is_first():
        checkpoints.keep_best(step, metrics.of_kind("val"))
      if stop:
        raise preemption.Preempted(f"{checkpoints.description}: saved at step {step}")
  return state


def _shown_steps(start: int, num_steps: int, description: str) -> Iterable[int]:
  """The steps after `start`, their progress shown."""
  steps = range(start + 1, num_steps + 1)
  return progress.track(steps, total=num_steps, description=description, unit="steps", done=start)


def kept_steps(num_steps: int, eval_every_steps: int) -> list[int]:
  """The steps at which `fit` validates and keeps parameters."""
  return sorted({*range(eval_every_steps, num_steps + 1, eval_every_steps), num_steps})


def _add_steps(metrics, pending, log_every_steps, checkpoints) -> None:
  """Hands over the metrics of the steps since the last time; ends at a loss that is not finite."""
  try:
    metrics.add_steps(pending, log_every_steps)
  except metric_writer.NotFiniteError as error:
    saved = checkpoints.saved()
    last = f"step {saved[-1]} in {checkpoints.folders['params']}" if saved else "none yet"
    raise errors.TrainingError(
      f"{checkpoints.description}: {error}. The last good checkpoint is kept ({last}). Lower the "
      "learning rate or set a clip_norm, in a new --workdir (with --config.base.workdir if the "
      "base is done), or check the input for extreme values"
    ) from error
  pending.clear()
