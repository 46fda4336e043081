"""layers: pooling, convolution of what is upsampled, group normalisation, dropout."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax.models import layers, normalization

pytestmark = pytest.mark.usefixtures("optimised")


def test_pool_takes_maxima():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(layers.pool(x)[0, ..., 0], [[5, 7], [13, 15]])


def test_gradient_of_pool_goes_to_one_maximum_of_each_block():
  x = jnp.array([[1.0, 4.0, 2.0, 2.0], [3.0, 0.0, 2.0, 1.0]]).reshape(1, 2, 4, 1)
  weight = jnp.array([5.0, 7.0]).reshape(1, 1, 2, 1)
  gradient = jax.grad(lambda x: jnp.sum(layers.pool(x) * weight))
  # On ties along an axis the first is taken, so that the gradient's sum is kept.
  np.testing.assert_array_equal(gradient(x)[0, ..., 0], [[0, 5, 7, 0], [0, 0, 0, 0]])


def test_upsample_repeats():
  x = jnp.array([[5.0, 7.0], [13.0, 15.0]]).reshape(1, 2, 2, 1)
  np.testing.assert_array_equal(
    layers.upsample(x, (2, 2))[0, ..., 0],
    [[5, 5, 7, 7], [5, 5, 7, 7], [13, 13, 15, 15], [13, 13, 15, 15]],
  )


def by_loops(x, below, kernel, weight):
  """concat([upsampled below, x]) convolved, and the gradients of sum(y * weight), in numpy."""
  dims, split = x.ndim - 2, below.shape[-1]
  for axis in range(1, dims + 1):
    below = np.repeat(below, 2, axis)
  padded = np.pad(np.concatenate([below, x], -1), [(0, 0), *[(1, 1)] * dims, (0, 0)])
  y, grad, kernel_grad = np.zeros(weight.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
  for taps in itertools.product(range(3), repeat=dims):
    window = (slice(None), *(slice(t, t + s) for t, s in zip(taps, x.shape[1:-1], strict=True)))
    y += padded[window] @ kernel[taps]
    grad[window] += weight @ kernel[taps].T
    kernel_grad[taps] = np.tensordot(padded[window], weight, (range(dims + 1),) * 2)
  grad = grad[(slice(None), *(slice(1, -1),) * dims)]
  below_grad = grad[..., :split]
  for axis in range(1, dims + 1):
    below_grad = np.add.reduceat(below_grad, range(0, below_grad.shape[axis], 2), axis)
  return y, grad[..., split:], below_grad, kernel_grad


@pytest.mark.parametrize("convolve", [layers.convolve_apart, layers.convolve_joined])
@pytest.mark.parametrize("space", [(6, 8), (2, 4), (4, 6, 2)])
def test_convolution_with_the_level_below_equals_loops_borders_included(space, convolve):
  rng = np.random.default_rng(0)
  x, below = rng.normal(size=(2, *space, 2)), rng.normal(size=(2, *(s // 2 for s in space), 3))
  kernel, weight = rng.normal(size=(*(3,) * len(space), 5, 4)), rng.normal(size=(2, *space, 4))
  with jax.enable_x64(True):

    @jax.jit
    def results(weight, *arguments):
      y, backward = jax.vjp(convolve, *arguments)
      return y, *backward(weight)

    computed = results(weight, x, below, kernel)
  for ours, expected in zip(computed, by_loops(x, below, kernel, weight), strict=True):
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("space", [(6, 5), (2, 3, 4)])
def test_group_norm_equals_the_float64_form(space, dtype, tolerance):
  rng = np.random.default_rng(0)
  x = jnp.asarray(1 + 2 * rng.normal(size=(2, *space, 6)), dtype)
  scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
  y = normalization.GroupNorm(3, dtype).apply({"params": {"scale": scale, "bias": bias}}, x)
  groups = np.asarray(x, np.float64).reshape(2, -1, 3, 2)
  mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  expected = ((groups - mean) / np.sqrt(variance + normalization.EPSILON)).reshape(x.shape)
  expected = expected * scale + bias
  assert y.dtype == dtype
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)


def test_group_norm_of_a_constant_is_its_bias():
  bias = jnp.array([1.0, -2.0])
  x = jnp.full((1, 3, 3, 2), 0.5)
  y = normalization.GroupNorm(1, jnp.float32).apply(
    {"params": {"scale": jnp.ones(2), "bias": bias}}, x
  )
  np.testing.assert_allclose(y, jnp.broadcast_to(bias, x.shape), atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout_is_that_of_flax(rate):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3))
  rngs = {"dropout": jax.random.key(7)}
  ours = layers.Dropout(rate).apply({}, x, False, rngs=rngs)
  np.testing.assert_array_equal(ours, nn.Dropout(rate).apply({}, x, False, rngs=rngs))
  np.testing.assert_array_equal(layers.Dropout(rate).apply({}, x, True), x)
