"""Fine-tuning by every beta, learning rate and seed of a grid, as one program; see `population`.

Data, base and pairs are those of the work directory, and so of `config.seed`. A seed of the sweep
is what a seed is to the stage `finetune` alone: the order of the batches and the key. The member of
`config.seed` is what that stage makes of its beta and learning rate. Only the validation split is
looked at; the test split is not touched.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import checkpoint, files, logbook, models, parallel, population, preemption, progress
from rndpo_jax.config import ConfigError
from rndpo_jax.data import pipeline
from rndpo_jax.saving import Saver
from rndpo_jax.stages import base, finetune, sweep_results

# The file that a sweep writes last, and so the sign that it is done.
DONE = "sweep.json"


def run(
  config,
  workdir: os.PathLike,
  *,
  betas: Sequence[float],
  learning_rates: Sequence[float],
  seeds: Sequence[int],
  form: str | None = None,
) -> dict[str, Any]:
  """Trains every member to `config.finetune.num_steps`; writes `sweep/`.

  There is a folder for each member with its `metrics.jsonl` and TensorBoard, and `sweep.json`, see
  `sweep_results.results`. A killed sweep goes on from its latest state; the states are deleted at
  the end, and no parameters are kept: a single job makes those of the best member again, with all
  that belongs to it. `config.finetune.beta` and `learning_rate` are not read.

  Args:
    config: the whole config.
    workdir: where the stages up to `mine` are done.
    betas: of the objective.
    learning_rates: peaks.
    seeds: of the batches and keys.
    form: of `population.FORMS`; None for that of the platform.

  Returns:
    What `sweep.json` holds.

  Raises:
    ConfigError: on a grid that cannot be, several processes, or a folder with another sweep.
    preemption.Preempted: after a signal, the state being saved.
    checkpoint.CheckpointError, pairs.PairsError.
  """
  grid = {"betas": list(betas), "learning_rates": list(learning_rates), "seeds": list(seeds)}
  check(grid)
  directory = epath.Path(workdir) / "sweep"
  _claim(directory, grid)
  if (directory / DONE).exists():
    progress.say("[sweep] done before")
    return files.read_json(directory / DONE)
  mesh = parallel.make_population_mesh(len(seeds), len(betas) * len(learning_rates))
  form = form or population.default_form(mesh)
  progress.say(
    f"[sweep] {len(seeds)} seeds x {len(betas)} betas x {len(learning_rates)} learning rates, by "
    f"{form} on {mesh.size} of {jax.device_count()} devices"
  )
  diverged = _train(config, workdir, directory, grid, mesh, form)
  content = {
    **sweep_results.results(grid, directory, diverged),
    "form": form,
    "num_devices": mesh.size,
  }
  content["base"] = _base_dice(workdir)
  files.write_json(directory / DONE, content)
  checkpoint.keep_only(directory / "state", ())
  return content


def check(grid: dict[str, list]) -> None:
  """Refuses a grid that cannot be trained.

  Raises:
    ConfigError: naming the flag.
  """
  for name, values in grid.items():
    names = {x if name == "seeds" else f"{x:g}" for x in values}
    if not values or len(names) < len(values):
      raise ConfigError(
        f"--{name}: found {values}, expected one or more values that differ in six digits"
      )
    wrong = [x for x in values if x < 0 or (name != "seeds" and not 0 < x < math.inf)]
    if wrong:
      least = "0 or more" if name == "seeds" else "finite values above 0"
      raise ConfigError(f"--{name}: found {wrong[0]}, expected {least}")
  if jax.process_count() > 1:
    raise ConfigError(
      f"a sweep runs in one process on all its devices, found {jax.process_count()} processes; "
      "share the seeds or betas among work directories instead, with --config.base.workdir"
    )


def _claim(directory: epath.Path, grid: dict[str, list]) -> None:
  """Writes `grid.json`, or checks that the one there is the same."""
  path = directory / "grid.json"
  if path.exists() and (there := files.read_json(path)) != grid:
    raise ConfigError(
      f"{directory} holds another sweep: {there}, now asked for: {grid}. Delete that folder, or "
      "use a new --workdir with --config.base.workdir"
    )
  files.write_json(path, grid)


def _train(config, workdir, directory, grid, mesh, form) -> np.ndarray:
  """Trains all members; returns the step at which each diverged, i32[N, R], 0 where it did not."""
  options = config.finetune
  dataset = pipeline.open_dataset(config, workdir)
  params = base.load(config, workdir)[0]
  state, train_step, validate = _make(config, dataset, params, grid, mesh, form)
  settings = population.grid(grid["betas"], grid["learning_rates"])
  keys = jnp.stack([finetune.run_key(seed) for seed in grid["seeds"]])
  with contextlib.ExitStack() as stack:
    reference = checkpoint.digest(params)
    saver = stack.enter_context(
      Saver(directory, reference, options.keep_checkpoints, options.checkpoint_minutes)
    )
    start, state = saver.resume(state, "sweep")
    rows = stack.enter_context(contextlib.closing(_Rows(directory, grid, start)))
    stream = _batches(config, workdir, dataset, grid["seeds"], mesh, params, start)
    for step in progress.track(
      range(start + 1, options.num_steps + 1),
      total=options.num_steps,
      description="sweep",
      unit="steps",
      done=start,
    ):
      state, aux = train_step(state, next(stream), keys, settings)
      keep = step % options.eval_every_steps == 0 or step == options.num_steps
      logged = step % options.log_every_steps == 0
      stop = preemption.reached(step)
      if logged:
        rows.add(step, "train", aux, state.diverged)
      if keep:
        rows.add(step, "val", {"val_dice": validate(state.evaluated())}, state.diverged)
      if keep or stop or (logged and saver.is_due()):
        rows.write()
        saver.save(step, state, with_params=False)
      if stop:
        raise preemption.Preempted(f"sweep: saved at step {step}")
  return jax.device_get(state.diverged)


def _make(config, dataset, params, grid, mesh, form):
  """(state at step 0, step, validate), as the stage `finetune` would make them for one member."""
  options = config.finetune
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  loss_fn = finetune.make_loss_fn(
    segmenter,
    num_classes=dataset.num_classes,
    size=dataset.size,
    **finetune.loss_options(config),
  )
  unit = options.copy_and_resolve_references()
  unit.learning_rate = 1.0
  optimizer = finetune.optimizer(unit)
  num_settings = len(grid["betas"]) * len(grid["learning_rates"])
  state = population.make_state(
    params, optimizer, len(grid["seeds"]), num_settings, mesh, with_ema=options.ema_decay > 0
  )
  train_step = population.make_step(
    loss_fn,
    optimizer,
    mesh,
    form=form,
    accumulate_steps=options.accumulate_steps,
    ema_decay=options.ema_decay,
  )
  batches = base.validation_batches(config, dataset)
  validate = population.make_validate(
    segmenter.apply, dataset.num_classes, batches, mesh, form=form
  )
  return state, train_step, validate


def _batches(config, workdir, dataset, seeds, mesh, params, start: int) -> Iterator[dict]:
  """Every seed's batches, on the devices."""
  stream = finetune.pair_stream(config, workdir, dataset)
  shared = {}
  if config.finetune.reference == "online":
    shared["reference_params"] = jax.device_put(params, parallel.replicated(mesh))

  def put(batches):
    return {**population.put_batches(batches, mesh), **shared}

  each = zip(*(stream(seed, start) for seed in seeds), strict=True)
  return pipeline.prefetch(each, put, config.data.prefetch)


