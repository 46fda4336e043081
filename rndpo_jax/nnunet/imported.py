"""A trained nnU-Net as the base of a run: what its plans decide, and what the run keeps of it."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import ml_collections
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import intensity
from rndpo_jax.nnunet import checkpoint_pth, folder
from rndpo_jax.nnunet import plans as plans_lib
from rndpo_jax.nnunet.preprocessing import Preprocessing
from rndpo_jax.runtime import files, progress

KEPT = "nnunet"  # folder of the work directory's `base/` that holds the model as it came
CHECKPOINT = "checkpoint_final.pth"
_NEEDED = ("plans.json", "dataset.json")
_PERHAPS = ("dataset_fingerprint.json",)


def folds(config) -> list[int | str]:
  """The folds of `config.base.fold`, the first of which is the base segmenter.

  Raises:
    ConfigError: if it is no number, "all", or several with commas between.
  """
  return folder.parse_folds(config.base.fold, "config.base.fold")


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with what the plans of `config.base.nnunet_folder` decide; without it as it is.

  Raises:
    ConfigError: if a key that they decide was given another value.
    errors.FileError, errors.DataError: naming the file of the folder that cannot be used.
  """
  if not config.base.nnunet_folder:
    return config
  root = pathlib.Path(config.base.nnunet_folder).expanduser()
  names = folds(config)
  plans = plans_lib.read(root, checkpoint_pth.read_facts(_checkpoint(config))[0])
  decided = _decided(config, plans) | {"base.num_members": len(names)}
  defaults, values = config_lib.leaves(config_lib.base_config()), config_lib.leaves(config)
  for key, value in decided.items():
    # 0 classes are those of the data set.
    free = (defaults[key], value, *((0,) if key == "data.num_classes" else ()))
    if values[key] not in free:
      raise errors.ConfigError(
        f"config.{key}: found {values[key]!r}, but {root} has {value!r}; leave it out"
      )
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(decided)
  return config


def is_mirrored(config) -> bool:
  """Whether the first fold of `config.base.nnunet_folder` was trained on flips along every axis.

  Raises:
    errors.FileError: naming the checkpoint that cannot be used.
  """
  _, axes = checkpoint_pth.read_facts(_checkpoint(config))
  return set(range(config.data.spatial_dims)) <= set(axes)


def _checkpoint(config) -> pathlib.Path:
  """Of the first fold."""
  root = pathlib.Path(config.base.nnunet_folder).expanduser()
  return root / f"fold_{folds(config)[0]}" / CHECKPOINT


def _decided(config, plans: plans_lib.Plans) -> dict[str, Any]:
  """What the plans say, by the keys of the config."""
  network, images = plans.architecture.transposed(plans.axes), plans.preprocessing
  depth = 1  # of the learned judge: what the patch can be halved to
  while depth < len(network.features) and not any(n % 2**depth for n in images.patch_size):
    depth += 1
  return {
    "model.name": "nnunet_residual" if network.is_residual else "nnunet_plain",
    "model.architecture": network.to_json(),
    "model.depth": depth,
    "data.spatial_dims": len(plans.axes),
    "data.num_classes": plans.num_classes,
    "data.spacing": images.spacing,
    "data.patch_size": images.patch_size,
    "data.schemes": images.schemes,
    "data.statistics": _statistics(images) if "ct" in images.schemes else "",
  }


def _statistics(images: Preprocessing) -> str:
  """What the scheme 'ct' reads, as `config.data.statistics` has it."""
  return json.dumps(
    [
      {name: own[name] for name in intensity.STATISTICS} if scheme == "ct" else None
      for scheme, own in zip(images.schemes, images.statistics, strict=True)
    ]
  )


def read(config, fold: int | str, dataset) -> folder.Model:
  """A fold of the model, checked to be of such data.

  Args:
    config: `base.nnunet_folder` is read.
    fold: one of `folds`.
    dataset: the prepared data.

  Raises:
    errors.DataError: if channels or classes differ.
    errors.FileError: naming the file of the model that cannot be used.
  """
  root = pathlib.Path(config.base.nnunet_folder).expanduser()
  model = folder.read(root, fold, CHECKPOINT)
  plans = model.plans
  if plans.num_channels != dataset.num_channels:
    raise errors.DataError(
      f"config.base.nnunet_folder: {root} was trained on {plans.num_channels} channels, the images "
      f"of config.data.root have {dataset.num_channels}; take the images that it was trained on"
    )
  of_pictures = dataset.spacing_unit == "voxel"  # the native mode takes no others without spacing
  if plans.of_pictures != of_pictures:
    theirs, ours = (
      "pictures" if pictures else "no pictures" for pictures in (plans.of_pictures, of_pictures)
    )
    raise errors.DataError(
      f"config.base.nnunet_folder: {root} was trained on {theirs}, and config.data.root holds "
      f"{ours}; their axes differ, so that the network would see images turned: convert the images"
    )
  names = list(dataset.class_names)
  if len(names) != plans.num_classes:
    raise errors.DataError(
      f"config.base.nnunet_folder: {root} has the classes {', '.join(plans.class_names)}, the data "
      f"{', '.join(names)}; relabel the data as the model has them"
    )
  for n, name in enumerate(names):
    if name in plans.class_names and plans.class_names[n] != name:
      raise errors.DataError(
        f"config.base.nnunet_folder: the class {name!r} has the id {n} in the data and "
        f"{plans.class_names.index(name)} in {root}; relabel the data"
      )
  if names != list(plans.class_names):
    progress.say(
      f"classes of the data ({', '.join(names)}) are taken for those of the model "
      f"({', '.join(plans.class_names)}), by their ids"
    )
  return model


def read_kept(home: os.PathLike) -> folder.Model:
  """The model that `keep` has copied to `base/nnunet/`, of its one fold.

  Raises:
    errors.FileError: naming the file that cannot be used.
  """
  home = pathlib.Path(files.local_copy(home))
  return folder.read(home, kept_fold(home), CHECKPOINT)


def kept_fold(home: pathlib.Path) -> str:
  """The fold in `base/nnunet/`.

  Raises:
    errors.FileError: if there is not exactly one.
  """
  found = [path.name.removeprefix("fold_") for path in home.glob("fold_*")]
  if len(found) != 1:
    raise errors.FileError(
      f"{home}: found {len(found)} folders fold_F, expected one; bring back what the stage 'base' "
      "copied there"
    )
  return found[0]


def keep(config, fold: int | str, directory: epath.Path) -> dict[str, Any]:
  """Copies the model as it came, for `launch.export`: `directory`/nnunet/, of this fold.

  Returns:
    Where it came from, for `selected.json`.
  """
  source = epath.Path(config.base.nnunet_folder).expanduser()
  target = directory / KEPT
  there = [name for name in _PERHAPS if (source / name).exists()]
  for name in (*_NEEDED, *there, f"fold_{fold}/{CHECKPOINT}"):
    files.write_bytes(target / name, (source / name).read_bytes())
  sha256 = files.sha256(target / f"fold_{fold}" / CHECKPOINT)
  return {"folder": os.fspath(source), "fold": fold, "checkpoint_sha256": sha256}
