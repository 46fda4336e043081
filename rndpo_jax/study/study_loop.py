"""Runs the cells of a study, beside other processes that share its folder.

Bases are in DIR/bases/KEY, a cell at work in DIR/cells/KEY; a process holds what it works on by a
lock in DIR/claims/KEY, as a run holds its work directory, so that one that died is found out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.checks import config_checks, config_unread
from rndpo_jax.data import sources
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import files, lock, preemption, progress
from rndpo_jax.stages import prepare
from rndpo_jax.study import cell_records, grid

BASE_STAGES = ("prepare", "base")
# Of a cell the stage base copies the base that it shares.
CELL_STAGES = ("base", "mine", "finetune", "evaluate")
_WAIT_SECONDS = 15.0
_KEPT = "study: finished cells are kept"


def check(cells: Sequence[grid.Cell]) -> None:
  """Checks that every cell can run, before any does.

  Raises:
    ConfigError: naming the cell, and what its config, this machine or the data lack.
  """
  opened: dict[tuple[str, str], list] = {}
  drawn = set()
  for cell in cells:
    try:
      config_checks.validate(cell.base_config)
      config_checks.validate(cell.config)
      pipeline.check_here(cell.config)
      _check_root(cell)
      listed = (cell.data, _listing(cell.config.data))
      if listed not in opened:
        opened[listed] = sources.SOURCES[cell.config.data.source].open(cell.config).records
      if cell.base_key not in drawn:
        parts = prepare.split_cases(cell.config.data, opened[listed])
        _check_parts(parts)
        drawn.add(cell.base_key)
    except (errors.RndpoError, OSError) as error:
      raise ConfigError(f"cell {cell.key}: {error}") from error


def _listing(data) -> str:
  """All of a data section, which an axis may change, but what splits the listed cases."""
  split = {key.partition(".")[2] for key in config_unread.SAID}
  return json.dumps({k: v for k, v in data.to_dict().items() if k not in split}, sort_keys=True)


def _check_parts(parts: Mapping[str, Sequence[str]]) -> None:
  for name, key in (("val", "num_val"), ("test", "num_test")):
    if not parts[name]:
      raise ConfigError(
        f"config.data.{key}: there are no {name} cases, and a study is judged on validation and "
        "test; set it above 0"
      )


def _check_root(cell: grid.Cell) -> None:
  root = cell.config.data.root
  if cell.config.data.source == "phantom":
    return
  if not root or not epath.Path(root).is_dir():
    raise ConfigError(
      f"--roots: the data set {cell.data!r} needs the folder of its files, found {root!r}; give "
      f"--roots={cell.data}=DIR"
    )


def run(
  cells: Sequence[grid.Cell],
  workdir: os.PathLike,
  records: os.PathLike,
  keep: Sequence[str] = (),
) -> list[str]:
  """Runs what is not done; other processes may do the same at the same time.

  A cell that fails is written to `failures.jsonl` and left; the next start of the command tries
  it again.

  Args:
    cells: of `grid.expand`, checked.
    workdir: of bases and of cells at work.
    records: folder of `records.jsonl` and `failures.jsonl`.
    keep: what of a finished cell's work directory stays, by name of file or folder; 'all' keeps it.

  Returns:
    Keys of the cells that failed since the start.

  Raises:
    preemption.Preempted: after a signal.
    OSError: if a disk is full.
  """
  workdir, records = epath.Path(workdir), epath.Path(records)
  start = cell_records.now()
  broken: dict[str, str] = {}
  while True:
    left = _left(cells, records, start)
    if not left:
      break
    worked = False
    for cell in left:
      preemption.check(_KEPT)
      if cell.key in {c.key for c in _left([cell], records, start)}:
        worked |= _try_cell(cell, workdir, records, keep, broken)
    if not worked:
      progress.say(f"waiting for other processes, which are at the {len(left)} cells left")
      time.sleep(_WAIT_SECONDS)  # others are at work on all that is left
  failed = cell_records.read(records / cell_records.FAILURES)
  return [cell.key for cell in cells if cell.key in failed]


def _left(cells, records: epath.Path, start: str) -> list[grid.Cell]:
  """Cells without a record, and without a failure since the start."""
  done = set(cell_records.read(records / cell_records.FILE))
  failures = cell_records.read(records / cell_records.FAILURES)
  done |= {key for key, line in failures.items() if line["time"] >= start}
  return [cell for cell in cells if cell.key not in done]


def _try_cell(cell, workdir, records, keep, broken: dict[str, str]) -> bool:
  """Runs a cell, and its base if that is missing; False if another process is at either.

  A base that failed is put into `broken` with its error, and not tried again for the next cell.
  """
  base_workdir = workdir / "bases" / cell.base_key
  folder = workdir / "cells" / cell.key
  try:
    if cell.base_key in broken:
      raise errors.TrainingError(broken[cell.base_key])
    if not has_base(base_workdir):
      with _claim(workdir, cell.base_key) as mine:
        if not mine:
          return False
        if not has_base(base_workdir):
          _make_base(cell, base_workdir)
    with _claim(workdir, cell.key) as mine:
      if not mine:
        return False
      found = cell_records.read(records / cell_records.FILE)
      if cell.key in found:
        return True
      if (record := cell_records.twin(cell, found)) is not None:
        cell_records.add(records, record)
        return True
      progress.say(f"\n[cell] {cell.key}")
      seconds = _run_cell(cell, folder, base_workdir)
      cell_records.add(records, cell_records.make(cell, folder, base_workdir, seconds))
      _clean(folder, keep)
  except Exception as error:
    if isinstance(error, preemption.Preempted) or files.is_full_disk(error):
      raise
    if not isinstance(error, errors.RndpoError):
      traceback.print_exc()
    message = f"{type(error).__name__}: {error}".replace(os.fspath(workdir), "WORKDIR")
    progress.say(f"[cell] {cell.key} failed: {message}")
    cell_records.add_failure(records, cell, message)
    if not has_base(base_workdir):
      broken.setdefault(cell.base_key, f"its base failed: {error}")
  finally:
    jax.clear_caches()  # programs of a cell are not met again; on disk they are kept
    gc.collect()
  return True


@contextlib.contextmanager
def _claim(workdir: epath.Path, key: str) -> Iterator[bool]:
  """Holds a base or a cell; False if another process does."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(lock.hold(workdir / "claims" / key))
    except errors.FileError:
      yield False
      return
    yield True


