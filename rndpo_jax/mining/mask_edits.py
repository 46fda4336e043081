"""Samplers that change a proposal's mask where a segmenter errs: parts too many, parts missing.

Each is a function (keys [n], masks u8[n, *S], C) -> u8[n, *S]. `relabel` brings logits in line.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax.data import components
from rndpo_jax.mining import corruptions


def corrupt(keys, masks, num_classes):
  """A gross error, by `corruptions.corrupt`: a part more or less, a class swapped, a shift."""
  one = jax.vmap(lambda key, mask: corruptions.corrupt(key, mask[None], num_classes)[0])
  return one(keys, masks)


def largest_component(keys, masks, num_classes):
  """Of each class its largest component alone."""
  del keys
  return components.largest(masks, num_classes)


def drop_component(keys, masks, num_classes):
  """Without one of its components, each as likely; a mask of one component is emptied."""
  del num_classes
  return components.without_one(keys, masks)


# In the order in which they act.
EDITS = {
  "corrupt": corrupt,
  "largest_component": largest_component,
  "drop_component": drop_component,
}


def edit(names, keys: jax.Array, logits: jax.Array) -> jax.Array:
  """Logits whose argmax is the edited mask.

  Args:
    names: of EDITS, those that act; others are passed over.
    keys: [b, count], one a proposal.
    logits: f32[b, count, *S, C].
  """
  for place, (name, function) in enumerate(EDITS.items()):
    if name in names:
      own = jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(keys.ravel())
      flat = logits.reshape(-1, *logits.shape[2:])
      masks = jnp.argmax(flat, axis=-1).astype(jnp.uint8)
      logits = relabel(flat, function(own, masks, logits.shape[-1])).reshape(logits.shape)
  return logits


def relabel(logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Logits whose argmax is `masks`: where it is not, both classes' logits change places.

  Args:
    logits: f32[..., C].
    masks: u8[...].

  Returns:
    f32[..., C]; the same values, so a sure pixel stays as sure.
  """
  current = jnp.argmax(logits, axis=-1)
  highest = jnp.max(logits, axis=-1, keepdims=True)
  wanted = jnp.take_along_axis(logits, masks[..., None].astype(jnp.int32), axis=-1)
  classes = jnp.arange(logits.shape[-1]).reshape(*(1,) * masks.ndim, -1)
  new = jnp.where(classes == current[..., None], wanted, logits)
  return jnp.where(classes == masks[..., None], highest, new)
