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
from rndpo_jax.stages import base, finetune

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
  `results`. A killed sweep goes on from its latest state; the states are deleted at the end, and no
  parameters are kept: a single job makes those of the best member again, with all that belongs to
  it. `config.finetune.beta` and `learning_rate` are not read.

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
  content = {**results(grid, directory, diverged), "form": form, "num_devices": mesh.size}
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
    if not values or len({f"{x:g}" for x in values}) < len(values):
      raise ConfigError(
        f"--{name}: found {values}, expected one or more values that differ in six digits"
      )
    wrong = [x for x in values if name != "seeds" and not (x > 0 and math.isfinite(x))]
    if wrong:
      raise ConfigError(f"--{name}: found {wrong[0]}, expected finite values above 0")
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
  options, seeds = config.finetune, grid["seeds"]
  dataset = pipeline.open_dataset(config, workdir)
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = base.load(config, workdir)[0]
  loss_fn = finetune.make_loss_fn(
    segmenter,
    num_classes=dataset.num_classes,
    size=dataset.size,
    **finetune.loss_options(config),
  )
  unit = options.copy_and_resolve_references()
  unit.learning_rate = 1.0
  optimizer = finetune.optimizer(unit)
  settings = population.grid(grid["betas"], grid["learning_rates"])
  averages = options.ema_decay > 0
  state = population.make_state(
    params, optimizer, len(seeds), len(settings.beta), mesh, with_ema=averages
  )
  train_step = population.make_step(
    loss_fn,
    optimizer,
    mesh,
    form=form,
    accumulate_steps=options.accumulate_steps,
    ema_decay=options.ema_decay,
  )
  validate = population.make_validate(
    segmenter.apply, dataset.num_classes, base.validation_batches(config, dataset), mesh, form=form
  )
  keys = jnp.stack([finetune.run_key(seed) for seed in seeds])
  with contextlib.ExitStack() as stack:
    saver = Saver(
      directory, checkpoint.digest(params), options.keep_checkpoints, options.checkpoint_minutes
    )
    stack.enter_context(contextlib.closing(saver))
    start, state = saver.resume(state, "sweep")
    rows = stack.enter_context(contextlib.closing(_Rows(directory, grid, start)))
    stream = _batches(config, workdir, dataset, seeds, mesh, params, start)
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
        saver.save_state(step, state)
      if stop:
        raise preemption.Preempted(f"sweep: saved at step {step}")
  return jax.device_get(state.diverged)


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


def member_directory(directory: os.PathLike, seed: int, beta: float, rate: float) -> epath.Path:
  """The folder of a member in `sweep/`."""
  return epath.Path(directory) / f"seed-{seed}_beta-{beta:g}_lr-{rate:g}"


def _members(grid: dict[str, list]) -> list[tuple[int, float, float]]:
  """(seed, beta, learning rate) in the order of the axes [N, R]."""
  settings = [(b, r) for b in grid["betas"] for r in grid["learning_rates"]]
  return [(seed, *setting) for seed in grid["seeds"] for setting in settings]


class _Rows:
  """A `logbook.Rows` for each member, which ends where the member diverges."""

  def __init__(self, directory: epath.Path, grid: dict[str, list], start: int):
    self._members = _members(grid)
    self._rows, self._said = [], set()
    for member in self._members:
      folder = member_directory(directory, *member)
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

  def close(self) -> None:
    for rows in self._rows:
      rows.close()


def _base_dice(workdir) -> float:
  return files.read_json(base.member_directory(workdir, 0) / "selected.json")["val_dice"]


def results(grid: dict[str, list], directory: os.PathLike, diverged: np.ndarray) -> dict[str, Any]:
  """What the sweep found, from the members' `metrics.jsonl`.

  Returns:
    grid; split, "val"; members, one row each: seed, beta, learning_rate, curve of step and
    val_dice, last (its last value, None where the member diverged), diverged (the step, or None);
    settings, one row for each beta and learning rate: last, the mean over the seeds, and num_seeds,
    num_diverged; a setting with a member that diverged has no mean; best: the setting of the
    highest mean at the LAST step, the first of equals, or None where every one diverged.
  """
  members = []
  for (seed, beta, rate), at in zip(_members(grid), diverged.ravel().tolist(), strict=True):
    rows = logbook.read_rows(member_directory(directory, seed, beta, rate), "val")
    curve = [{"step": row["step"], "val_dice": row["val_dice"]} for row in rows]
    last = None if at else curve[-1]["val_dice"]
    row = {"seed": seed, "beta": beta, "learning_rate": rate}
    members.append({**row, "last": last, "diverged": at or None, "curve": curve})
  settings = []
  for _, beta, rate in _members({**grid, "seeds": grid["seeds"][:1]}):
    last = [m["last"] for m in members if (m["beta"], m["learning_rate"]) == (beta, rate)]
    lost = last.count(None)
    mean = None if lost else float(np.mean(last))
    row = {"beta": beta, "learning_rate": rate, "last": mean}
    settings.append({**row, "num_seeds": len(last), "num_diverged": lost})
  known = [row for row in settings if row["last"] is not None]
  best = max(known, key=lambda row: row["last"]) if known else None
  return {"grid": grid, "split": "val", "best": best, "settings": settings, "members": members}


def summary(content: dict[str, Any]) -> str:
  """The table that a sweep ends with: validation Dice at the last step, each seed and the mean."""
  seeds = content["grid"]["seeds"]
  head = f"{'beta':>10}{'learning rate':>16}" + "".join(f"{f'seed {s}':>10}" for s in seeds)
  lines = [f"{head}{'mean':>10}"]
  for row in content["settings"]:
    own = [
      member
      for member in content["members"]
      if all(member[name] == row[name] for name in ("beta", "learning_rate"))
    ]
    shown = "".join(f"{_dice(member['last']):>10}" for member in own)
    chosen = "  <- best" if row == content["best"] else ""
    line = f"{row['beta']:>10g}{row['learning_rate']:>16g}{shown}{_dice(row['last']):>10}{chosen}"
    lines.append(line)
  lines.append(
    f"validation Dice at the last step, the base {content['base']:.4f}; the test split was not "
    "touched"
  )
  return "\n".join(lines)


def _dice(value: float | None) -> str:
  return "diverged" if value is None else f"{value:.4f}"
