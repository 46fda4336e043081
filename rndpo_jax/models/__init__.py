"""Segmenters: `build` turns a model config into a `types.Segmenter` of pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.models import unet

# Channels in a tile of a TPU's memory, and multipliers along a side of v5e's matrix units.
# Source: the page "System architecture" (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
TPU_LANES = 128


def _unet(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  return unet.build(
    num_classes=num_classes,
    spatial_dims=spatial_dims,
    width=model_config.width,
    depth=model_config.depth,
    max_width=model_config.max_width,
    norm=model_config.norm,
    dropout=model_config.dropout,
    dtype=jnp.dtype(model_config.dtype),
    remat=model_config.remat,
    lanes=lanes(model_config),
  )


# `config.model.name` -> its builder, called as `build` calls it: a new one is one file and a line.
ARCHITECTURES = {"unet": _unet}


def build(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  """Builds the segmenter that `config.model` describes; `config.model.name` chooses which.

  Args:
    model_config: `config.model`.
    num_classes: C, background among them.
    spatial_dims: 2 or 3.

  Returns:
    A Segmenter; its logits are f32[B, *S, C] whatever the compute dtype.
  """
  make = ARCHITECTURES[model_config.name]
  return make(model_config, num_classes=num_classes, spatial_dims=spatial_dims)


def lanes(model_config, platform: str | None = None) -> int:
  """`config.model.lanes`; 0 is the number of a platform, by default that of this process."""
  platform = platform or jax.default_backend()
  return model_config.lanes or (TPU_LANES if platform == "tpu" else 1)
