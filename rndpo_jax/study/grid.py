"""A study file -> its cells: one job each, with the base that it shares with others.

A study is a dict:

  {"data": {NAME: {"config": "configs/ph2.py", "budgets": (10,), "set": {"data.size": (64, 64)}}},
   "draws": (0, 1, 2),                   data.split_seed: which patients are in which split
   "seeds": (0, 1),                      config.seed
   "set": {KEY: value},                  of every cell, after the recipe
   "arms": [{"recipes": ("rn_dpo", "dpo"),
             "axes": {"finetune.beta": (3.0, 10.0),                  a key and its values, or
                      "judge": {"oracle": {"judge.name": "oracle"}}},   names and what each sets
             "set": {KEY: value}, "data": (NAME, ...), "draws": (0,), "seeds": (0,),
             "tuning": False}]}          True: judged on validation alone; no test figure is kept

A cell of an arm is one of (data set x budget x draw x seed x recipe x value of each axis). Its
config is that of the data set's file without a recipe, then the data set's `set`, budget, draw and
seed, the recipe, the study's `set`, the arm's `set` and the axes, each over what came before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from rndpo_jax import config as config_lib
from rndpo_jax import workdir as workdir_lib
from rndpo_jax.checks import config_unread
from rndpo_jax.errors import ConfigError
from rndpo_jax.training import image_terms

# Keys of each level of a study, with the type of the value.
_STUDY = {"data": Mapping, "draws": Sequence, "seeds": Sequence, "set": Mapping, "arms": Sequence}
_DATA = {"config": str, "budgets": Sequence, "set": Mapping}
_ARM = {
  "recipes": Sequence, "axes": Mapping, "set": Mapping, "data": Sequence, "draws": Sequence,
  "seeds": Sequence, "tuning": bool,
}  # fmt: skip
_GATE = "judge.gate."
# Sections that make a base what it is; `augment` is that of the data set's config.
_BASE_SECTIONS = ("data", "model", "base")


class Cell(NamedTuple):
  """One job of a study.

  Attributes:
    key: its name in records and folders: what it is, and a digest of its config.
    data: name of the data set in the study; budget: data.num_labelled; draw: data.split_seed.
    axes: axis -> value, or name of the value.
    tuning: whether it is judged on validation alone.
    config: of the job, without `base.workdir`.
    base_key: of the base; `base_config` is that of the job which makes it.
  """

  key: str
  data: str
  budget: int
  draw: int
  seed: int
  recipe: str
  axes: dict[str, Any]
  tuning: bool
  config: ml_collections.ConfigDict
  base_key: str
  base_config: ml_collections.ConfigDict

  @property
  def label(self) -> str:
    """Recipe and axes: what runs of other draws and seeds have in common."""
    return label(self.recipe, self.axes)


def label(recipe: str, axes: Mapping[str, Any]) -> str:
  """The recipe with its axes, as 'rn_dpo, finetune.beta=3'."""
  return ", ".join([recipe, *(f"{axis}={_text(value)}" for axis, value in axes.items())])


def load_file(path: os.PathLike, function: str) -> Callable:
  """A function of a Python file, such as get_config or get_study.

  Raises:
    ConfigError: if there is no such file or function.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"{path}: no such file, expected one with {function}()")
  spec = importlib.util.spec_from_file_location(f"study_file_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, function):
    raise ConfigError(f"{path}: has no {function}()")
  return getattr(module, function)


def expand(
  study: Mapping[str, Any],
  apply_recipe: Callable[[ml_collections.ConfigDict, str], None],
  roots: Mapping[str, str],
  only: str = "",
) -> list[Cell]:
  """The cells of a study, arm after arm, in each those of a draw and seed one after another.

  A cell of two arms is there once.

  Args:
    study: as this file's docstring says.
    apply_recipe: (config, name) sets the keys of the recipe.
    roots: data set of the study -> folder of its files, its `data.root`.
    only: leaves out cells whose key does not have this in it.

  Raises:
    ConfigError: on a key that is unknown or of another type, or a config that cannot be made,
      naming the cell.
  """
  _check(study, _STUDY, "study", ("data", "arms"))
  for name, entry in study["data"].items():
    _check(entry, _DATA, f"study: data {name!r}", ("config",))
  unknown = sorted(set(roots) - set(study["data"]))
  if unknown:
    raise ConfigError(
      f"--roots: {unknown[0]!r} is no data set of the study; known: {', '.join(study['data'])}"
    )
  cells: dict[str, Cell] = {}
  for number, arm in enumerate(study["arms"]):
    _check(arm, _ARM, f"study: arms[{number}]", ("recipes",))
    own = _cells(study, arm, apply_recipe, roots)
    for cell in sorted(own, key=lambda cell: (cell.draw, cell.seed)):
      cells.setdefault(cell.key, cell)
  _check_labels(cells.values())
  found = [cell for cell in cells.values() if only in cell.key]
  if not found:
    raise ConfigError(f"--only: no cell of {len(cells)} has {only!r} in its key")
  return found


def _check_labels(cells: Iterable[Cell]) -> None:
  """Refuses two cells that tables would take for two runs of one arm."""
  seen: dict[tuple, Cell] = {}
  for cell in cells:
    place = (cell.data, cell.budget, cell.draw, cell.seed, cell.label, cell.tuning)
    other = seen.setdefault(place, cell)
    if other is not cell:
      raise ConfigError(
        f"study: the cells {other.key} and {cell.key} differ in 'set' alone, so that tables would "
        "mix them; give what differs as an axis"
      )


def _without_recipe(get_config: Callable) -> Callable[[], ml_collections.ConfigDict]:
  """Of a file whose get_config takes a recipe the config without one, for each cell has its own."""
  takes_one = "recipe" in inspect.signature(get_config).parameters
  return functools.partial(get_config, recipe="") if takes_one else get_config


def _cells(study, arm, apply_recipe, roots) -> Iterator[Cell]:
  """The cells of one arm."""
  for data in arm.get("data", tuple(study["data"])):
    if data not in study["data"]:
      raise ConfigError(f"study: an arm names the data set {data!r}, which is not in 'data'")
    entry = study["data"][data]
    get_config = _without_recipe(load_file(entry["config"], "get_config"))
    budgets = entry.get("budgets") or (get_config().data.num_labelled,)
    draws, seeds = (arm.get(name, study.get(name, (0,))) for name in ("draws", "seeds"))
    rows = itertools.product(draws, seeds, budgets, arm["recipes"], _points(arm.get("axes", {})))
    for draw, seed, budget, recipe, (axes, overrides) in rows:
      name = f"{data}-n{budget}-d{draw}-s{seed}-{recipe}"
      name += "".join(f"-{axis}={_text(value)}" for axis, value in axes.items())
      name = re.sub(r"[^\w.=+-]", "_", name + ("-tune" if arm.get("tuning") else ""))
      try:
        first = get_config()
        _update(first, {
          **entry.get("set", {}), "data.num_labelled": budget, "data.split_seed": draw,
          "seed": seed, "data.root": roots.get(data, ""),
        })  # fmt: skip
        config = first.copy_and_resolve_references()
        apply_recipe(config, recipe)
        _update(config, {**study.get("set", {}), **arm.get("set", {}), **overrides})
      except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"cell {name}: {error}") from error
      for section in _BASE_SECTIONS:
        first[section] = config[section].copy_and_resolve_references()
      sections = (*_BASE_SECTIONS, "augment")
      base = {k: v for k, v in _changed(first).items() if k.partition(".")[0] in sections}
      yield Cell(
        f"{name}-{_digest(_changed(config))}", data, budget, draw, seed, recipe, axes,
        bool(arm.get("tuning")), config, f"{data}-n{budget}-d{draw}-s{seed}-{_digest(base)}", first,
      )  # fmt: skip


