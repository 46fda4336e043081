"""A run as a model folder of nnU-Net: `nnUNetv2_predict_from_modelfolder -m FOLDER -f FOLD`."""

from __future__ import annotations

import pathlib

from rndpo_jax import errors
from rndpo_jax.nnunet import checkpoint_writer, folder, imported, weights
from rndpo_jax.predict.trained import Trained


def make(trained: Trained, workdir: pathlib.Path) -> dict[str, bytes]:
  """The files of the folder.

  Of a base that was imported they are those that came, byte by byte, but for the weights of the
  fold that was the base: what else its checkpoint holds is the training before this one.

  Raises:
    errors.ConfigError: if the network or its images are not nnU-Net's.
    errors.FileError: if a file of `base/nnunet/` cannot be used.
  """
  home = workdir / "base" / imported.KEPT
  if not home.is_dir():
    raise errors.ConfigError(
      f"--format=nnunet: the base of {workdir} is no model of nnU-Net (config.base.nnunet_folder)"
    )
  names = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
  made = {name: (home / name).read_bytes() for name in sorted(names) if name.endswith(".json")}
  (fold,) = [path.name.removeprefix("fold_") for path in home.glob("fold_*")]
  model = folder.read(home, fold, imported.CHECKPOINT)
  named = weights.from_params(
    trained.params,
    model.plans.architecture,
    axes=model.plans.axes,
    other_heads=model.other_heads,
  )
  path = f"fold_{fold}/{imported.CHECKPOINT}"
  return {**made, path: checkpoint_writer.replaced(home / path, named)}
