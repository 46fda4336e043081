import itertools

import jax
import numpy as np
import pytest

from rndpo_jax.models import mirroring


@pytest.mark.parametrize("size, turns", [((4, 6), False), ((4, 4), True), ((2, 3, 4), False)])
def test_probabilities_are_the_mean_over_flips_and_turns(size, turns):
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, *size, 1)).astype(np.float32)
  kernel = rng.standard_normal((1, *size, 3)).astype(np.float32)  # of the place, so flips differ
  apply = mirroring.mirrored(lambda params, images: images * params, turns)
  got = np.asarray(jax.nn.softmax(apply(kernel, images)))
  axes = range(1, len(size) + 1)
  flips = [f for n in range(len(size) + 1) for f in itertools.combinations(axes, n)]
  parts = []
  for flip, turn in itertools.product(flips, (0, 1) if turns else (0,)):
    logits = np.float64(np.rot90(np.flip(images, flip), turn, (1, 2)) * kernel)
    exp = np.exp(np.flip(np.rot90(logits, -turn, (1, 2)), flip))
    parts.append(exp / exp.sum(-1, keepdims=True))
  np.testing.assert_allclose(got, np.mean(parts, axis=0), rtol=1e-5)
  # All symmetries of the grid: an image seen from another side has the same mean.
  if turns:
    other = np.rot90(images, 1, (1, 2))
    turned = jax.nn.softmax(apply(np.ones_like(kernel), other))
    np.testing.assert_allclose(
      turned, np.rot90(jax.nn.softmax(apply(np.ones_like(kernel), images)), 1, (1, 2)), rtol=1e-5
    )
