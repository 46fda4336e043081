"""What is left of a study, and what that takes: the dry run. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax.study import cell_records, grid, study_loop

# Where nothing is known yet, measured on 2 CPU cores with PH2 at 64 x 64.
_BASE_SECONDS, _CELL_SECONDS, _CELL_STEPS = 90.0, 90.0, 300
_BASE_MB, _CELL_MB = 40.0, 60.0


def describe(
  cells: Sequence[grid.Cell], workdir: os.PathLike | None, records: os.PathLike
) -> list[str]:
  """Lines that say how many cells and bases are left, and their hours and disk space."""
  found = cell_records.read(epath.Path(records) / cell_records.FILE)
  failures = cell_records.read(epath.Path(records) / cell_records.FAILURES)
  left = [cell for cell in cells if cell.key not in found]
  bases = {cell.base_key: cell for cell in left if not _base_is_there(workdir, cell.base_key)}
  estimates = [cell_seconds(cell, found.values()) for cell in left]
  seconds = sum(value for value, _ in estimates)
  seconds += sum(base_seconds(cell, found.values()) for cell in bases.values())
  sources = {source: sum(s == source for _, s in estimates) for _, source in estimates}
  failed = sum(cell.key in failures for cell in left)
  lines = [
    f"cells: {len(cells)}, with a record {len(cells) - len(left)}, left {len(left)}"
    + (f" ({failed} failed and are tried again)" if failed else ""),
    f"bases: {len({cell.base_key for cell in cells})}, to make {len(bases)}",
    f"hours left, in one process: {seconds / 3600:.1f}"
    + "".join(f"; {count} cells by {source}" for source, count in sources.items()),
    _disk(found.values(), len({cell.base_key for cell in cells})),
  ]
  for data in dict.fromkeys(cell.data for cell in cells):
    own = [cell for cell in cells if cell.data == data]
    done = sum(cell.key in found for cell in own)
    recipes = ", ".join(dict.fromkeys(cell.recipe for cell in own))
    lines.append(f"  {data}: {done} of {len(own)} cells; recipes: {recipes}")
  return lines


def cell_seconds(cell: grid.Cell, records) -> tuple[float, str]:
  """Seconds of a cell without its base, and what they are estimated from.

  In proportion to the steps: as records of the same data set and recipe had it; else as those of
  the same data set; else a default of 90 s for 300 steps. Of a record whose first phases were
  copied from another cell's, the seconds are only those of the rest.
  """
  steps = sum(phase.finetune.num_steps for phase in config_lib.every_phase(cell.config))
  own = [record for record in records if record["data"] == cell.data]
  same = [record for record in own if record["recipe"] == cell.recipe]
  if not own:
    return _CELL_SECONDS * steps / _CELL_STEPS, "a default of 90 s for 300 steps"
  rate = _mean(same or own, lambda record: _seconds(record) / record["steps"])
  return rate * steps, "records of the same recipe" if same else "steps of other recipes"


def base_seconds(cell: grid.Cell, records) -> float:
  """Seconds of a base: the mean of that data set's, else a default."""
  own = [record for record in records if record["data"] == cell.data]
  known = [r for r in own if "base" in r["seconds"]]
  return _mean(known, _base) if known else _BASE_SECONDS


def _mean(records: Sequence[Mapping], value: Callable[[Mapping], float]) -> float:
  return float(np.mean([value(record) for record in records]))


def _base(record: Mapping) -> float:
  return sum(record["seconds"].get(name, 0.0) for name in study_loop.BASE_STAGES)


def _seconds(record: Mapping) -> float:
  return sum(record["seconds"].values()) - _base(record)


def _base_is_there(workdir: os.PathLike | None, key: str) -> bool:
  return bool(workdir) and study_loop.has_base(epath.Path(workdir) / "bases" / key)


def _disk(records, num_bases: int) -> str:
  """What the bases take, which stay, and the cell that a process is at."""
  sizes = [record["mb"] for record in records if "mb" in record]
  base = max((size["base"] for size in sizes), default=_BASE_MB)
  cell = max((size["cell"] for size in sizes), default=_CELL_MB)
  return (
    f"disk: bases {num_bases * base / 1000:.1f} GB ({base:.0f} MB each"
    f"{'' if sizes else ', a guess'}), and {cell:.0f} MB for the cell that a process is at"
  )
