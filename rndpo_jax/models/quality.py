"""The learned judge: a small network that predicts a mask's Dice from image and mask."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class QualityNet(nn.Module):
  """Strided convolutions over image and one-hot mask, pooled, to one number in 0..1."""

  width: int
  num_classes: int
  spatial_dims: int

  @nn.compact
  def __call__(self, images, masks):
    hot = jax.nn.one_hot(masks, self.num_classes, dtype=jnp.float32)
    x = jnp.concatenate([images, hot], axis=-1)
    kernel, stride = (3,) * self.spatial_dims, (2,) * self.spatial_dims
    for level in range(4):
      channels = self.width * 2**level
      x = nn.Conv(channels, kernel, strides=stride if level else 1)(x)
      x = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.width)(x))
      x = nn.Conv(channels, kernel)(x)
      x = nn.relu(nn.GroupNorm(num_groups=None, group_size=self.width)(x))
    axes = tuple(range(1, x.ndim - 1))
    x = jnp.concatenate([jnp.mean(x, axis=axes), jnp.max(x, axis=axes)], axis=-1)
    x = nn.relu(nn.Dense(4 * self.width)(x))
    return nn.sigmoid(nn.Dense(1)(x)[:, 0])


def build(
  width: int, num_classes: int, spatial_dims: int
) -> tuple[Callable[..., dict], Callable[..., jax.Array]]:
  """Builds the network as pure functions.

  Args:
    width: channels of the first level. num_classes: C. spatial_dims: 2 or 3.

  Returns:
    init(key, images f32[n, *S, I], masks u8[n, *S]) -> params, and
    apply(params, images, masks) -> f32[n], the predicted mean foreground Dice in 0..1.
  """
  net = QualityNet(width, num_classes, spatial_dims)

  def init(key, images, masks):
    return net.init(key, images, masks)["params"]

  def apply(params, images, masks):
    return net.apply({"params": params}, images, masks)

  return init, apply


def quality_loss(params, apply, images, masks, targets) -> tuple[jax.Array, dict]:
  """Squared error plus a ranking term over the pairs of masks of an image.

  loss = mean (q - t)^2 + mean over pairs with t_i > t_j of (t_i - t_j) softplus(-(q_i - q_j) s)
  with s = 10, so that pairs far apart weigh more and a gap of 0.1 is told with some certainty.

  Args:
    apply: from `build`. images: f32[n, *S, I]. masks: u8[n, M, *S]. targets: f32[n, M] Dice.

  Returns:
    (loss f32[], {"squared_error", "pair_accuracy"} f32[] each).
  """
  predicted = jax.vmap(lambda m: apply(params, images, m), in_axes=1, out_axes=1)(masks)
  squared_error = jnp.mean(optax.squared_error(predicted, targets))
  gap = targets[:, :, None] - targets[:, None, :]
  predicted_gap = predicted[:, :, None] - predicted[:, None, :]
  weight = jnp.maximum(gap, 0.0)
  ranking = jnp.sum(weight * jax.nn.softplus(-10.0 * predicted_gap))
  ranking = ranking / jnp.maximum(jnp.sum(weight), 1e-6)
  count = jnp.maximum(jnp.sum(gap > 0), 1)
  right = jnp.sum((gap > 0) & (predicted_gap > 0)) / count
  return squared_error + 0.1 * ranking, {"squared_error": squared_error, "pair_accuracy": right}
