"""Ignored pixels in the supervised losses: as if they were not there."""

import functools

import jax
import numpy as np
import pytest

from rndpo_jax import losses, types
from rndpo_jax.losses import segmentation

IGNORED = np.random.default_rng(0).random((2, 6, 5)) < 0.4
LOGITS = np.random.default_rng(1).normal(size=(2, 6, 5, 3)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, 3, (2, 6, 5)).astype(np.uint8)
MARKED = np.where(IGNORED, types.IGNORED, LABELS).astype(np.uint8)
CROSS_ENTROPY = functools.partial(segmentation.cross_entropy, has_ignored=True)


def _known(loss, n):
  """The loss of image n's other pixels, as a row of them."""
  known = ~IGNORED[n]
  return float(loss(LOGITS[n][known][None, None], LABELS[n][known][None, None])[0])


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, segmentation.soft_dice_loss])
def test_the_loss_is_that_of_the_other_pixels(loss):
  got = jax.jit(loss)(LOGITS, MARKED)
  np.testing.assert_allclose(got, [_known(loss, 0), _known(loss, 1)], rtol=1e-6)
  assert got[0] != loss(LOGITS, LABELS)[0]


@pytest.mark.parametrize("ignored", [IGNORED, np.ones_like(IGNORED)])
def test_the_gradient_is_zero_at_ignored_pixels_alone(ignored):
  """Also for an image of nothing else, which costs nothing."""
  labels = np.where(ignored, types.IGNORED, LABELS).astype(np.uint8)

  def loss(logits):
    return losses.supervised_loss(logits, labels, dice_weight=1.0, has_ignored=True)[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(LOGITS)
  np.testing.assert_array_equal((np.asarray(gradient) == 0).all(axis=-1), ignored)
  assert np.isfinite(value) and (value == 0) == ignored.all()
