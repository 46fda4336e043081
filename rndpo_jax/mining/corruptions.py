"""Synthetic bad masks, from gross to hardly wrong, to train the learned judge with.

A label is turned into soft logits (the log of its blurred one-hot form) that fall off with the
distance from the border, as a segmenter's do; the errors are made there: a bias a class grows
or shrinks it, a smooth noise field bends its border, a bump adds or removes a part. The argmax
is then shifted, loses or swaps classes, or is emptied, in a part of the draws.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.data.noise import smooth_noise
from rndpo_jax.mining import overlap

_FLOOR = 1e-4  # of a blurred one-hot value; bounds the logits


def corrupt(key: jax.Array, masks: jax.Array, num_classes: int) -> jax.Array:
  """Makes one bad mask of each.

  Args:
    key: one key; mask number i draws from fold_in(key, i).
    masks: u8[n, *S]. num_classes: C.

  Returns:
    u8[n, *S]. Their Dice with `masks` covers 0..1: for one large structure half of it is above
    0.9, for several small ones about half above 0.5. An empty mask stays, or gains a part.
  """
  keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(masks.shape[0]))
  return jax.vmap(lambda k, mask: _corrupt_one(k, mask, num_classes))(keys, masks)


def training_batch(
  key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int, masks_per_image: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws bad masks of labelled images and their true quality.

  Args:
    key: one key.
    images: f32[n, *S, I]. labels: u8[n, *S] class ids, or IGNORED. num_classes: C.
    masks_per_image: M; several, so that a loss can compare masks of one image.

  Returns:
    (images, masks u8[n, M, *S], targets f32[n, M] mean foreground Dice with the label). Pixels
    that the label ignores are IGNORED in the masks too, and count nowhere.
  """
  keys = jax.random.split(key, masks_per_image)
  ignored = labels == types.IGNORED
  known = jnp.where(ignored, jnp.zeros_like(labels), labels)
  masks = jax.vmap(lambda k: corrupt(k, known, num_classes), out_axes=1)(keys)
  masks = jnp.where(ignored[:, None], jnp.asarray(types.IGNORED, masks.dtype), masks)
  targets = overlap.pairwise_dice(masks, labels[:, None], num_classes)[:, :, 0]
  return images, masks, targets


def _corrupt_one(key, mask, num_classes):
  soft_key, class_key, shift_key, empty_key = jax.random.split(key, 4)
  mask = jnp.argmax(_soft_errors(soft_key, mask, num_classes), axis=-1).astype(jnp.uint8)
  mask = _change_class(class_key, mask, num_classes)
  mask = _shift(shift_key, mask)
  return jnp.where(jax.random.bernoulli(empty_key, 0.02), jnp.zeros_like(mask), mask)


def _soft_errors(key, mask, num_classes):
  """Logits f32[*S, C] of the mask with bias, noise and a bump."""
  draw_key, bias_key, coarse_key, fine_key, bump_key = jax.random.split(key, 5)
  draw = jax.random.uniform(draw_key, (3,))
  extent = max(mask.shape)
  hot = jax.nn.one_hot(mask, num_classes, dtype=jnp.float32)
  logits = jnp.log(_blur(hot, extent * _log_scale(draw[0], 0.01, 0.06)) + _FLOOR)
  # One strength for all errors of a draw makes slight and gross draws, not always a middling sum.
  strength = _log_scale(draw[1], 0.1, 6.0)
  bias = _along(jax.random.normal(bias_key, (num_classes,)), mask.ndim, mask.ndim + 1)
  coarse = smooth_noise(coarse_key, logits.shape, extent / 8)
  fine = smooth_noise(fine_key, logits.shape, extent / 20)
  noise = draw[2] * coarse + (1 - draw[2]) * fine
  return logits + strength * (0.6 * bias + noise) + _bump(bump_key, logits.shape)


def _bump(key, shape):
  """A Gaussian bump on one class's logit, in half of the draws: f32[*S, C]."""
  *space, num_classes = shape
  use, radius, label, height, *centre = jax.random.uniform(key, (4 + len(space),))
  radius = max(space) * _log_scale(radius, 0.03, 0.2)
  hot = jnp.arange(num_classes) == jnp.floor(label * num_classes)
  bump = jnp.where(use < 0.5, 4 + 10 * height, 0.0) * _along(hot, len(space), len(shape))
  for axis, size in enumerate(space):
    at = jnp.arange(size) - centre[axis] * (size - 1)
    bump = bump * _along(jnp.exp(-0.5 * (at / radius) ** 2), axis, len(shape))
  return bump


def _change_class(key, mask, num_classes):
  """Removes a foreground class, or gives it another's id, in a part of the draws."""
  use, source, target = jax.random.uniform(key, (3,))
  source = 1 + jnp.floor(source * (num_classes - 1))
  target = jnp.floor(target * num_classes).astype(mask.dtype)
  # Of two classes, all that can happen is that the mask is emptied.
  use = use < (0.1 if num_classes > 2 else 0.02)
  return jnp.where(use & (mask == source), target, mask)


def _shift(key, mask):
  """Moves the mask by up to a tenth of each axis, in a quarter of the draws; background enters."""
  use, *by = jax.random.uniform(key, (1 + mask.ndim,))
  for axis, size in enumerate(mask.shape):
    step = jnp.round((use < 0.25) * (0.2 * by[axis] - 0.1) * size).astype(jnp.int32)
    origin = jnp.arange(size) - step
    inside = (origin >= 0) & (origin < size)
    moved = jnp.roll(mask, step, axis=axis)
    mask = jnp.where(_along(inside, axis, mask.ndim), moved, 0).astype(mask.dtype)
  return mask


def _blur(values, width):
  """Blurs f32[*S, C] along each spatial axis by a Gaussian of `width` pixels, sums kept."""
  for axis in range(values.ndim - 1):
    at = jnp.arange(values.shape[axis], dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((at[:, None] - at[None, :]) / width) ** 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    values = jnp.moveaxis(jnp.tensordot(weights, values, axes=(1, axis)), 0, axis)
  return values


def _along(values, axis, ndim):
  """Shapes [n] to broadcast along one of `ndim` axes."""
  return values.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _log_scale(uniform, low, high):
  """Brings a uniform number in 0..1 to low..high, evenly in its logarithm."""
  return low * (high / low) ** uniform
