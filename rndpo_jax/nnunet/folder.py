"""A fold of a trained nnU-Net model as a segmenter and its parameters."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from rndpo_jax import errors, types
from rndpo_jax.models import nnunet
from rndpo_jax.nnunet import checkpoint_pth, weights
from rndpo_jax.nnunet import plans as plans_lib


class Model(NamedTuple):
  """A network for images in our order of axes.

  Attributes:
    segmenter: of images f32[B, *S, I].
    params: its parameters, a numpy tree.
    plans: what the plans say of it.
    checkpoint: what else the checkpoint says.
    other_heads: parameters of the heads that prediction does not read, for `weights.from_params`.
  """

  segmenter: types.Segmenter
  params: types.Params
  plans: plans_lib.Plans
  checkpoint: checkpoint_pth.Checkpoint
  other_heads: dict[str, Any]


def parse_folds(text: str, key: str) -> list[int | str]:
  """'0', 'all' or '0,1,2' -> the folds.

  Raises:
    errors.ConfigError: naming `key`, the flag or key of the config that it came from.
  """
  names = [name.strip() for name in text.split(",")]
  known = all(name == "all" or (name.isascii() and name.isdecimal()) for name in names)
  if not known or len(set(names)) < len(names):
    raise errors.ConfigError(f"{key}: found {text!r}, expected a number, several as 0,1,2, or all")
  return [name if name == "all" else int(name) for name in names]


def read(
  folder: os.PathLike | str, fold: int | str = 0, name: str = "checkpoint_final.pth"
) -> Model:
  """Reads `plans.json`, `dataset.json` and `fold_FOLD/NAME`; runs nothing of the checkpoint.

  Args:
    folder: as in .../nnUNetTrainer__nnUNetPlans__2d.
    fold: number of the fold, or "all".
    name: of the checkpoint.

  Raises:
    errors.FileError: naming the file, what was found and what is expected.
    errors.DataError: if a JSON file is missing or is none.
  """
  path = pathlib.Path(folder) / f"fold_{fold}" / name
  checkpoint = checkpoint_pth.read(path)
  plans = plans_lib.read(folder, checkpoint.configuration)
  try:
    params, other_heads = weights.to_params(
      checkpoint.weights,
      plans.architecture,
      num_channels=plans.num_channels,
      num_classes=plans.num_classes,
      axes=plans.axes,
    )
  except ValueError as error:
    raise errors.FileError(f"{path}: {error}") from error
  network = plans.architecture.transposed(plans.axes)
  segmenter = nnunet.build(network, num_classes=plans.num_classes)
  return Model(segmenter, params, plans, checkpoint, other_heads)