class _Rows:
  """A `logbook.Rows` for each member, which ends where the member diverges."""

  def __init__(self, directory: epath.Path, grid: dict[str, list], start: int):
    self._members = sweep_results.members_of(grid)
    self._rows, self._said = [], set()
    for member in self._members:
      folder = sweep_results.member_directory(directory, *member)
      folder.mkdir(parents=True, exist_ok=True)
      self._rows.append(logbook.Rows(folder, start))

  def add(self, step: int, kind: str, figures: dict[str, Any], diverged: jax.Array) -> None:
    figures, diverged = jax.device_get((figures, diverged))
    for place, (rows, at) in enumerate(zip(self._rows, diverged.ravel(), strict=True)):
      if not at:
        row = {name: float(values.ravel()[place]) for name, values in sorted(figures.items())}
        rows.add({"step": step, "kind": kind, **row})
      elif place not in self._said:
        self._said.add(place)
        seed, beta, rate = self._members[place]
        progress.say(
          f"sweep: seed {seed}, beta {beta:g}, learning rate {rate:g} has no finite loss or "
          f"gradient at step {at}; it stays as it was before, the others go on"
        )

  def write(self) -> None:
    for rows in self._rows:
      rows.write()

  def close(self) -> None:
    for rows in self._rows:
      rows.close()


def _base_dice(workdir) -> float:
  return files.read_json(base.member_directory(workdir, 0) / "selected.json")["val_dice"]
