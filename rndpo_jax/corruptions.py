"""Synthetic bad masks, from gross to hardly wrong, to train the learned judge with.

A label is turned into soft logits (the log of its blurred one-hot form) that fall off with the
distance from the border, as a segmenter's do; the errors are made there: a bias a class grows
or shrinks it, a smooth noise field bends its border, a bump adds or removes a part. The argmax
is then shifted, loses or swaps classes, or is emptied, in a part of the draws.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import overlap, proposals

_FLOOR = 1e-4  # of a blurred one-hot value; bounds the logits


def corrupt(key: jax.Array, masks: jax.Array, num_classes: int) -> jax.Array:
  """Makes one bad mask of each.

  Args:
    key: one key; mask number i draws from fold_in(key, i).
    masks: u8[n, *S]. num_classes: C.

  Returns:
    u8[n, *S]. Their Dice with `masks` covers 0..1, about half of it above 0.8; a few stay as
    they were. An empty mask may gain a part.
  """
  keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(masks.shape[0]))
  return jax.vmap(lambda k, mask: _corrupt_one(k, mask, num_classes))(keys, masks)


def training_batch(
  key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int, masks_per_image: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws bad masks of labelled images and their true quality.

  Args:
    key: one key.
    images: f32[n, *S, I]. labels: u8[n, *S]. num_classes: C.
    masks_per_image: M; several, so that a loss can compare masks of one image.

  Returns:
    (images, masks u8[n, M, *S], targets f32[n, M] mean foreground Dice with the label).
  """
  keys = jax.random.split(key, masks_per_image)
  masks = jax.vmap(lambda k: corrupt(k, labels, num_classes), out_axes=1)(keys)
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
  keys = jax.random.split(key, 6)
  extent = max(mask.shape)
  width = extent * _log_uniform(keys[0], 0.01, 0.06)
  hot = jax.nn.one_hot(mask, num_classes, dtype=jnp.float32)
  logits = jnp.log(_blur(hot, width) + _FLOOR)
  # One strength for all errors of a draw makes slight and gross draws, not always a middling sum.
  strength = _log_uniform(keys[1], 0.1, 5.0)
  bias = jax.random.normal(keys[2], (num_classes,))
  bias = bias.reshape((1,) * mask.ndim + (num_classes,))
  field_keys = jax.random.split(keys[3])
  coarse = proposals.smooth_noise(field_keys[0], logits.shape, extent / 8)
  fine = proposals.smooth_noise(field_keys[1], logits.shape, extent / 20)
  mixed = jax.random.uniform(keys[4])
  noise = mixed * coarse + (1 - mixed) * fine
  return logits + strength * (0.6 * bias + noise) + _bump(keys[5], logits.shape)


def _bump(key, shape):
  """A Gaussian bump on one class's logit, in half of the draws."""
  place_key, size_key, class_key, use_key, height_key = jax.random.split(key, 5)
  centre = jax.random.uniform(place_key, (len(shape) - 1,))
  radius = max(shape[:-1]) * _log_uniform(size_key, 0.03, 0.2)
  bump = jnp.ones((1,) * (len(shape) - 1))
  for axis, size in enumerate(shape[:-1]):
    at = jnp.arange(size) - centre[axis] * (size - 1)
    line = jnp.exp(-0.5 * (at / radius) ** 2)
    bump = bump * line.reshape([-1 if a == axis else 1 for a in range(len(shape) - 1)])
  hot = jax.nn.one_hot(jax.random.randint(class_key, (), 0, shape[-1]), shape[-1])
  hot = hot.reshape((1,) * (len(shape) - 1) + (shape[-1],))
  height = jax.random.uniform(height_key, (), minval=4.0, maxval=14.0)
  return jnp.where(jax.random.bernoulli(use_key, 0.5), height, 0.0) * bump[..., None] * hot


def _change_class(key, mask, num_classes):
  """Removes a foreground class, or gives it another's id, in a tenth of the draws."""
  use_key, from_key, to_key = jax.random.split(key, 3)
  source = jax.random.randint(from_key, (), 1, num_classes)
  target = jax.random.randint(to_key, (), 0, num_classes)
  changed = jnp.where(mask == source, target, mask).astype(jnp.uint8)
  use = jax.random.bernoulli(use_key, 0.1 if num_classes > 2 else 0.02)
  return jnp.where(use, changed, mask)


def _shift(key, mask):
  """Moves the mask by up to a tenth of each axis, in a quarter of the draws; background enters."""
  use_key, shift_key = jax.random.split(key)
  use = jax.random.bernoulli(use_key, 0.25)
  by = jax.random.uniform(shift_key, (mask.ndim,), minval=-0.1, maxval=0.1)
  for axis, size in enumerate(mask.shape):
    step = jnp.where(use, jnp.round(by[axis] * size).astype(jnp.int32), 0)
    moved = jnp.roll(mask, step, axis=axis)
    origin = jnp.arange(size) - step
    inside = (origin >= 0) & (origin < size)
    mask = jnp.where(inside.reshape([-1 if a == axis else 1 for a in range(mask.ndim)]), moved, 0)
  return mask.astype(jnp.uint8)


def _blur(values, width):
  """Blurs f32[*S, C] along each spatial axis by a Gaussian of `width` pixels, sums kept."""
  for axis in range(values.ndim - 1):
    at = jnp.arange(values.shape[axis], dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((at[:, None] - at[None, :]) / width) ** 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    values = jnp.moveaxis(jnp.tensordot(weights, values, axes=(1, axis)), 0, axis)
  return values


def _log_uniform(key, low, high):
  return low * (high / low) ** jax.random.uniform(key)
