"""Shapes and shardings of what programs are lowered for: there is no data set and no device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rndpo_jax import config as config_lib
from rndpo_jax import types
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import sharding


class Problem(NamedTuple):
  """What a prepared data set would tell: C, I, the spatial dimensions, S, and `native`.

  The last is the size of the largest grid, axis by axis, that masks are brought to in evaluation.
  """

  num_classes: int
  num_channels: int
  spatial_dims: int
  size: tuple[int, ...]
  native: tuple[int, ...]


def problem_of(config, num_channels: int, num_classes: int) -> Problem:
  """The problem that a config describes, of images that are as large as the model's grid.

  0 classes takes `config.data.num_classes`.

  Raises:
    ConfigError: if neither says how many classes there are.
  """
  classes = num_classes or config.data.num_classes
  if classes < 2:
    raise ConfigError(
      "--num_classes: config.data.num_classes is 0 (a data set would tell); give it, as in "
      "--num_classes=4"
    )
  size = config_lib.input_size(config)
  return Problem(classes, num_channels, config.data.spatial_dims, size, native=size)


def batch(problem: Problem, size: int) -> types.Batch:
  """The shapes of `size` images with their labels."""
  struct = jax.ShapeDtypeStruct
  return types.Batch(
    images=struct((size, *problem.size, problem.num_channels), jnp.float32),
    labels=struct((size, *problem.size), jnp.uint8),
    index=struct((size,), jnp.int32),
    valid=struct((size,), jnp.bool_),
  )


def key() -> jax.ShapeDtypeStruct:
  """That of a random key."""
  return jax.eval_shape(lambda: jax.random.key(0))


def placed_params(config, tree, mesh: Mesh):
  """`tree`, its large arrays in parts as `config.mesh` says."""
  return placed(tree, sharding.param_shardings(tree, mesh, config.mesh.fsdp_min_size))


def placed(tree, shardings):
  """`tree` with one sharding, or with a tree of them."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )
