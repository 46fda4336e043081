"""The learned judge's network and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rndpo_jax.models import quality


def test_loss_by_hand():
  def apply(params, images, masks):
    del images
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
  init, apply = quality.build(4, 4, 3)
  images, masks = np.zeros((2, 8, 8, 8, 2), np.float32), np.zeros((2, 8, 8, 8), np.uint8)
  params = jax.eval_shape(init, jax.random.key(0), images, masks)
  got = jax.eval_shape(apply, params, images, masks)
  assert got.shape == (2,) and got.dtype == np.float32


@pytest.fixture(scope="module")
def network():
  init, apply = quality.build(4, 2, 2)
  shapes = np.zeros((8, 16, 16, 1), np.float32), np.zeros((8, 16, 16), np.uint8)
  return jax.jit(init)(jax.random.key(0), *shapes), jax.jit(apply)


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


def test_it_learns_to_tell_a_good_mask_from_a_bad_one(network):
  params, apply = network
  rng = np.random.default_rng(0)
  labels = np.zeros((8, 16, 16), np.uint8)
  for n, (i, j) in enumerate(rng.integers(0, 8, (8, 2))):
    labels[n, i : i + 8, j : j + 8] = 1
  images = (labels + 0.1 * rng.normal(size=labels.shape)).astype(np.float32)[..., None]
  masks = np.stack([labels, np.roll(labels, 3, 1), np.roll(labels, 6, 2)], axis=1)
  targets = np.tile(np.array([1.0, 0.6, 0.25], np.float32), (8, 1))
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
  assert metrics["pair_accuracy"] > 0.9 and metrics["squared_error"] < 0.02
