"""Supervised losses: cross-entropy and soft Dice."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.losses import class_ids


def cross_entropy(
  logits: types.Array, labels: types.Array, *, has_ignored: bool = False
) -> jax.Array:
  """Mean over pixels of -log softmax(z_p)[y_p]; ignored pixels do not count.

  Args:
    logits: f[B, *S, C], C >= 2.
    labels: u8[B, *S] class ids, and with `has_ignored` also `types.IGNORED`.
    has_ignored: whether there may be ignored pixels.

  Returns:
    f32[B], one value an image; 0 for an image of ignored pixels alone.

  Raises:
    ValueError: if C = 1, or on a class id that is not below C, where it can be seen.
  """
  _check_classes(logits, labels, has_ignored)
  chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
  logits = logits.astype(jnp.float32)
  ids, space = _class_ids(logits), tuple(range(1, labels.ndim))
  known = labels != types.IGNORED
  if has_ignored:
    # An ignored pixel is made one of class 0 beyond doubt: its entropy is 0. Masking the entropies
    # instead gives a wrong gradient where devices share H: XLA 0.10's partitioner (`mesh_test`).
    logits = jnp.where(known[..., None], logits, jnp.where(ids == 0, 0.0, -1e30))
  onehot = labels[..., None] == ids
  log_partition = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.sum(jnp.where(onehot, logits, 0.0), axis=-1)
  mean = jnp.mean(log_partition - picked, axis=space)
  if not has_ignored:
    return mean
  return mean * (math.prod(labels.shape[1:]) / jnp.maximum(jnp.sum(known, axis=space), 1))


def soft_dice_loss(logits: types.Array, labels: types.Array, *, smooth: float = 1.0) -> jax.Array:
  """One minus soft Dice, mean over the foreground classes.

  Dice_c = (2 sum_p q_pc y_pc + smooth) / (sum_p q_pc + sum_p y_pc + smooth), q = softmax(z), p
  over the pixels that are not ignored.
  Source: Milletari et al., "V-Net", 3DV 2016 (here with plain, not squared, sums).

  Args:
    logits: f[B, *S, C], C >= 2.
    labels: u8[B, *S] class ids, or `types.IGNORED`.
    smooth: pixels added to both sides; a class absent from label and prediction costs about 0.

  Returns:
    f32[B].

  Raises:
    ValueError: as `cross_entropy`.
  """
  _check_classes(logits, labels)
  chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  probs = jnp.where(labels[..., None] != types.IGNORED, probs, 0.0)
  onehot = (labels[..., None] == _class_ids(logits)).astype(jnp.float32)
  space = tuple(range(1, labels.ndim))
  overlap = jnp.sum(probs * onehot, axis=space)[:, 1:]
  total = jnp.sum(probs + onehot, axis=space)[:, 1:]
  return jnp.mean(1.0 - (2.0 * overlap + smooth) / (total + smooth), axis=-1)


def supervised_loss(
  logits: types.Array, labels: types.Array, *, dice_weight: float, has_ignored: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy + dice_weight * soft Dice loss, mean over the batch.

  Args:
    logits: f[B, *S, C].
    labels: u8[B, *S] class ids, or `types.IGNORED`.
    dice_weight: factor of the Dice term.
    has_ignored: as in `cross_entropy`.

  Returns:
    (f32[], {"cross_entropy", "dice_loss"}).

  Raises:
    ValueError: as `cross_entropy`.
  """
  entropy = jnp.mean(cross_entropy(logits, labels, has_ignored=has_ignored))
  dice = jnp.mean(soft_dice_loss(logits, labels))
  return entropy + dice_weight * dice, {"cross_entropy": entropy, "dice_loss": dice}


def _check_classes(logits, labels, has_ignored=True) -> None:
  if logits.shape[-1] < 2:
    raise ValueError(
      f"logits: found {logits.shape[-1]} class, expected C >= 2, for a softmax over one class is "
      "always 1; give background and foreground a logit each: concatenate([-z / 2, z / 2], -1)"
    )
  class_ids.check(logits, has_ignored & (labels == types.IGNORED), labels=labels)


def _class_ids(logits: jax.Array) -> jax.Array:
  """Class ids u8[1, ..., C], shaped to compare with labels[..., None]."""
  ids = jnp.arange(logits.shape[-1], dtype=jnp.uint8)
  return ids.reshape((1,) * (logits.ndim - 1) + (-1,))
