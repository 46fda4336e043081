"""Smooth random fields, for proposals, corruptions and elastic deformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def smooth_noise(key: jax.Array, shape: tuple[int, ...], smoothing: float) -> jax.Array:
  """A smooth Gaussian random field, drawn apart for each channel.

  White noise on a grid of `smoothing` / 2 pixels' spacing that reaches beyond the image, spread
  by a Gaussian along each axis. The weights of a pixel are scaled to unit Euclidean norm, so
  mean 0 and variance 1 hold exactly at every pixel, at the border too.

  Args:
    key: one key.
    shape: (*S, channels).
    smoothing: standard deviation of the Gaussian in pixels; 0 gives white noise.

  Returns:
    f32[*S, channels].
  """
  weights = [_noise_weights(size, smoothing) for size in shape[:-1]]
  field = jax.random.normal(key, (*(w.shape[1] for w in weights), shape[-1]))
  for axis, w in enumerate(weights):
    field = jnp.moveaxis(
      jnp.tensordot(w, field, axes=(1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
    )
  return field


def _noise_weights(size, smoothing):
  """Weights f32[size, nodes] from a coarse grid of nodes to pixels, each row of unit norm."""
  if smoothing == 0:
    return jnp.eye(size, dtype=jnp.float32)
  spacing = max(1.0, smoothing / 2)
  margin = int(np.ceil(3 * smoothing / spacing))
  nodes = (np.arange(-margin, np.ceil((size - 1) / spacing) + margin + 1)) * spacing
  weights = np.exp(-0.5 * ((np.arange(size)[:, None] - nodes) / smoothing) ** 2)
  return jnp.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), jnp.float32)
