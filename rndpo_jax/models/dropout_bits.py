"""Random draws in one fused loop on CPU, bit for bit those of `jax.random`.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. JAX
compiles its Threefry for CPU as a loop over rounds that writes its state to memory each time,
which takes six times as long. On other platforms the draws are left to `jax.random`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
  """True with probability p: the draws of `jax.random.bernoulli(key, p, shape)`.

  Args:
    key: one key. Of another kind than Threefry, the draws are left to `jax.random`, as are 2**32
      or more.
    p: a probability in 0..1.
    shape: of the result.

  Returns:
    bool[shape].
  """

  def plain(key):
    return jax.random.bernoulli(key, p, shape)

  def fused(key):
    # jax.random compares a uniform of 23 bits with p in float32; so does this, in integers.
    limit = math.ceil(float(np.float32(p)) * 2**23)
    return (_bits(key, shape) >> 9) < jnp.uint32(limit)

  if jax.random.key_impl(key) != "threefry2x32" or math.prod(shape) >= 2**32:
    return plain(key)
  return jax.lax.platform_dependent(key, cpu=fused, default=plain)


def _bits(key, shape):
  """u32[shape], the words of Threefry-2x32 at counters 0, 1, ... joined by exclusive or."""
  count = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]))
    count += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  first, second = jax.random.key_data(key)
  words = (first, second, first ^ second ^ jnp.uint32(_PARITY))
  # The counters' upper word is zero.
  left, right = jnp.broadcast_to(first, shape), count + second
  for turn in range(5):
    for distance in _ROTATIONS[turn % 2]:
      left = left + right
      right = left ^ ((right << distance) | (right >> (32 - distance)))
    left = left + words[(turn + 1) % 3]
    right = right + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
  return left ^ right
