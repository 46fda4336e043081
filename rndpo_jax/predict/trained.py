"""What a work directory knows of its network: how images go in, and the parameters to use."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, types
from rndpo_jax import workdir as workdir_lib
from rndpo_jax.data import records
from rndpo_jax.evaluation import delivered
from rndpo_jax.runtime import files
from rndpo_jax.stages import base, evaluate, phases
from rndpo_jax.training import checkpoint

CHECKPOINTS = ("delivered", "last", "best", "base")


class Trained(NamedTuple):
  """A trained network without its data.

  Attributes:
    config: of the last phase.
    num_classes: C, background among them.
    class_names: one a class, background first.
    num_channels: I.
    spatial_dims: 2 or 3.
    spacing_unit: of the data: 'mm', or 'voxel' if the spacing is unknown, as of pictures.
    size: the network's input: the model's grid, or in the native mode a patch of it.
    crop: centre crop in source pixels, () for none.
    normalization: 'zscore' or 'minmax'.
    native: how images come to the model's spacing; None in the simple mode.
    mirror_axes: spatial axes along which training flipped images.
    has_ignored: whether masks of the data may have held pixels of unknown class.
    fingerprint: of the prepared data that it was trained on.
    step: of the parameters, counted over all phases; 0 is the base.
    params: a numpy tree.
  """

  config: ml_collections.ConfigDict
  num_classes: int
  class_names: list[str]
  num_channels: int
  spatial_dims: int
  spacing_unit: str
  size: tuple[int, ...]
  crop: tuple[int, ...]
  normalization: str
  native: records.Native | None
  mirror_axes: tuple[int, ...]
  has_ignored: bool
  fingerprint: str
  step: int = 0
  params: types.Params = None

  @property
  def of_pictures(self) -> bool:
    """Whether it was trained on pictures; in the simple mode perhaps on others without spacing."""
    return self.spacing_unit == "voxel"

  def mirrors(self, asked: bool | None) -> bool:
    """Whether prediction averages over flips: as it is asked, or else as evaluation did.

    A run of an older version, whose config does not say, did not.
    """
    return self.config.evaluate.get("mirror", False) if asked is None else asked


def load(workdir: os.PathLike, which: str) -> Trained:
  """Reads `config.json`, `data/records.json` and the parameters; the data themselves stay unread.

  Args:
    workdir: of a run.
    which: of CHECKPOINTS, or a step in digits.

  Raises:
    errors.ConfigError: if there is no such folder or checkpoint, saying which there are.
    errors.DataError, errors.CheckpointError, errors.ProvenanceError: if a file cannot be used.
  """
  workdir_lib.check_path("--workdir", workdir)
  workdir = epath.Path(workdir)
  if which not in CHECKPOINTS and not which.isdecimal():
    raise errors.ConfigError(
      f"--checkpoint: found {which!r}, expected {', '.join(CHECKPOINTS)} or a step in digits"
    )
  config = _config(workdir)
  home = epath.Path(config.base.workdir or workdir)
  if not (home / "data" / records.FILE).exists():
    key = "config.base.workdir" if config.base.workdir else "--workdir"
    raise errors.ConfigError(
      f"{key}: {home / 'data' / records.FILE} is missing, which says what the network was trained "
      "on; bring it back, or run the stage 'prepare' again"
    )
  facts = records.read(home / "data")
  trained = Trained(
    config=config_lib.of_phase(config),
    size=config_lib.input_size(config),
    crop=tuple(config.data.crop),
    normalization=config.data.normalization,
    mirror_axes=base.mirror_axes(config, workdir, facts["spatial_dims"]),
    **{name: facts[name] for name in Trained._fields if name in facts},
  )
  step, params = _params(workdir, config, trained, which)
  return trained._replace(step=step, params=params)


def _config(workdir: epath.Path) -> ml_collections.ConfigDict:
  path = workdir / "config.json"
  if not path.exists():
    raise errors.ConfigError(
      f"--workdir: {path} is missing; give the work directory of a run (of launch.run)"
    )
  content = files.read_json(path, config=dict)["config"]
  return ml_collections.ConfigDict({name: _tuples(value) for name, value in content.items()})


def _tuples(value: Any) -> Any:
  """JSON's lists as the tuples that they were."""
  if isinstance(value, dict):
    return {name: _tuples(item) for name, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _params(workdir, config, trained, which: str) -> tuple[int, types.Params]:
  """(step counted over all phases, parameters)."""
  if which == "delivered":
    return _delivered(workdir)
  if which == "best":
    path = workdir / "results.json"
    if not path.exists():
      raise errors.ConfigError(
        f"--checkpoint: 'best' needs {path}, which is missing; run the stage 'evaluate' first, or "
        "take --checkpoint=last"
      )
    step = files.read_json(path, selected=dict)["selected"]["step"]
    if step is None:
      raise errors.ConfigError(
        f"--checkpoint: 'best' is the best on validation, and {workdir} has no validation cases; "
        "take 'delivered' or 'last'"
      )
  else:
    step = {"base": 0, "last": None}.get(which, which)
  if not (workdir / "base" / "selected.json").exists():
    raise errors.ConfigError(
      f"--workdir: {workdir / 'base' / 'selected.json'} is missing; run the stage 'base' first"
    )
  places = {}
  if step != 0 and str(step) != "0":
    places = {number: place for number, *place in phases.checkpoints(config, workdir)}
    step = max(places) if step is None else int(step)
    if step not in places:
      there = ", ".join(map(str, (0, *places)))
      raise errors.ConfigError(
        f"--checkpoint: {workdir} has no checkpoint of step {step}; there are those of {there} (0 "
        "is the base)"
      )
  step = int(step)
  return step, evaluate.params_of_step(workdir, trained, places)(step)


def _delivered(workdir: epath.Path) -> tuple[int, types.Params]:
  folder = workdir / delivered.FOLDER
  if not (folder / delivered.FILE).exists():
    raise errors.ConfigError(
      f"--checkpoint: {folder / delivered.FILE} is missing; run the stage 'evaluate' (launch.run "
      "with the same config and --workdir), or take --checkpoint=last or --checkpoint=base"
    )
  step = files.read_json(folder / delivered.FILE, step=int)["step"]
  return step, checkpoint.restore_params(folder / "params", step, stage_directory=folder)
