"""U-Net in two and three dimensions, encoder and decoder apart.

Source of the architecture: Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, and Çiçek et al.,
"3D U-Net", MICCAI 2016; here with group or instance normalisation (Wu and He, "Group
Normalization", ECCV 2018) so that a network is a pure function of its parameters.

Dropout lives in the bottleneck and the decoder alone. K dropout samples of an image therefore
share one encoder pass.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from rndpo_jax import types


def _pool(x: jax.Array) -> jax.Array:
  """Maximum over 2 x 2 (x 2) blocks of [B, *S, F], one axis at a time.

  The gradient of a windowed maximum (select-and-scatter) is several times slower on CPU. That of
  `jnp.max` divides by the number of entries equal to the maximum: where XLA computes the entries
  again inside a fusion and rounds them otherwise, none is, and the gradient is NaN (seen at
  80 x 80). A selection has neither fault.
  """
  for axis in range(1, x.ndim - 1):
    halves = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    first, second = jnp.split(halves, 2, axis=axis + 1)
    x = jnp.squeeze(jnp.where(first >= second, first, second), axis + 1)
  return x


def _upsample(x: jax.Array) -> jax.Array:
  """Repeats each entry of [B, *S, F] twice along each spatial axis."""
  batch, *space, features = x.shape
  ones, twos = [batch], [batch]
  for size in space:
    ones += [size, 1]
    twos += [size, 2]
  x = jnp.broadcast_to(x.reshape(*ones, features), (*twos, features))
  return x.reshape(batch, *(2 * size for size in space), features)


class _Block(nn.Module):
  """Twice: convolution, normalisation, ReLU."""

  features: int
  kernel: tuple[int, ...]
  norm: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    groups = self.features if self.norm == "instance" else max(1, self.features // 4)
    while self.features % groups:
      groups -= 1
    for _ in range(2):
      x = nn.Conv(self.features, self.kernel, use_bias=False, dtype=self.dtype)(x)
      x = nn.GroupNorm(num_groups=groups, dtype=self.dtype)(x)
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

  def setup(self):
    kernel = (3,) * self.spatial_dims
    widths = [min(self.width * 2**level, self.max_width) for level in range(self.depth)]
    block = nn.remat(_Block) if self.remat else _Block
    self.down = [block(w, kernel, self.norm, self.dtype) for w in widths]
    self.up = [block(w, kernel, self.norm, self.dtype) for w in widths[:-1]]
    self.drop = nn.Dropout(self.dropout)
    # The head computes in float32: logits feed a sum over thousands of pixels.
    self.head = nn.Conv(self.num_classes, (1,) * self.spatial_dims, dtype=jnp.float32)

  def encode(self, images):
    """f32[B, *S, I] -> tuple of features, finest first."""
    x = images.astype(self.dtype)
    features = []
    for level, block in enumerate(self.down):
      x = block(x if level == 0 else _pool(x))
      features.append(x)
    return tuple(features)

  def decode(self, features, deterministic: bool):
    """Features -> logits f32[B, *S, C]."""
    x = self.drop(features[-1], deterministic=deterministic)
    for skip, block in zip(features[-2::-1], self.up[::-1], strict=True):
      x = block(jnp.concatenate([_upsample(x), skip], axis=-1))
      x = self.drop(x, deterministic=deterministic)
    return self.head(x.astype(jnp.float32))

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

  Returns:
    A Segmenter.
  """
  module = UNet(num_classes, spatial_dims, width, depth, max_width, norm, dropout, dtype, remat)

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
