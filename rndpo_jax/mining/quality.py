"""The learned judge: a small network that predicts a mask's Dice from image and mask."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rndpo_jax import types
from rndpo_jax.models import unet


def build(
  *,
  width: int,
  depth: int,
  dropout: float,
  num_classes: int,
  spatial_dims: int,
  lanes: int = 1,
) -> tuple[Callable[..., dict], Callable[..., jax.Array]]:
  """Builds the network as pure functions.

  A U-Net turns the image into class probabilities q, which nothing but masks and their Dice
  teaches; the predicted Dice of class c is (2 sum_p q_p[c] 1[y_p = c] + 1) / (sum_p q_p[c] +
  |y = c| + 1), the mean over foreground classes. So every pixel of a mask counts for itself and
  the masks of an image share one pass. A network that pools features of image and mask to one
  number learned, from ten images, to order corrupted masks, but not a segmenter's proposals.

  Args:
    width: channels of the first level, doubled at each deeper one.
    depth: levels; every size must be a multiple of 2**(depth - 1).
    dropout: rate, in bottleneck and decoder.
    num_classes: C. spatial_dims: 2 or 3. lanes: as in `unet.build`.

  Returns:
    init(key, images f32[n, *S, I]) -> params, and apply(params, images, masks u8[n, *S],
    key=None) -> f32[n], the predicted mean foreground Dice in 0..1; a key switches dropout on. A
    class that mask and q both lack counts 1, and pixels that are IGNORED in a mask count nowhere.
  """
  net = unet.build(
    num_classes=num_classes,
    spatial_dims=spatial_dims,
    width=width,
    depth=depth,
    max_width=width * 2**depth,
    norm="group",
    dropout=dropout,
    dtype=jnp.float32,
    lanes=lanes,
  )

  def apply(params, images, masks, key=None):
    expected = jax.nn.softmax(net.apply(params, images, key), axis=-1)
    expected = jnp.where(masks[..., None] == types.IGNORED, 0.0, expected)
    drawn = jax.nn.one_hot(masks, num_classes, dtype=jnp.float32)
    axes = tuple(range(1, masks.ndim))
    shared = jnp.sum(expected * drawn, axis=axes)
    total = jnp.sum(expected, axis=axes) + jnp.sum(drawn, axis=axes)
    return jnp.mean((2 * shared[:, 1:] + 1) / (total[:, 1:] + 1), axis=-1)

  return net.init, apply


def quality_loss(params, apply, images, masks, targets, key=None) -> tuple[jax.Array, dict]:
  """Squared error plus a ranking term over the pairs of masks of an image.

  loss = mean (q - t)^2 + mean over pairs with t_i > t_j of (t_i - t_j) softplus(-(q_i - q_j) s)
  with s = 10, so that pairs far apart weigh more and a gap of 0.1 is told with some certainty.

  Args:
    apply: from `build`. images: f32[n, *S, I]. masks: u8[n, M, *S]. targets: f32[n, M] Dice.
    key: of dropout, the same for all masks; None without.

  Returns:
    (loss f32[], {"squared_error", "pair_accuracy"} f32[] each).
  """
  predicted = jax.vmap(lambda m: apply(params, images, m, key), in_axes=1, out_axes=1)(masks)
  squared_error = jnp.mean(optax.squared_error(predicted, targets))
  gap = targets[:, :, None] - targets[:, None, :]
  predicted_gap = predicted[:, :, None] - predicted[:, None, :]
  weight = jnp.maximum(gap, 0.0)
  ranking = jnp.sum(weight * jax.nn.softplus(-10.0 * predicted_gap))
  ranking = ranking / jnp.maximum(jnp.sum(weight), 1e-6)
  count = jnp.maximum(jnp.sum(gap > 0), 1)
  right = jnp.sum((gap > 0) & (predicted_gap > 0)) / count
  return squared_error + 0.1 * ranking, {"squared_error": squared_error, "pair_accuracy": right}
