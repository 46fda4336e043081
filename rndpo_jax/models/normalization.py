"""Group normalisation, written for the passes over memory that it leaves out.

Its parameters have the names and shapes of Flax's `GroupNorm`.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6  # added to the variance


class GroupNorm(nn.Module):
  """Group normalisation of [B, *S, F]: over space and the channels of a group.

  Source: Wu and He, "Group Normalization", ECCV 2018. Flax's own, but on CPU, and of a folded
  array everywhere, `normalize`.

  Attributes:
    num_groups: divides F.
    dtype: of the result; scale and bias are float32.
    fold: of the input, [B, *S', fold F] (`folding`).
  """

  num_groups: int
  dtype: jnp.dtype
  fold: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = (x.shape[-1] // self.fold,)
    scale = self.param("scale", nn.initializers.ones, features)
    bias = self.param("bias", nn.initializers.zeros, features)

    def by_channel(x, scale, bias):
      return normalize(x, scale, bias, self.num_groups).astype(self.dtype)

    if self.fold > 1:
      return by_channel(x, scale, bias)

    def by_group(x, scale, bias):
      norm = nn.GroupNorm(self.num_groups, epsilon=EPSILON, dtype=self.dtype, parent=None)
      return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    return jax.lax.platform_dependent(x, scale, bias, cpu=by_channel, default=by_group)


def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int) -> jax.Array:
  """Group normalisation at the cost of two sums and one multiplication and addition a pixel.

  Channels are summed one by one and their sums joined to groups; the variance is the mean of
  squares minus the squared mean.

  Args:
    x: f[B, *S, F], or folded by n, f[B, *S', n F].
    scale: f32[F].
    bias: f32[F].
    num_groups: divides F.

  Returns:
    f32 of the shape of x.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  size, fold = scale.size // num_groups, x.shape[-1] // scale.size
  scale, bias = jnp.tile(scale, fold), jnp.tile(bias, fold)
  count = fold * size * math.prod(x.shape[1:-1])

  def group_mean(sums):
    groups = jnp.sum(sums.reshape(-1, fold, num_groups, size), axis=(1, 3)) / count
    return jnp.tile(jnp.repeat(groups, size, axis=-1), (1, fold))

  mean, square = group_mean(_sum_over_space(x)), group_mean(_sum_over_space(x * x))
  variance = jnp.maximum(0.0, square - mean * mean)  # rounding can leave it below zero
  factor = jax.lax.rsqrt(variance + EPSILON) * scale[None]
  offset = bias[None] - mean * factor
  return x * _spread_over_space(factor, x.shape) + _spread_over_space(offset, x.shape)


def normalize_instances(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Instance normalisation: (x - mean) / sqrt(variance + epsilon) * scale + bias over space.

  Source: Ulyanov et al., "Instance Normalization", 2016. The variance is the mean of squared
  differences from the mean: `normalize` has a sum less, but loses what a channel with a mean far
  from 0 differs by.

  Args:
    x: f[B, *S, F].
    scale: f32[F].
    bias: f32[F].
    epsilon: added to the variance.

  Returns:
    f32 of the shape of x; the bias where S is a single pixel.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  count = math.prod(x.shape[1:-1])
  x = x - _spread_over_space(_sum_over_space(x) / count, x.shape)
  factor = jax.lax.rsqrt(_sum_over_space(x * x) / count + epsilon) * scale[None]
  offset = jnp.broadcast_to(bias[None], factor.shape)
  return x * _spread_over_space(factor, x.shape) + _spread_over_space(offset, x.shape)


# Rows first, then along a row, and a barrier between, where XLA would make one reduction of the
# two: on CPU that adds up one channel at a time and takes three times as long. The gradient of the
# one function is the other, so both passes have it.


def _sum_over_space(x):
  """f[B, *S, F] -> f[B, F]."""
  rows = jnp.sum(x, axis=tuple(range(1, x.ndim - 2)))
  return jnp.sum(jax.lax.optimization_barrier(rows), axis=1)


def _spread_over_space(x, shape):
  """f[B, F] -> f[B, *S, F]."""
  batch, length, features = shape[0], shape[-2], shape[-1]
  row = jnp.broadcast_to(x[:, None], (batch, length, features))
  row = jax.lax.optimization_barrier(row)
  row = row.reshape(batch, *(1,) * (len(shape) - 3), length, features)
  return jnp.broadcast_to(row, shape)
