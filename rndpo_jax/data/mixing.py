"""Boxes cut from one image and pasted into another, with whatever belongs to the pixels."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import types


def boxes(
  key: jax.Array, count: int, size: tuple[int, ...], *, low: float, high: float
) -> jax.Array:
  """Random boxes, true inside.

  A box has a share of the image drawn uniformly from low..high, the same share^(1 / number of
  axes) of each axis in the mean, edges that differ by up to a factor of 2, and lies wholly inside.
  Source of the use: Yun et al., "CutMix", ICCV 2019; French et al., BMVC 2020, for segmentation.

  Args:
    key: one key; box n draws from fold_in(key, n).
    count: B.
    size: S.
    low: least share of the pixels, above 0.
    high: largest share, at most 1.

  Returns:
    bool[B, *S].
  """
  limits = jnp.asarray(size, jnp.float32)

  def one(number):
    share_key, form_key, place_key = jax.random.split(jax.random.fold_in(key, number), 3)
    share = jax.random.uniform(share_key, minval=low, maxval=high)
    form = 0.5 * jnp.log(2.0) * jax.random.uniform(form_key, (len(size),), minval=-1.0)
    edges = share ** (1.0 / len(size)) * jnp.exp(form - jnp.mean(form))
    edges = jnp.clip(jnp.round(jnp.minimum(edges, 1.0) * limits), 1, limits)
    first = jnp.floor(jax.random.uniform(place_key, (len(size),)) * (limits - edges + 1))
    inside = jnp.ones(size, bool)
    for axis, length in enumerate(size):
      place = jnp.arange(length).reshape([-1 if a == axis else 1 for a in range(len(size))])
      inside &= (place >= first[axis]) & (place < first[axis] + edges[axis])
    return inside

  return jax.vmap(one)(jnp.arange(count))


def paste(inside: types.Array, source: Any, target: Any) -> Any:
  """`target` with the pixels of `source` inside the boxes.

  Args:
    inside: bool[B, *S].
    source: pytree of arrays [B, *S] or [B, *S, channels].
    target: the same structure and shapes.
  """

  def one(new, old):
    chex.assert_equal_shape([new, old])
    chex.assert_equal_shape_prefix([new, inside], inside.ndim)
    return jnp.where(inside.reshape(inside.shape + (1,) * (new.ndim - inside.ndim)), new, old)

  return jax.tree.map(one, source, target)
