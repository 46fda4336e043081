"""A run as a model folder of nnU-Net: `nnUNetv2_predict_from_modelfolder -m FOLDER -f FOLD`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from etils import epath

from rndpo_jax import errors, models
from rndpo_jax.nnunet import checkpoint_writer, imported, new_plans, weights
from rndpo_jax.nnunet.preprocessing import Preprocessing
from rndpo_jax.predict.trained import Trained
from rndpo_jax.runtime import files


def make(trained: Trained, workdir: epath.Path) -> dict[str, bytes]:
  """The files of the folder.

  Of a base that was imported they are those that came, byte by byte, but for the weights of the
  fold that was the base: what else its checkpoint holds is the training before this one. Of one
  that was trained here the plans are written, if nnU-Net has words for its network and images.

  Raises:
    errors.ConfigError: if it has not, naming the key.
    errors.FileError: if a file of `base/nnunet/` cannot be used.
  """
  home = workdir / "base" / imported.KEPT
  if not home.is_dir():
    return _new(trained)
  return _as_it_came(trained, pathlib.Path(files.local_copy(home)))


def _as_it_came(trained: Trained, home: pathlib.Path) -> dict[str, bytes]:
  model = imported.read_kept(home)
  named = weights.from_params(
    trained.params,
    model.plans.architecture,
    axes=model.plans.axes,
    other_heads=model.other_heads,
  )
  path = f"fold_{imported.kept_fold(home)}/{imported.CHECKPOINT}"
  return {
    **{file.name: file.read_bytes() for file in sorted(home.glob("*.json"))},
    path: checkpoint_writer.replaced(home / path, named),
  }


def _new(trained: Trained) -> dict[str, bytes]:
  """Our axes are (x, y) and (x, y, z), nnU-Net's of the same files (y, x) and (z, y, x).

  Those of pictures are (H, W) in both.
  """
  config, native = trained.config, trained.native
  if not models.reads(config.model.name, "architecture") or ":" in config.model.name:
    raise errors.ConfigError(
      f"--format=nnunet: config.model.name={config.model.name!r} is no network of nnU-Net's; train "
      "'nnunet_plain' or 'nnunet_residual', or take --format=safetensors or stablehlo"
    )
  if native is None:
    raise errors.ConfigError(
      "--format=nnunet: config.data.spacing is empty, and nnU-Net's plans cannot say that whole "
      f"images are brought to {trained.size} pixels; train with config.data.spacing and "
      "config.data.patch_size, or take --format=safetensors or stablehlo"
    )
  axes = tuple(range(trained.spatial_dims))[:: 1 if trained.of_pictures else -1]
  ours = models.architecture(config.model, spatial_dims=trained.spatial_dims)
  made = ours.transposed(axes)
  images = Preprocessing(
    spacing=tuple(native.spacing[axis] for axis in axes),
    patch_size=tuple(trained.size[axis] for axis in axes),
    schemes=native.schemes,
    statistics=native.statistics,
  )
  configuration = "2d" if trained.spatial_dims == 2 else "3d_fullres"
  files_of = new_plans.PICTURES if trained.of_pictures else new_plans.NIFTI
  plans = new_plans.plans(config.data.name, configuration, made, images, files_of)
  dataset = new_plans.dataset(trained.class_names, native.schemes, trained.has_ignored, files_of)
  checkpoint = checkpoint_writer.new(
    weights.from_params(trained.params, made, axes=axes),
    plans=plans,
    dataset=dataset,
    configuration=configuration,
    fold=0,
    mirroring_axes=trained.mirror_axes,  # all or none, in any order of axes
  )
  return {
    "dataset.json": _json(dataset),
    f"fold_0/{imported.CHECKPOINT}": checkpoint,
    "plans.json": _json(plans),
  }


def _json(content: Any) -> bytes:
  return (json.dumps(content, indent=2) + "\n").encode()
