"""Fine-tuning by every beta, learning rate and seed of a grid, as one program; see `population`.

Data, base and pairs are those of the work directory, and so of `config.seed`. A seed of the sweep
is what a seed is to the stage `finetune` alone: the order of the batches and the key. The member of
`config.seed` is what that stage makes of its beta and learning rate. Only the validation split is
looked at; the test split is not touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax import models, types
from rndpo_jax import seeds as seeds_lib
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, split_batches
from rndpo_jax.errors import ConfigError, MiningError
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.runtime import files, multihost, progress, sharding
from rndpo_jax.stages import finetune, phases, reliable
from rndpo_jax.sweep import member_writers, population, sweep_results
from rndpo_jax.training import checkpoint, checkpoint_manager, image_terms, train_loop

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
    ConfigError: on a grid that cannot be, or a folder with another sweep.
    preemption.Preempted: after a signal, the state being saved.
    checkpoint.CheckpointError, pairs.PairsError, MiningError if mining has left the phase out.
  """
  grid = {"betas": list(betas), "learning_rates": list(learning_rates), "seeds": list(seeds)}
  config = config_lib.of_phase(config)
  check(config, grid)
  directory = epath.Path(workdir) / "sweep"
  _claim(directory, grid)
  dataset = dataset_lib.open_dataset(config, workdir)
  if not len(dataset.splits["val"]):
    raise ConfigError(
      f"--workdir: {workdir} has no validation cases, by which a sweep is judged; set "
      "config.data.num_val above 0, in another --workdir"
    )
  pairs = epath.Path(workdir) / "pairs"
  if multihost.broadcast(lambda: bool(shards.left_out(pairs))):
    raise MiningError(f"{pairs}: there are no pairs to train on; {shards.left_out(pairs)}")
  params = phases.start(config, workdir, dataset)
  made_of = finetune.made_of(config, workdir, pairs, dataset, params)
  if multihost.broadcast((directory / DONE).exists):
    finetune.check_made_of(directory, DONE, made_of)
    progress.say("[sweep] done before")
    return files.read_json(directory / DONE)
  mesh = _mesh_of(grid)
  form = form or population.default_form(mesh)
  _say_start(config, grid, form, mesh)
  diverged = _train(config, workdir, directory, dataset, params, made_of, grid, mesh, form)
  if multihost.is_first():
    how = {"fingerprints": made_of, "form": form, "num_devices": mesh.size}
    _write_results(config, workdir, directory, grid, diverged, how)
  multihost.barrier("sweep")
  files.refresh(directory)
  return files.read_json(directory / DONE)


def _write_results(config, workdir, directory, grid, diverged, how: dict[str, Any]) -> None:
  """`sweep.json`, and `how` the members were trained in it; the states are no longer needed."""
  results = sweep_results.results(grid, directory, diverged, _validated(config.finetune))
  content = {**results, **how, "base": sweep_results.base_dice(workdir)}
  files.write_json(directory / DONE, content)
  checkpoint.keep_only(directory / "state", ())


def _say_start(config, grid: dict[str, list], form: str, mesh: Mesh) -> None:
  seeds, betas, rates = (len(grid[name]) for name in ("seeds", "betas", "learning_rates"))
  progress.say(
    f"[sweep] {seeds} seeds x {betas} betas x {rates} learning rates, by {form} on {mesh.size} of "
    f"{jax.device_count()} devices"
  )
  if config.mesh.fsdp * config.mesh.space > 1:
    progress.say("[sweep] each member is trained on one device, whatever config.mesh says")


def _validated(options) -> list[int]:
  return train_loop.kept_steps(options.num_steps, options.eval_every_steps)


def check(config, grid: dict[str, list]) -> None:
  """Refuses what cannot be trained here; after the processes have met.

  Args:
    config: of the job; its last phase is swept.
    grid: see `run`.

  Raises:
    ConfigError: naming the flag or key.
  """
  config = config_lib.of_phase(config)
  parts = config.finetune.accumulate_steps
  for key, size in finetune.batch_sizes(config).items():
    if size % parts:
      raise ConfigError(
        f"config.finetune.accumulate_steps: found {parts}, but {key.partition('.')[2]}={size}, "
        "which a member has on one device, is no multiple of it"
      )
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
  _mesh_of(grid)


