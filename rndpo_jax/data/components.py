"""Connected components of masks, on the device: the largest of each class, or all but one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import types


def largest(masks: types.Array, num_classes: int) -> jax.Array:
  """Masks in which each foreground class is left with its largest component alone.

  Pixels are connected along the axes (4 neighbours in 2D, 6 in 3D). Of components of the same size
  the one that holds the last pixel in row order stays. Every pixel points at a pixel of its own
  component, at first itself; neighbours take the larger place and pointers are followed, until
  nothing changes: some log2 of the longest path.

  Args:
    masks: u8[B, *S] class ids below C.
    num_classes: C.

  Returns:
    u8[B, *S]; what is taken out becomes background. An empty mask stays empty.
  """
  return jax.vmap(lambda mask: _largest(mask, num_classes))(masks)


def without_one(keys: jax.Array, masks: types.Array) -> jax.Array:
  """Masks without one of their components, drawn with equal chances over all foreground classes.

  Args:
    keys: [B], one a mask.
    masks: u8[B, *S] class ids, connected as in `largest`.

  Returns:
    u8[B, *S]; what is taken out becomes background. An empty mask stays empty.
  """

  def one(key, mask):
    root, flat = _roots(mask), mask.ravel()
    is_root = (root == jnp.arange(mask.size)) & (flat > 0)
    drawn = jnp.argmax(jnp.where(is_root, jax.random.uniform(key, root.shape), -1.0))
    kept = jnp.where(root == drawn, 0, flat)
    return kept.reshape(mask.shape).astype(jnp.uint8)

  return jax.vmap(one)(keys, masks)


def _roots(mask):
  """i32[pixels]: of each pixel the last pixel, in row order, of its component."""
  places = jnp.arange(mask.size, dtype=jnp.int32).reshape(mask.shape)

  def spread(root):
    new = root
    for axis in range(mask.ndim):
      (class_a, class_b), (root_a, root_b) = _neighbours(mask, axis), _neighbours(root, axis)
      met = jnp.where(class_a == class_b, jnp.maximum(root_a, root_b), -1)
      edge = [(0, 0)] * mask.ndim
      for before in (0, 1):
        edge[axis] = (before, 1 - before)
        new = jnp.maximum(new, jnp.pad(met, edge, constant_values=-1))
    jumped = new.ravel()
    return jumped[jumped].reshape(mask.shape)

  def step(state):
    root, _ = state
    new = spread(root)
    return new, jnp.any(new != root)

  root, _ = jax.lax.while_loop(lambda state: state[1], step, (places, jnp.bool_(True)))
  return root.ravel()


def _largest(mask, num_classes):
  size, flat, root = mask.size, mask.ravel(), _roots(mask)
  count = jnp.zeros(size, jnp.int32).at[root].add(1)
  class_of_root = jnp.where(count > 0, flat, 0)
  keep = jnp.zeros(size, bool)
  for label in range(1, num_classes):
    own = jnp.where(class_of_root == label, count, 0)
    last = size - 1 - jnp.argmax(own[::-1])
    keep |= (root == last) & (flat == label)
  return jnp.where(keep, flat, 0).reshape(mask.shape).astype(jnp.uint8)


def _neighbours(x, axis):
  """All but the last and all but the first along an axis."""
  length = x.shape[axis]
  return (
    jax.lax.slice_in_dim(x, 0, length - 1, axis=axis),
    jax.lax.slice_in_dim(x, 1, length, axis=axis),
  )