def _points(axes: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """Every point of the axes: (axis -> value or name, what it sets)."""
  options = []
  for axis, values in axes.items():
    if isinstance(values, Mapping):
      options.append([(axis, name, overrides) for name, overrides in values.items()])
    else:
      options.append([(axis, value, {axis: value}) for value in values])
  for point in itertools.product(*options):
    overrides = {key: value for *_, part in point for key, value in part.items()}
    yield {axis: value for axis, value, _ in point}, overrides


def phase_key(cell: Cell, number: int) -> str:
  """What the phases up to `number` of a cell are made by, as a short digest.

  Each begins where the one before ends, and so hangs on all that made that one, too.
  """
  own = config_lib.of_phase(cell.config, number)
  table = config_unread.readers(own)
  for section in () if "pairs" in image_terms.reads_of(own) else ("judge", "mine", "proposals"):
    table = {name: entry for name, entry in table.items() if not name.startswith(section)}
    table[section] = (False, "")
  found = {
    key: value
    for key, value in _values(own).items()  # with defaults: an older one made another phase
    if config_unread.is_read(table, key)
  }
  return _digest(found if number == 1 else [phase_key(cell, number - 1), found])


def changed(cell: Cell) -> dict[str, Any]:
  """The keys of a cell's config that are not at their default; paths of this machine left out."""
  return _changed(cell.config)


def _changed(config) -> dict[str, Any]:
  defaults = _values(config_lib.base_config())
  # By default the gate refuses, and then its keys always count.
  defaults = {key: value for key, value in defaults.items() if not key.startswith(_GATE)}
  return {
    key: value
    for key, value in _values(config).items()
    if key not in defaults or value != defaults[key]
  }


def _values(config) -> dict[str, Any]:
  """Every key that may change results."""
  values = json.loads(json.dumps(config_lib.leaves(config)))  # tuples become lists
  free = workdir_lib.OPERATIONAL + ("base.workdir",)
  # A gate that refuses ends a job or leaves a phase out; otherwise it changes no result.
  kept = _GATE if config.judge.gate.action == "refuse" else ()
  return {k: v for k, v in values.items() if not k.startswith(free) or k.startswith(kept)}


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _update(config, overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys; an unknown one raises an error."""
  known = config_lib.leaves(config)
  for key in overrides:
    if key not in known:
      raise KeyError(f"config.{key}: unknown key; see rndpo_jax/config.py")
  config.update_from_flattened_dict(dict(overrides))


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _check(found: Any, known: Mapping[str, type], where: str, needed: Sequence[str]) -> None:
  """Checks the keys of a dict, and the types of their values."""
  if not isinstance(found, Mapping):
    raise ConfigError(f"{where}: found {type(found).__name__}, expected a dict")
  for key, value in found.items():
    if key not in known:
      raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    if not isinstance(value, known[key]) or (known[key] is Sequence and isinstance(value, str)):
      raise ConfigError(f"{where}: {key!r} is {value!r}, expected {known[key].__name__.lower()}")
  missing = [key for key in needed if not found.get(key)]
  if missing:
    raise ConfigError(f"{where}: {missing[0]!r} is missing or empty")
