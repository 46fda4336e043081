"""What a sweep found: members, means over the seeds, the best on validation, and the table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.checks import config_unread
from rndpo_jax.runtime import files
from rndpo_jax.training import metric_writer


def member_directory(directory: os.PathLike, seed: int, beta: float, rate: float) -> epath.Path:
  """The folder of a member in `sweep/`."""
  return epath.Path(directory) / f"seed-{seed}_beta-{beta:g}_lr-{rate:g}"


def members_of(grid: dict[str, list]) -> list[tuple[int, float, float]]:
  """(seed, beta, learning rate) in the order of the axes [N, R]."""
  settings = [(b, r) for b in grid["betas"] for r in grid["learning_rates"]]
  return [(seed, *setting) for seed in grid["seeds"] for setting in settings]


def results(
  grid: dict[str, list], directory: os.PathLike, diverged: np.ndarray, steps: list[int]
) -> dict[str, Any]:
  """What the sweep found, from the members' `metrics.jsonl`.

  Args:
    grid: betas, learning_rates and seeds.
    directory: `sweep/`.
    diverged: the step at which each member diverged, i32[N, R], 0 if it did not.
    steps: that were validated.

  Returns:
    grid; split, "val"; members, one row each: seed, beta, learning_rate, curve of step and
    val_dice, last (its last value, None if the member diverged), diverged (the step, or None);
    settings, one row for each beta and learning rate: last, the mean over the seeds, and num_seeds,
    num_diverged; a setting with a member that diverged has no mean; best: the setting of the
    highest mean at the LAST step, the first of equals, or None if every one diverged.

  Raises:
    files.FileError: if a member that did not diverge lacks a validation.
  """
  members = []
  for (seed, beta, rate), at in zip(members_of(grid), diverged.ravel().tolist(), strict=True):
    rows = metric_writer.read_rows(member_directory(directory, seed, beta, rate), "val")
    curve = [{"step": row["step"], "val_dice": row["val_dice"]} for row in rows]
    validated = [point["step"] for point in curve]
    if not at and validated != steps:
      raise errors.FileError(
        f"{member_directory(directory, seed, beta, rate) / 'metrics.jsonl'}: holds the validations "
        f"of steps {validated}, expected {steps}; bring it back, or delete the folder {directory} "
        "and run the same command again"
      )
    last = None if at else curve[-1]["val_dice"]
    row = {"seed": seed, "beta": beta, "learning_rate": rate}
    members.append({**row, "last": last, "diverged": at or None, "curve": curve})
  settings = []
  for _, beta, rate in members_of({**grid, "seeds": grid["seeds"][:1]}):
    last = [m["last"] for m in members if (m["beta"], m["learning_rate"]) == (beta, rate)]
    lost = last.count(None)
    mean = None if lost else float(np.mean(last))
    row = {"beta": beta, "learning_rate": rate, "last": mean}
    settings.append({**row, "num_seeds": len(last), "num_diverged": lost})
  known = [row for row in settings if row["last"] is not None]
  best = max(known, key=lambda row: row["last"]) if known else None
  return {"grid": grid, "split": "val", "best": best, "settings": settings, "members": members}


def base_dice(workdir: os.PathLike) -> float:
  """Validation Dice of the base, on the model's grid."""
  path = epath.Path(workdir) / "base" / "selected.json"
  return files.read_json(path, val_dice=float)["val_dice"]


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


def overrides(config, given: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, Any]:
  """Keys of the config, and their values, that make a single job of a setting.

  Args:
    config: of the sweep, which was of its last phase; those before that one stay as they are.
    given: those of the sweep's own command; of them what no phase would read any more is left out.
    best: with beta and learning_rate.
  """
  own = {"finetune.beta": best["beta"], "finetune.learning_rate": best["learning_rate"]}
  if not config.phases:
    return {**given, **own}
  *earlier, last = config.phases
  tables = [config_unread.readers(one) for one in config_lib.every_phase(config)[: len(earlier)]]
  kept = {
    key: value
    for key, value in given.items()
    if key not in own or any(config_unread.is_read(table, key) for table in tables)
  }
  return {**kept, "phases": (*earlier, {**last, **own})}


def _dice(value: float | None) -> str:
  return "diverged" if value is None else f"{value:.4f}"
