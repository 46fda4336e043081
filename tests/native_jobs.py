"""Whole tiny jobs in the native mode, in 2D and 3D, and what tests compare them with."""

import fcntl

import native_data
import numpy as np
import tiny_jobs
from scipy import ndimage

from configs import nnunet as nnunet_config
from rndpo_jax import pipeline
from rndpo_jax.evaluation import sliding_window

TINY = tiny_jobs.TINY | {
  "data.num_labelled": 3,
  "data.num_val": 2,
  "data.num_test": 3,
  "model.depth": 2,
  "augment.turn": 0.0,
  "proposals.mix": "base:1,threshold:3",
  "judge.compare": (),
}
GEOMETRY = {
  2: {"data.spacing": (1.5, 0.0), "data.patch_size": (12, 10)},
  # Convolutions of volumes take the longest to compile: fewer of them.
  3: {
    "data.spacing": (1.5, 0.0, 3.0), "data.patch_size": (8, 10, 4), "data.spatial_dims": 3,
    "model.depth": 1,
  },
}  # fmt: skip
NEW_SPACING = (1.5, 1.25, 3.0)


def make(folder, dims):
  """(config, work directory, source) of a finished job, which is made by the first who asks."""
  folder.mkdir(exist_ok=True)
  with (folder / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    root = folder / "raw"
    if not root.exists():
      native_data.write(root)
    config = nnunet_config.get_config("")
    with config.unlocked():
      config.update_from_flattened_dict(TINY | GEOMETRY[dims] | {"data.root": str(root)})
    pipeline.run(config, folder / "work")
  return config, folder / "work", root


def _weights(patch):
  """Gaussian about patch // 2, of sigma patch / 8, f64."""
  delta = np.zeros(patch)
  delta[tuple(n // 2 for n in patch)] = 1
  return ndimage.gaussian_filter(delta, [n / 8 for n in patch], mode="constant")


def logits(apply, image, patch):
  """f64 sums over tiles at half a patch, one tile at a time."""
  pads = [max(p - n, 0) for n, p in zip(image.shape, patch, strict=False)]
  pads = [(n // 2, n - n // 2) for n in pads]
  padded = np.pad(image, [*pads, (0, 0)])
  total, mass = 0.0, 0.0
  for start in sliding_window.positions(padded.shape[:-1], patch):
    place = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
    tile = np.asarray(apply(padded[place][None])[0], np.float64)
    own, weight = np.zeros((*padded.shape[:-1], tile.shape[-1])), np.zeros(padded.shape[:-1])
    own[place], weight[place] = _weights(patch)[..., None] * tile, _weights(patch)
    total, mass = total + own, mass + weight
  inside = tuple(slice(low, n - high) for n, (low, high) in zip(padded.shape, pads, strict=False))
  return (total / mass[..., None])[inside]


def dice(one, other):
  """Mean over classes 1 and 2; 1 of a class that both lack."""
  classes = [(one == c, other == c) for c in (1, 2)]
  sums = [(2 * np.sum(a & b), np.sum(a) + np.sum(b)) for a, b in classes]
  return np.mean([shared / total if total else 1.0 for shared, total in sums])
