"""Neighbours along the last spatial axis side by side in the channels, for the lanes of a TPU.

A TPU keeps the channels of an array in tiles of 128 lanes: 32 channels take the memory and the
bandwidth of 128. Folded by n, f[B, *S, F] is f[B, *S', n F] with S' = (..., L / n): the same
numbers in the same order, n neighbours to a tile. The convolution of a folded array is one of the
same window whose kernel holds each tap at n places and zeros elsewhere, so that parameters stay
those of the plain network.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def folds(lanes: int, width: int, depth: int, length: int) -> tuple[int, ...]:
  """By how much each level of a U-Net is folded.

  Args:
    lanes: channels of a tile; 1 folds nothing.
    width: channels of the first level, which deeper ones double at most.
    depth: levels.
    length: of the last spatial axis at the first level, halved at each deeper one.

  Returns:
    Powers of two, halved from level to level, so that all levels have as many blocks.
  """
  fold = 1
  while 2 * fold * width <= lanes and length % (2 * fold) == 0:
    fold *= 2
  return tuple(max(1, fold >> level) for level in range(depth))


def fold(x: jax.Array, by: int) -> jax.Array:
  """f[B, *S, F] -> f[B, *S', by F]."""
  *lead, length, features = x.shape
  return x.reshape(*lead, length // by, by * features)


def unfold(x: jax.Array, by: int) -> jax.Array:
  """Undoes `fold`."""
  *lead, length, features = x.shape
  return x.reshape(*lead, length * by, features // by)


def fold_kernel(kernel: jax.Array, by: int, repeats: int = 1) -> jax.Array:
  """The kernel that does to arrays folded by `by` what `kernel` does to plain ones.

  Output b of a block reads, through tap t in -1, 0, 1, input b + t: entry a = (b + t) mod by of
  the block s = floor((b + t) / by) away. Where the input is an array that still has to be repeated
  along the axis, entries a that are repeats of one another become one.

  Args:
    kernel: f32[*(3 an axis), I, F].
    by: what the output is folded by.
    repeats: of each entry of the input, which is folded by `by / repeats`.

  Returns:
    f32[*(3 an axis), by / repeats * I, by F].
  """
  if by == 1:
    return kernel
  entries = by // repeats
  places = np.zeros((3, entries, by, 3), np.float32)  # block s, entry a, output b, tap t
  for output in range(by):
    for tap in (-1, 0, 1):
      block, entry = divmod(output + tap, by)
      places[block + 1, entry // repeats, output, tap + 1] = 1
  *window, _, inputs, features = kernel.shape
  # As one product whose last axis is that of the result, which fills the lanes: an einsum over the
  # taps alone has `by` of them last, and took a third of a small network's step on TPU v5e.
  spread = np.einsum("sabt,fg->tfsabg", places, np.eye(features, dtype=np.float32))
  spread = spread.reshape(3 * features, 3 * entries, by * features)
  taps = jnp.moveaxis(kernel.reshape(-1, 3, inputs, features), 1, 2).reshape(-1, 3 * features)
  folded = jnp.einsum(
    "rk,kef->ref",
    taps,
    spread,
    precision=jax.lax.Precision.HIGHEST,  # zeros and ones: nothing is to be rounded
  )
  folded = folded.reshape(-1, inputs, 3, entries, by * features)
  folded = jnp.transpose(folded, (0, 2, 3, 1, 4))
  return folded.reshape(*window, 3, entries * inputs, by * features)


def fold_pointwise(kernel: jax.Array, by: int) -> jax.Array:
  """`fold_kernel` of a window of one: f32[*(1 an axis), I, F] -> f32[..., by I, by F]."""
  if by == 1:
    return kernel
  *window, inputs, features = kernel.shape
  eye = jnp.eye(by)[:, None, :, None]
  return (eye * kernel.reshape(1, inputs, 1, features)).reshape(*window, by * inputs, by * features)


def pool(x: jax.Array, by: int) -> jax.Array:
  """Maximum of neighbours two by two: f[B, *S', by F] -> f[B, *S', by / 2 F]."""
  parts = jnp.split(x, by, axis=-1)
  pairs = zip(parts[::2], parts[1::2], strict=True)
  return jnp.concatenate([jnp.where(a >= b, a, b) for a, b in pairs], axis=-1)