def has_base(base_workdir: epath.Path) -> bool:
  """Whether a base is whole."""
  return (base_workdir / "seconds.json").exists() and pipeline.is_done("base", base_workdir)


def _make_base(cell: grid.Cell, base_workdir: epath.Path) -> None:
  progress.say(f"\n[base] {cell.base_key}")
  _drop_stale(cell.base_config, base_workdir)
  seconds = _timed(cell.base_config, base_workdir, BASE_STAGES)
  files.write_json(base_workdir / "seconds.json", seconds)


def _run_cell(cell: grid.Cell, folder: epath.Path, base_workdir: epath.Path) -> dict[str, float]:
  config = cell.config.copy_and_resolve_references()
  config.base.workdir = os.fspath(base_workdir)
  _drop_stale(config, folder)
  seconds = files.read_json(base_workdir / "seconds.json")
  shared = _shared_phases(cell, base_workdir)
  for name, path in shared.items():
    if not (path / "finetune" / "done.json").exists():
      break
    _copy_once(path, folder / name)
  own = _timed(config, folder, CELL_STAGES[:2])
  # At once: the rest of a cell takes long, and may be cut off.
  for name, path in shared.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    _copy_once(folder / name, path)
  # A job of one phase may be what others begin with.
  alone = base_workdir / "phases" / grid.phase_key(cell, 1) / "finetune"
  if not shared and (alone / "done.json").exists():
    _copy_once(alone, folder / "finetune")
  own |= _timed(config, folder, CELL_STAGES[2:])
  return {**own, **seconds}


def _copy_once(source: epath.Path, target: epath.Path) -> None:
  """Copies a folder that is not there; it appears whole, also if another process copies it too."""
  if target.exists():
    return
  part = target.parent / f".{target.name}.{os.getpid()}.tmp"
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(source, part)
  try:
    part.rename(target)
  except OSError:  # another process was first
    if not target.exists():
      raise
    shutil.rmtree(part)


def _shared_phases(cell: grid.Cell, base_workdir: epath.Path) -> dict[str, epath.Path]:
  """phase-N of a cell -> where it is kept for other cells that have the same phases up to it."""
  numbers = range(1, config_lib.num_phases(cell.config))
  return {
    f"phase-{number}": base_workdir / "phases" / grid.phase_key(cell, number) for number in numbers
  }


def _timed(config, folder: epath.Path, stages: Sequence[str]) -> dict[str, float]:
  """Runs stages; seconds of each that ran whole here, told by the files that end them."""
  before = time.time()
  pipeline.run(config, folder, stages)
  seconds = {}
  for name in stages:
    path = folder / pipeline.DONE[name]
    if path.exists() and (end := os.stat(path).st_mtime) >= before:  # epath's has no fractions
      seconds[name], before = end - before, end
  return seconds


def _drop_stale(config, folder: epath.Path) -> None:
  """Deletes what is left of a run that had another config, such as an older default."""
  if not folder.exists():
    return
  path = folder / "config.json"
  there = files.read_json(path, config=dict)["config"] if path.exists() else None
  if there != json.loads(config.to_json_best_effort()):
    folder.rmtree()


def _clean(folder: epath.Path, keep: Sequence[str]) -> None:
  """Deletes a finished cell's files but those to keep."""
  if "all" in keep:
    return
  for path in folder.iterdir():
    if path.name not in keep:
      path.rmtree() if path.is_dir() else path.unlink()
  if not any(folder.iterdir()):
    folder.rmdir()