def _mesh_of(grid: dict[str, list]) -> Mesh:
  num_settings = len(grid["betas"]) * len(grid["learning_rates"])
  return sharding.make_population_mesh(len(grid["seeds"]), num_settings)


def _claim(directory: epath.Path, grid: dict[str, list]) -> None:
  """Process 0 writes `grid.json`; each checks that the one there is the same."""
  path = directory / "grid.json"
  if not multihost.is_first():
    multihost.barrier("claim of a sweep")
    files.refresh(directory)
  if path.exists() and (there := files.read_json(path)) != grid:
    raise ConfigError(
      f"{directory} holds another sweep: {there}, now asked for: {grid}. Delete that folder, or "
      "use a new --workdir with --config.base.workdir"
    )
  if multihost.is_first():
    files.write_json(path, grid)
    multihost.barrier("claim of a sweep")


def _train(config, workdir, directory, dataset, params, made_of, grid, mesh, form) -> np.ndarray:
  """Trains all members; returns the step at which each diverged, i32[N, R], 0 if it did not."""
  options = config.finetune
  pairs = epath.Path(workdir) / "pairs"
  if "pairs" in image_terms.reads_of(config):
    shards.check_made_of(pairs, dataset, params)
  trained = finetune.with_partner(config, workdir, dataset, params)
  state, step, validate = _make(config, dataset, trained, grid, mesh, form)
  settings = population.grid(grid["betas"], grid["learning_rates"])
  reference = None
  if finetune.needs_base(config):
    reference = jax.device_put(params, sharding.replicated(mesh))
  state = train_loop.fit(
    lambda state, batch, keys: step(state, batch, keys, settings, reference),
    state,
    _batches(
      config, pairs, reliable.shown_to(config, workdir, directory, dataset), grid["seeds"], mesh
    ),
    finetune.schedule(options),
    key=jnp.stack(
      [seeds_lib.finetuning_key(seed, config_lib.num_phases(config)) for seed in grid["seeds"]]
    ),
    checkpoints=checkpoint_manager.CheckpointManager(
      directory,
      description="sweep",
      fingerprints=made_of,
      keep_checkpoints=options.keep_checkpoints,
      keep_params="none",
      minutes=options.checkpoint_minutes,
    ),
    metrics=member_writers.MemberWriters(directory, grid),
    validate=lambda params: {"val_dice": validate(params)},
  )
  return sharding.fetch(state.diverged)


def _make(config, dataset, params, grid, mesh, form):
  """(state at step 0, step, validate), as the stage `finetune` would make them for one member."""
  options = config.finetune
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  loss_fn = finetune.make_loss_fn(
    config,
    segmenter.apply,
    num_classes=dataset.num_classes,
    has_ignored=dataset.has_ignored,
    in_mask=dataset.in_mask,
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
    log_every_steps=options.log_every_steps,
  )
  batches = split_batches.validation_batches(config, dataset, whole=True)
  validate = population.make_validate(
    segmenter.apply, dataset.num_classes, batches, mesh, form=form
  )
  return state, train_step, validate


def _batches(
  config, directory, dataset, seeds, mesh
) -> Callable[[int], Iterator[types.FinetuneBatch]]:
  """Start step -> every seed's batches, on the devices."""
  stream = pair_batches.stream_of(config, directory, dataset, whole=True)
  own = population.local_seeds(len(seeds), mesh)

  def put(batches):
    return population.put_batches(dict(zip(own, batches, strict=True)), len(seeds), mesh)

  def start_at(start: int):
    each = zip(*(stream(seeds[place], start) for place in own), strict=True)
    return loader.prefetch(each, put, config.data.prefetch)

  return start_at
