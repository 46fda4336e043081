"""Overlap of every mask of one set with every mask of another, by matrix products.

K x K pairs of masks are counted as one product of one-hot matrices [K, n] x [n, K] a class,
instead of K^2 elementwise passes. The products are of zeros and ones summed in float32, so
counts are exact integers up to 2^24 pixels, at any matmul precision of any device.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MAX_PIXELS = 2**24  # integers that float32 adds without rounding


def class_counts(first: jax.Array, second: jax.Array, num_classes: int):
  """Counts, class by class, the pixels of each mask and those two masks share.

  Args:
    first: u8[b, K, *S] class ids below `num_classes`.
    second: u8[b, M, *S], likewise.
    num_classes: C.

  Returns:
    (shared f32[C, b, K, M], first_size f32[C, b, K], second_size f32[C, b, M]), whole numbers.

  Raises:
    ValueError: a mask has more than 2^24 pixels, above which float32 counts round.
  """
  num_pixels = math.prod(first.shape[2:])
  if num_pixels > MAX_PIXELS:
    raise ValueError(
      f"masks of {num_pixels} pixels: overlaps are counted in float32, exact up to {MAX_PIXELS}; "
      "use a smaller config.data.size"
    )
  first = first.reshape(*first.shape[:2], num_pixels)
  second = second.reshape(*second.shape[:2], num_pixels)

  def count(label):
    ones_first = (first == label).astype(jnp.float32)
    ones_second = (second == label).astype(jnp.float32)
    shared = jnp.einsum(
      "bkn,bmn->bkm", ones_first, ones_second, precision=jax.lax.Precision.HIGHEST
    )
    return shared, jnp.sum(ones_first, axis=-1), jnp.sum(ones_second, axis=-1)

  # One class at a time keeps the one-hot form from taking C times the memory of the masks.
  return jax.lax.map(count, jnp.arange(num_classes, dtype=first.dtype))


def pairwise_dice(first: jax.Array, second: jax.Array, num_classes: int) -> jax.Array:
  """Mean foreground Dice of each mask of one set with each of another.

  Dice of class c is 2 |A_c and B_c| / (|A_c| + |B_c|); the mean runs over classes 1..C-1. A
  class that both masks lack counts 1, one that only one of them lacks counts 0.

  Args:
    first: u8[b, K, *S]. second: u8[b, M, *S]. num_classes: C >= 2.

  Returns:
    f32[b, K, M], in 0..1.
  """
  shared, first_size, second_size = class_counts(first, second, num_classes)
  total = first_size[1:, :, :, None] + second_size[1:, :, None, :]
  return jnp.mean(jnp.where(total > 0, 2 * shared[1:] / jnp.maximum(total, 1), 1.0), axis=0)


def pairwise_region_size(
  masks: jax.Array, num_classes: int, classes: tuple[int, ...] | None = None
) -> jax.Array:
  """|D|, the number of pixels in which two masks differ, of each two masks of an image.

  Args:
    masks: u8[b, K, *S]. num_classes: C. classes: see `margins.region`.

  Returns:
    i32[b, K, K], symmetric, with a zero diagonal.
  """
  others = [k for k in range(num_classes) if classes is not None and k not in classes]
  for k in others[1:]:  # all that do not count as one class, in which masks cannot differ
    masks = jnp.where(masks == k, jnp.asarray(others[0], masks.dtype), masks)
  shared, _, _ = class_counts(masks, masks, num_classes)
  agreeing = jnp.sum(shared, axis=0).astype(jnp.int32)
  return math.prod(masks.shape[2:]) - agreeing


def expected_dice(masks: jax.Array, probs: jax.Array, num_classes: int) -> jax.Array:
  """The Dice that probabilities q expect of masks, mean over the foreground classes c.

      (2 sum_p q_p[c] 1[y_p = c] + 1) / (sum_p q_p[c] + |y = c| + 1)

  The sums run over all pixels; the 1 lets a class that is neither expected nor drawn count 1.

  Args:
    masks: u8[b, K, *S], y.
    probs: f32[b, *S, C], q.
    num_classes: C.

  Returns:
    f32[b, K].
  """
  axes = tuple(range(2, masks.ndim))

  def soft_dice(label):
    drawn = (masks == label.astype(masks.dtype)).astype(probs.dtype)
    expected = jnp.take(probs, label, axis=-1)[:, None]
    total = jnp.sum(drawn, axis=axes) + jnp.sum(expected, axis=axes)
    return (2 * jnp.sum(drawn * expected, axis=axes) + 1) / (total + 1)

  return jnp.mean(jax.lax.map(soft_dice, jnp.arange(1, num_classes)), axis=0)


def diversity(masks: jax.Array, num_classes: int, present: jax.Array | None = None) -> jax.Array:
  """Mean pairwise Dice of an image's proposals: 1 when all are the same, lower when they differ.

  Args:
    masks: u8[b, K, *S], K >= 2. num_classes: C.
    present: bool[b, K], the proposals that count; None for all.

  Returns:
    f32[b], the mean over the K (K - 1) / 2 pairs of the mean foreground Dice; NaN where fewer than
    two are present.
  """
  count = masks.shape[1]
  dice = pairwise_dice(masks, masks, num_classes)
  if present is not None:
    pairs = present[:, :, None] & present[:, None, :] & ~jnp.eye(count, dtype=bool)[None]
    return jnp.sum(jnp.where(pairs, dice, 0.0), axis=(1, 2)) / jnp.sum(pairs, axis=(1, 2))
  return (jnp.sum(dice, axis=(1, 2)) - count) / (count * (count - 1))
