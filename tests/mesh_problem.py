"""A small problem, and meshes of the simulated devices to share it on."""

import functools

import jax
import numpy as np

from rndpo_jax import models, types
from rndpo_jax.config import base_config
from rndpo_jax.losses import bit_planes
from rndpo_jax.runtime import sharding

BATCH, PAIRS, CLASSES = 4, 2, 3
PLANE, VOLUME = (16, 16), (12, 44, 2)
MIN_SIZE = 500  # elements


def mesh_of(data, fsdp, space):
  return sharding.make_mesh(jax.devices()[: data * fsdp * space], fsdp=fsdp, space=space)


@functools.cache
def network(dims, depth=2, lanes=1):
  config = base_config().model
  config.width, config.depth, config.lanes = 4, depth, lanes
  return models.build(config, num_classes=CLASSES, spatial_dims=dims)


@functools.cache
def problem(size, depth=2):
  """(params, batch): four images, two pairs each, one slot without a pair; the same labelled."""
  rng = np.random.default_rng(0)
  masks = rng.integers(0, CLASSES, (2, BATCH, PAIRS, *size)).astype(np.uint8)
  weight = np.ones((BATCH, PAIRS), np.float32)
  weight[1, 1] = 0
  images = rng.normal(size=(BATCH, *size, 1)).astype(np.float32)
  batch = types.PairBatch(
    images=images,
    chosen=np.asarray(bit_planes.pack(masks[0], CLASSES, len(size))),
    rejected=np.asarray(bit_planes.pack(masks[1], CLASSES, len(size))),
    reference_margin=rng.normal(size=(BATCH, PAIRS)).astype(np.float32),
    reference_log_prob=np.full((BATCH, PAIRS), -9.0, np.float32),
    weight=weight,
    voxel_volume=np.ones(BATCH, np.float32),
  )
  batch = types.FinetuneBatch(pairs=batch, labelled={"image": images, "label": masks[0][:, 0]})
  shapes = jax.eval_shape(network(len(size), depth).init, jax.random.key(0), images)

  def draw(x):
    return rng.normal(float(x.ndim == 1), 0.2, x.shape).astype(np.float32)

  return jax.tree.map(draw, shapes), batch
