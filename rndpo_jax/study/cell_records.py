"""Records of finished cells: one JSON line each, and all that tables and figures are made of."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from rndpo_jax import errors
from rndpo_jax.data import records as data_records
from rndpo_jax.evaluation import results as results_lib
from rndpo_jax.runtime import files
from rndpo_jax.study import grid
from rndpo_jax.training import metric_writer

FILE, FAILURES = "records.jsonl", "failures.jsonl"
_DIGITS = 4  # of Dice values: far below what one pixel of a case is worth
_KL_DIGITS = 6


def read(path: os.PathLike) -> dict[str, dict[str, Any]]:
  """Records by key; nothing if there is no file.

  Raises:
    FileError: if a line is no JSON object with a key.
  """
  path = epath.Path(path)
  if not path.exists():
    return {}
  found = {}
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      record = json.loads(line)
      found[record["key"]] = record
    except (ValueError, KeyError, TypeError) as error:
      raise errors.FileError(
        f"{path}: line {number} is no record of a study ({error}); delete the line, and the same "
        "command makes that cell again"
      ) from error
  return found


def add(folder: os.PathLike, record: Mapping[str, Any]) -> None:
  """Keeps the record of a finished cell; what is in `failures.jsonl` of it goes."""

  def change(found):
    found[record["key"]] = record

  with _held(folder):
    _rewrite(epath.Path(folder) / FILE, change)
    _rewrite(epath.Path(folder) / FAILURES, lambda found: found.pop(record["key"], None))


def add_failure(folder: os.PathLike, cell: grid.Cell, message: str) -> None:
  """Keeps that a cell failed, and with what error; over an earlier failure of it."""
  line = {**_identity(cell), "error": message[:1000], "time": now()}
  with _held(folder):
    _rewrite(epath.Path(folder) / FAILURES, lambda found: found.__setitem__(cell.key, line))


def now() -> str:
  """The time as records have it: UTC, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _held(folder: os.PathLike) -> Iterator[None]:
  """Holds a folder of this host against other processes, for the moment of a change."""
  os.makedirs(folder, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _rewrite(path: epath.Path, change: Callable[[dict], Any]) -> None:
  """Writes the file with a change, sorted by key, so that a diff shows what is new."""
  before = read(path)
  after = dict(before)
  change(after)
  if after != before:
    lines = [
      json.dumps(after[key], separators=(",", ":"), allow_nan=False) for key in sorted(after)
    ]
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def make(
  cell: grid.Cell, workdir: epath.Path, base_workdir: epath.Path, seconds: Mapping[str, float]
) -> dict[str, Any]:
  """The record of a finished cell, from the files of its work directory.

  Args:
    cell: what was run.
    workdir: of the cell, with `results.json`, `evaluate/` and `finetune/`.
    base_workdir: with the data that tell which cases are of one patient.
    seconds: stage -> seconds.

  Returns:
    What the page beside this file says. Of a tuning cell all test figures are left out.
  """
  results = files.read_json(workdir / "results.json", base=dict, finetuned=dict, curve=list)
  splits = ("val",) if cell.tuning else ("val", "test")
  last = results["curve"][-1]["step"]
  steps = [point["step"] for point in results["curve"]]
  tail = steps[1:][-max(1, len(steps[1:]) // 3) :]
  record = {
    **_identity(cell),
    "config": grid.changed(cell),
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    "device": jax.devices()[0].device_kind,
    "time": now(),
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "mb": {"base": _megabytes(base_workdir), "cell": _megabytes(workdir)},
    "steps": last,
    "base": {split: _round(results["base"][split]["dice"]) for split in splits},
    "rankseg": {s: _round(results["rankseg"][s]["dice"]) for s in splits if _has_rankseg(results)},
    "curve": _curve(results["curve"], splits, _val_kl(workdir, results["curve"][-1]["step"]))
    | _label_free(results),
    "val": _sustained([point["val_dice"] for point in results["curve"]]),
    "pairs": _pairs(results),
  }
  if results.get("left_out"):
    record["left_out"] = [entry["phase"] for entry in results["left_out"]]
  judge = results.get("judges", {}).get(results.get("judge"), {})
  record["judge"] = {
    "name": results.get("judge"),
    **{k: judge[k] for k in ("pair_accuracy", "pair_accuracy_ci", "split") if k in judge},
  }
  if not cell.tuning:
    record["test"] = _sustained([point["test_dice"] for point in results["curve"]])
    record |= _per_case(workdir, base_workdir, last, tail)
    if "delivered" in results:  # without its table: the curve is here
      entries = results["delivered"].items()
      record["delivered"] = {k: v for k, v in entries if not isinstance(v, list)}
  return results_lib.plain(_rounded(record))


def twin(cell: grid.Cell, records: Mapping[str, Mapping]) -> dict[str, Any] | None:
  """The record of a cell, from that of another one with the same config; None if there is none.

  A point of an axis may be what a recipe is anyway.
  """
  here = (cell.data, cell.tuning, grid.changed(cell))  # two data sets may differ by root alone
  for record in records.values():
    if (record["data"], record["tuning"], record["config"]) == here:
      return {**record, **_identity(cell)}
  return None


def _identity(cell: grid.Cell) -> dict[str, Any]:
  names = ("key", "data", "budget", "draw", "seed", "recipe", "axes", "tuning")
  return {name: getattr(cell, name) for name in names}


def _curve(points, splits, val_kl: Mapping[int, float]) -> dict[str, list]:
  """Columns of the curve: steps, Dice of each split, KL if it is known."""
  curve = {"step": [point["step"] for point in points]}
  curve |= {split: [_round(point[f"{split}_dice"]) for point in points] for split in splits}
  if val_kl:
    curve["val_kl"] = [
      round(val_kl[step], _KL_DIGITS) if step in val_kl else None for step in curve["step"]
    ]
  return curve


def _label_free(results: Mapping) -> dict[str, list]:
  """Columns of the curve that need no labels; none of a run that did not measure them."""
  points = results.get("label_free", {}).get("checkpoints", [])
  known = points[0] if points else {}
  names = [name for name in ("kl", "agreement", "dice_to_base", "labelled_dice") if name in known]
  return {name: [_round_kl(point[name]) for point in points] for name in names}


def _round_kl(value: float | None) -> float | None:
  return None if value is None else round(value, _KL_DIGITS)


def _val_kl(workdir: epath.Path, last_step: int) -> dict[int, float]:
  if not (workdir / "finetune" / "metrics.jsonl").exists():
    return {}
  rows = metric_writer.read_rows(workdir / "finetune", "val")
  # Those of the last phase, whose steps are the last ones of the curve.
  before = last_step - rows[-1]["step"]
  return {
    before + row["step"]: row["val_kl"] for row in rows if np.isfinite(row.get("val_kl", np.nan))
  }


def _sustained(dice: list[float]) -> dict[str, float]:
  """Figures of a curve whose first point is the base: see `evaluation.results.sustained`."""
  held = results_lib.sustained([{"test_dice": value} for value in dice])
  return {
    "last": held["final"], "last_third_mean": held["last_third_mean"], "peak": held["peak"],
    "drop": held["drop_from_peak"],
  }  # fmt: skip


def _pairs(results: Mapping) -> dict[str, Any]:
  pairs = results.get("pairs") or {}
  return {name: pairs[name] for name in ("count", "region_size") if name in pairs}


def _per_case(workdir, base_workdir, last: int, tail: list[int]) -> dict[str, Any]:
  """Test Dice of each case: of the base, of the last step, and the mean of the last third."""
  dice = {
    step: _case_dice(workdir / "evaluate" / f"curve-{step}.json") for step in (0, *tail, last)
  }
  ids = sorted(dice[0])
  table = data_records.read(base_workdir / "data")["records"]
  patient_of = {entry["case_id"]: entry["group_id"] for entry in table}
  patients = sorted({patient_of[case] for case in ids})
  return {
    "cases": {
      "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8],
      "patient": [patients.index(patient_of[case]) for case in ids],
      "base": [dice[0][case] for case in ids],
      "last": [dice[last][case] for case in ids],
      "sustained": [float(np.mean([dice[step][case] for step in tail])) for case in ids],
    }
  }


def _case_dice(path: epath.Path) -> dict[str, float]:
  """Case id -> Dice of the test cases, from the pixel counts that the stage 'evaluate' keeps."""
  entries = files.read_json(path, cases=list)["cases"]
  return {
    entry["case_id"]: results_lib.case_dice(
      results_lib.Case("test", entry["case_id"], np.array(entry["counts"], np.int64))
    )
    for entry in entries
    if entry["split"] == "test"
  }


def _megabytes(folder: epath.Path) -> float:
  """What the files of a folder take."""
  files_of = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
  return round(sum(map(os.path.getsize, files_of)) / 1e6, 1)


def _round(value: float) -> float:
  return round(float(value), _DIGITS)


def _rounded(value: Any) -> Any:
  """Floats at so many digits as a record keeps; the curve has its own, a config all of them."""
  if isinstance(value, Mapping):
    return {k: v if k in ("config", "curve", "axes") else _rounded(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(item) for item in value]
  return _round(value) if isinstance(value, (float, np.floating)) else value


def _has_rankseg(results) -> bool:
  """Older results lack it, and those of the native mode have none."""
  return all(results.get("rankseg", {"": None}).values())
