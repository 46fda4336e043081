"""A network that takes images at a spacing of its own, in patches, of a run or of nnU-Net."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rndpo_jax import errors, models, types
from rndpo_jax.nnunet import folder as folder_lib
from rndpo_jax.predict.trained import Trained


class NativeNetwork(NamedTuple):
  """What prediction needs to know.

  Attributes:
    apply: (params, images f32[B, *patch_size, I]) -> logits f32[B, *patch_size, C].
    params: a numpy tree for each member of an ensemble; their logits are averaged.
    num_channels: I.
    class_names: one a class, background first.
    spacing: mm a pixel of the network's input, one an axis.
    patch_size: pixels of the network's input, likewise.
    schemes: a name of `intensity.SCHEMES` for each channel.
    statistics: what the scheme 'ct' reads of each channel.
    mirror_axes: spatial axes along which training flipped images.
    of_pictures: whether it was trained on pictures; their axes are (H, W), others' (x, y).
    title: what it is, in words.
    settings: what masks of one folder must have in common, by name.
  """

  apply: Callable[..., Any]
  params: tuple[types.Params, ...]
  num_channels: int
  class_names: tuple[str, ...]
  spacing: tuple[float, ...]
  patch_size: tuple[int, ...]
  schemes: tuple[str, ...]
  statistics: tuple[Mapping[str, float] | None, ...]
  mirror_axes: tuple[int, ...]
  of_pictures: bool
  title: str
  settings: Mapping[str, Any]

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def spatial_dims(self) -> int:
    return len(self.patch_size)


def read_nnunet(folder: os.PathLike | str, folds: Sequence[int | str]) -> NativeNetwork:
  """The folds of a model folder that nnU-Net wrote, as one network.

  Raises:
    errors.ConfigError: if there is no such folder or fold, naming those that there are.
    errors.FileError, errors.DataError: if a file cannot be used.
  """
  place = pathlib.Path(folder).expanduser()
  _check_there(place, folds)
  members = [folder_lib.read(place, fold) for fold in folds]
  first = members[0]
  kinds = [model.checkpoint.configuration for model in members]
  if len(set(kinds)) > 1:
    raise errors.ConfigError(
      f"--fold: the folds of {place} are of the configurations {', '.join(kinds)}; expected one"
    )
  plans = first.plans
  if plans.num_classes > 255:
    raise errors.ConfigError(f"--nnunet_folder: {plans.num_classes} classes, at most 255 are taken")
  mirrored = first.checkpoint.mirroring_axes
  return NativeNetwork(
    apply=first.segmenter.apply,
    params=tuple(model.params for model in members),
    num_channels=plans.num_channels,
    class_names=plans.class_names,
    spacing=plans.preprocessing.spacing,
    patch_size=plans.preprocessing.patch_size,
    schemes=plans.preprocessing.schemes,
    statistics=plans.preprocessing.statistics,
    mirror_axes=tuple(n for n, axis in enumerate(plans.axes) if axis in mirrored),
    of_pictures=plans.of_pictures,
    title=f"{place.name}, fold {', '.join(map(str, folds))}",
    settings={
      "folds": list(folds),
      "spacing": list(plans.preprocessing.spacing),
      "patch_size": list(plans.preprocessing.patch_size),
      "schemes": list(plans.preprocessing.schemes),
    },
  )


def of_run(trained: Trained) -> NativeNetwork:
  """The network of a work directory that was trained in the native mode."""
  native = trained.native
  segmenter = models.build(
    trained.config.model, num_classes=trained.num_classes, spatial_dims=trained.spatial_dims
  )
  return NativeNetwork(
    apply=segmenter.apply,
    params=(trained.params,),
    num_channels=trained.num_channels,
    class_names=tuple(trained.class_names),
    spacing=native.spacing,
    patch_size=trained.size,
    schemes=native.schemes,
    statistics=native.statistics,
    mirror_axes=trained.mirror_axes,
    of_pictures=trained.of_pictures,
    title=f"the checkpoint of step {trained.step}" if trained.step else "the base",
    settings={"step": trained.step},
  )


def _check_there(place: pathlib.Path, folds: Sequence[int | str]) -> None:
  found = sorted(path.parent.name for path in place.glob("fold_*/checkpoint_final.pth"))
  if not found:
    inside = sorted(path.parent for path in place.glob("*/plans.json"))
    hint = f"; give {inside[0]}" if inside else ""
    raise errors.ConfigError(
      f"--nnunet_folder: {place} has no fold_*/checkpoint_final.pth; expected a folder that "
      f"nnU-Net v2 trained, as .../nnUNetTrainer__nnUNetPlans__2d{hint}"
    )
  missing = [fold for fold in folds if f"fold_{fold}" not in found]
  if missing:
    there = ", ".join(name.removeprefix("fold_") for name in found)
    raise errors.ConfigError(f"--fold: {place} has no fold {missing[0]}; there are {there}")
