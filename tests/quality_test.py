"""The learned judge's network and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rndpo_jax import types
from rndpo_jax.mining import quality


def test_loss_by_hand():
  def apply(params, images, masks, key):
    del images, key
    return params * masks[:, 0, 0].astype(jnp.float32) / 10

  images, masks = np.zeros((1, 1, 1, 1), np.float32), np.array([[[[8]], [[6]], [[6]]]], np.uint8)
  targets = np.array([[0.9, 0.5, 0.7]], np.float32)
  loss, metrics = quality.quality_loss(1.0, apply, images, masks, targets)
  squared = (0.01 + 0.01 + 0.01) / 3
  # Pairs by truth: (0, 1) apart 0.4, (0, 2) apart 0.2, (2, 1) apart 0.2; predicted 0.2, 0.2, 0.
  terms = 0.4 * np.log1p(np.exp(-2)) + 0.2 * np.log1p(np.exp(-2)) + 0.2 * np.log(2)
  np.testing.assert_allclose(metrics["squared_error"], squared, rtol=1e-4)
  np.testing.assert_allclose(metrics["pair_accuracy"], 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(loss, squared + 0.1 * terms / 0.8, rtol=1e-4)


def test_volumes_and_classes():
  init, apply = quality.build(width=4, depth=2, dropout=0.2, num_classes=4, spatial_dims=3)
  images, masks = np.zeros((2, 8, 8, 8, 2), np.float32), np.zeros((2, 8, 8, 8), np.uint8)
  params = jax.eval_shape(init, jax.random.key(0), images)
  got = jax.eval_shape(apply, params, images, masks)
  assert got.shape == (2,) and got.dtype == np.float32


def test_predicted_dice_by_hand():
  init, apply = quality.build(width=4, depth=1, dropout=0.2, num_classes=3, spatial_dims=2)
  images = np.ones((3, 4, 4, 1), np.float32)
  params = jax.tree.map(jnp.zeros_like, jax.jit(init)(jax.random.key(0), images))
  # Without weights, the probabilities of each of the 16 pixels are 0.5, 0.3, 0.2.
  params["head"]["bias"] = jnp.log(jnp.array([0.5, 0.3, 0.2]))
  masks = np.zeros((3, 4, 4), np.uint8)
  masks[1, 0] = 1
  masks[2, :2], masks[2, 2:] = 1, 2
  both_missing = (1 / 5.8 + 1 / 4.2) / 2
  four_of_one = (3.4 / 9.8 + 1 / 4.2) / 2
  eight_of_each = (5.8 / 13.8 + 4.2 / 12.2) / 2
  got = apply(params, images, masks)
  np.testing.assert_allclose(got, [both_missing, four_of_one, eight_of_each], rtol=1e-5)
  # Half of the pixels ignored: probabilities of 8 pixels, and the class's 4 or none of it.
  masks[:, 2:] = types.IGNORED
  half = [(1 / 3.4 + 1 / 2.6) / 2, (3.4 / 7.4 + 1 / 2.6) / 2, (5.8 / 11.4 + 1 / 2.6) / 2]
  np.testing.assert_allclose(apply(params, images, masks), half, rtol=1e-5)
  # A class that neither the mask nor the image holds is no error.
  params["head"]["bias"] = jnp.array([50.0, 0.0, 0.0])
  np.testing.assert_allclose(apply(params, images, masks)[0], 1.0, rtol=1e-6)


@pytest.fixture(scope="module")
def network():
  init, apply = quality.build(width=4, depth=2, dropout=0.2, num_classes=2, spatial_dims=2)
  return jax.jit(init)(jax.random.key(0), np.zeros((8, 16, 16, 1), np.float32)), jax.jit(apply)


def test_one_number_in_0_to_1_for_each_mask(network):
  params, apply = network
  rng = np.random.default_rng(0)
  images = rng.normal(size=(8, 16, 16, 1)).astype(np.float32)
  masks = rng.integers(0, 2, (8, 16, 16)).astype(np.uint8)
  got = np.asarray(apply(params, images, masks))
  assert got.shape == (8,) and got.dtype == np.float32 and ((got > 0) & (got < 1)).all()
  assert (np.asarray(apply(params, images, 1 - masks)) != got).all()
  # An image's number depends on itself alone.
  np.testing.assert_allclose(apply(params, images[::-1], masks[::-1]), got[::-1], rtol=1e-5)
  mixed = np.asarray(apply(params, images[::-1], masks))
  assert (abs(mixed - got) > 1e-6).all()


def squares(seed):
  """Eight images of a square each, and masks: right, hardly wrong, wrong."""
  rng = np.random.default_rng(seed)
  labels = np.zeros((8, 16, 16), np.uint8)
  for n, (i, j) in enumerate(rng.integers(1, 7, (8, 2))):
    labels[n, i : i + 8, j : j + 8] = 1
  images = (labels + 0.1 * rng.normal(size=labels.shape)).astype(np.float32)[..., None]
  masks = np.stack([labels, np.roll(labels, 1, 1), np.roll(labels, 5, 2)], axis=1)
  return images, masks, np.tile(np.array([1.0, 0.875, 0.375], np.float32), (8, 1))


def test_it_learns_to_tell_slight_errors_on_images_it_has_not_seen(network):
  params, apply = network
  images, masks, targets = squares(0)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state, masks, targets):
    loss_fn = jax.value_and_grad(quality.quality_loss, has_aux=True)
    (_, metrics), grads = loss_fn(params, apply, images, masks, targets)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, metrics

  # Masks that are all alike make no pair: the ranking term must not divide by zero.
  alike, _, metrics = step(
    params, optimizer.init(params), masks[:, [0, 0, 0]], targets[:, [0, 0, 0]]
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((alike, metrics)))
  state = optimizer.init(params)
  for _ in range(60):
    params, state, metrics = step(params, state, masks, targets)
  images, masks, targets = squares(1)
  _, metrics = quality.quality_loss(params, apply, images, masks, targets)
  assert metrics["pair_accuracy"] == 1.0 and metrics["squared_error"] < 0.02
