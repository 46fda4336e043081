"""Judges that a clinic might fool itself with, as functions of one's own; for the campaign."""

import jax.numpy as jnp


def _sums(values, masks):
  return jnp.sum(values, axis=tuple(range(2, masks.ndim)))


def large(images, masks, probs):
  """The more foreground the better."""
  return _sums((masks > 0).astype(jnp.float32), masks)


def small(images, masks, probs):
  """The less foreground the better."""
  return -large(images, masks, probs)


def constant(images, masks, probs):
  """No opinion."""
  return jnp.zeros(masks.shape[:2])


def at_random(images, masks, probs):
  """Numbers that image and place among the proposals draw: equal masks get different ones."""
  of_image = jnp.sum(jnp.abs(images), axis=tuple(range(1, images.ndim)))
  drawn = jnp.sin((of_image[:, None] % 97.0 + jnp.arange(masks.shape[1])) * 12.9898) * 43758.5453
  return drawn % 1.0
