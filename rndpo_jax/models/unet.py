"""U-Net in two and three dimensions, encoder and decoder apart.

Source of the architecture: Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, and Çiçek et al.,
"3D U-Net", MICCAI 2016; here with group or instance normalisation (Wu and He, "Group
Normalization", ECCV 2018) so that a network is a pure function of its parameters.

Dropout lives in the bottleneck and the decoder alone. K dropout samples of an image therefore
share one encoder pass.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.models import folding, layers, normalization


class _Block(nn.Module):
  """Twice: convolution, normalisation, ReLU; the first also takes the level below, upsampled."""

  features: int
  norm: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, below, fold):
    groups = self.features if self.norm == "instance" else max(1, self.features // 4)
    while self.features % groups:
      groups -= 1
    for level_below in (below, None):
      x = layers.Conv(self.features, self.dtype, fold)(x, level_below)
      x = normalization.GroupNorm(groups, self.dtype, fold)(x)
      x = nn.relu(x)
    return x


class UNet(nn.Module):
  """The network; `encode` and `decode` are its two halves."""

  num_classes: int
  spatial_dims: int
  width: int
  depth: int
  max_width: int
  norm: str
  dropout: float
  dtype: jnp.dtype
  remat: bool = False
  lanes: int = 1

  def setup(self):
    widths = [min(self.width * 2**level, self.max_width) for level in range(self.depth)]
    block = nn.remat(_Block, static_argnums=(3,)) if self.remat else _Block
    self.down = [block(w, self.norm, self.dtype) for w in widths]
    self.up = [block(w, self.norm, self.dtype) for w in widths[:-1]]
    self.drop = layers.Dropout(self.dropout)
    self.head = layers.Head(self.num_classes)

  def _folds(self, length):
    return folding.folds(self.lanes, self.width, self.depth, length)

  def encode(self, images):
    """f32[B, *S, I] -> tuple of features, finest first, folded as `lanes` says."""
    folds = self._folds(images.shape[-2])
    x = folding.fold(images.astype(self.dtype), folds[0])
    features = []
    for level, (block, fold) in enumerate(zip(self.down, folds, strict=True)):
      x = block(x if level == 0 else layers.pool(x, folds[level - 1]), None, fold)
      features.append(x)
    return tuple(features)

  def decode(self, features, deterministic: bool):
    """Features -> logits f32[B, *S, C]."""
    *_, length, channels = features[0].shape
    folds = self._folds(length * (channels // min(self.width, self.max_width)))
    x = self.drop(features[-1], deterministic=deterministic)
    for skip, block, fold in zip(features[-2::-1], self.up[::-1], folds[-2::-1], strict=True):
      x = block(skip, x, fold)
      x = self.drop(x, deterministic=deterministic)
    return self.head(x, folds[0])

  def __call__(self, images, deterministic: bool = True):
    return self.decode(self.encode(images), deterministic)


def build(
  *,
  num_classes: int,
  spatial_dims: int,
  width: int,
  depth: int,
  max_width: int,
  norm: str,
  dropout: float,
  dtype: jnp.dtype,
  remat: bool = False,
  lanes: int = 1,
) -> types.Segmenter:
  """Builds a U-Net as pure functions.

  Args:
    num_classes: C; the last axis of the logits.
    spatial_dims: 2 or 3; every size must be a multiple of 2**(depth - 1).
    width: channels of the first level; level l has min(width * 2**l, max_width).
    depth: levels.
    max_width: channels that no level exceeds.
    norm: "group" (four channels a group) or "instance" (one).
    dropout: rate, in bottleneck and decoder.
    dtype: of the computation; parameters and logits stay float32.
    remat: computes a block's inside again in the backward pass instead of keeping it.
    lanes: channels of a memory tile, which levels of fewer fill with neighbours (`folding`); the
      results are the same but for rounding. 1 does not.

  Returns:
    A Segmenter.
  """
  module = UNet(
    num_classes, spatial_dims, width, depth, max_width, norm, dropout, dtype, remat, lanes
  )

  def init(key, images):
    return module.init(key, images)["params"]

  def encode(params, images):
    return module.apply({"params": params}, images, method="encode")

  def decode(params, features, key=None):
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, features, key is None, method="decode", rngs=rngs)

  def apply(params, images, key=None):
    return decode(params, encode(params, images), key)

  return types.Segmenter(init, apply, encode, decode)
