"""A network's mean prediction over mirrored and turned images."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def mirrored(apply: Callable, turns: bool = False) -> Callable:
  """(params, images f32[B, *S, I]) -> log of the mean probabilities over all flips, f32[B, *S, C].

  The image is flipped along every set of its spatial axes, 4 or 8 of them, and each flip undone;
  with `turns` also each of these turned by 90 degrees in the (H, W) plane, which must be square.
  Logarithms take the place of logits: their softmax is the mean.
  """

  def mean(params, images):
    axes = range(1, images.ndim - 1)
    flips = [f for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]
    total = None
    for flip, turn in itertools.product(flips, (0, 1) if turns else (0,)):
      seen = jnp.flip(images, flip)
      logits = apply(params, jnp.rot90(seen, turn, (1, 2)) if turn else seen)
      logits = jnp.flip(jnp.rot90(logits, -turn, (1, 2)) if turn else logits, flip)
      one = jax.nn.log_softmax(logits, axis=-1)
      total = one if total is None else jnp.logaddexp(total, one)
    return total - jnp.log(float(len(flips) * (2 if turns else 1)))

  return mean


# How a teacher looks at an image: once, or as the mean over these.
TEACHER_VIEWS = {
  "one": lambda apply: apply,
  "flips": mirrored,
  "flips_turns": lambda apply: mirrored(apply, turns=True),
}
