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
  """A number that a mask's pixels draw, which has nothing to do with its worth."""
  draws = jnp.sin(jnp.arange(masks[0, 0].size) * 12.9898).reshape(masks.shape[2:]) * 43758.5453
  return (_sums((masks > 0) * (draws - jnp.floor(draws) - 0.5), masks) * 1e3 + 0.3) % 1.0
