"""The U-Net that steps, mining and input are timed with, and random weights for it."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from rndpo_jax import config, models, types
from rndpo_jax.benchmark.options import Options
from rndpo_jax.runtime import files
from rndpo_jax.stages import base
from rndpo_jax.training import checkpoint

CHANNELS = 1  # of an image


def make_config(options: Options) -> Any:
  """The default config with the network, the grid and the classes of `options`."""
  made = config.base_config()
  made.data.size = tuple(options.shape[1:])
  made.data.spatial_dims = len(options.shape) - 1
  made.data.num_classes = options.classes
  made.model.width = options.width
  made.model.depth = options.depth
  made.model.dtype = options.dtype
  return made


def make(options: Options) -> tuple[types.Segmenter, types.Params]:
  """The segmenter with random parameters, float32."""
  segmenter = models.build(
    make_config(options).model,
    num_classes=options.classes,
    spatial_dims=len(options.shape) - 1,
  )
  images = jnp.zeros((1, *options.shape[1:], CHANNELS))
  return segmenter, jax.jit(segmenter.init)(jax.random.key(0), images)


def save_as_base(params: types.Params, workdir: os.PathLike, data: str = "") -> None:
  """Lays the parameters down where the stage `base` would, as of data with that fingerprint."""
  directory = base.member_directory(workdir, 0)
  checkpoint.save(directory / "params", 0, params)
  files.write_json(directory / "selected.json", {"step": 0, "fingerprints": {"data": data}})


def num_bytes(tree: Any) -> int:
  """Of all arrays in a tree."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def setup(benchmark: str, options: Options) -> dict[str, Any]:
  """What every row of these benchmarks repeats."""
  return {
    "benchmark": benchmark,
    "shape": list(options.shape),
    "classes": options.classes,
    "dtype": options.dtype,
    "width": options.width,
    "depth": options.depth,
  }
