"""threefry: the bits of jax.random."""

import jax
import numpy as np
import pytest

from rndpo_jax.models import dropout_bits


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.8, 0.9999999, 1.0])
def test_draws_are_those_of_jax_random(p, shape):
  key = jax.random.key(3)
  ours = dropout_bits.bernoulli(key, p, shape)
  assert ours.shape == shape and ours.dtype == bool
  np.testing.assert_array_equal(ours, jax.random.bernoulli(key, p, shape))


def test_draws_are_those_of_jax_random_under_vmap_and_jit():
  keys = jax.random.split(jax.random.key(0), (2, 3))

  def draw(function):
    return jax.jit(jax.vmap(jax.vmap(lambda key: function(key, 0.3, (50, 40)))))(keys)

  ours = draw(dropout_bits.bernoulli)
  np.testing.assert_array_equal(ours, draw(jax.random.bernoulli))
  assert 0.29 < ours.mean() < 0.31


def test_keys_of_another_kind_are_left_to_jax_random():
  key = jax.random.key(0, impl="rbg")
  ours = dropout_bits.bernoulli(key, 0.3, (8,))
  np.testing.assert_array_equal(ours, jax.random.bernoulli(key, 0.3, (8,)))
