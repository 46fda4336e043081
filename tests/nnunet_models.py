"""A tiny model folder as nnU-Net has them, for images of `native_data`."""

import json

import jax
import numpy as np
import pth_files

from rndpo_jax.models import nnunet, nnunet_architecture
from rndpo_jax.nnunet import new_plans, weights
from rndpo_jax.nnunet.preprocessing import Preprocessing

# Axes (y, x): other kernels, strides and pixels along each.
MADE = nnunet_architecture.derive(
  is_residual=False, spatial_dims=2, width=2, depth=3, max_width=8
)._replace(kernels=((1, 3), (3, 3), (3, 3)), strides=((1, 1), (1, 2), (1, 1)))
IMAGES = Preprocessing((1.25, 1.5), (10, 12), ("zscore",), (None,))
CLASSES = ("background", "a", "b")


def random_weights(architecture, num_classes, seed=0):
  """nnU-Net's names and arrays, every head among them."""
  segmenter = nnunet.build(architecture, num_classes=num_classes)
  image = jax.ShapeDtypeStruct((1, *architecture.divisors, 1), np.float32)
  params = jax.eval_shape(segmenter.init, jax.random.key(0), image)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  named = weights.from_params(params, architecture)
  heads = {name: array for name, array in named.items() if ".seg_layers.0." in name}
  return named | {name: rng.normal(size=a.shape).astype(np.float32) for name, a in heads.items()}


def write(folder, folds=("0",), classes=CLASSES):
  """Writes the folder, with a fingerprint that only a copy keeps; returns the last fold's."""
  for seed, fold in enumerate(folds):
    named = random_weights(MADE, len(classes), seed)
    pth_files.write(folder / f"fold_{fold}" / "checkpoint_final.pth", named)
  # Not as JSON is written elsewhere here: bytes must come back as they are.
  plans = json.dumps(new_plans.plans("Dataset001_T", "2d", MADE, IMAGES), indent=7)
  (folder / "plans.json").write_text(plans + "\n\n")
  (folder / "dataset.json").write_text(json.dumps(new_plans.dataset(classes, ("zscore",), False)))
  (folder / "dataset_fingerprint.json").write_text("{ }")
  return named
