"""Proposals from files among those of samplers: their logits, and which of them are there."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import types

CERTAIN = 1e4  # logit of a mask's class beside 0 of the others; exp(-1e4) is 0


def logits(files: types.FileProposals, num_classes: int) -> jax.Array:
  """Those of certainty, f32[b, F, *S, C]: the softmax is zeros and ones."""
  return CERTAIN * jax.nn.one_hot(files.masks, num_classes, dtype=jnp.float32)


def add(sampled: types.Proposals, mix, files: types.FileProposals) -> types.Proposals:
  """Says which proposals are there, and their scores; those of samplers are, and have none.

  Args:
    sampled: K proposals an image.
    mix: as `proposals.parse_mix` returns it.
    files: F masks an image, those of the entry `file`.

  Returns:
    `sampled` with present bool[b, K] and file_scores f32[b, K].
  """
  count = files.present.shape[0]
  present, scores = [], []
  for atoms, number in mix:
    is_file = "file" in atoms
    present.append(files.present if is_file else jnp.ones((count, number), bool))
    scores.append(files.scores if is_file else jnp.full((count, number), jnp.nan))
  return sampled._replace(
    present=jnp.concatenate(present, axis=1), file_scores=jnp.concatenate(scores, axis=1)
  )
