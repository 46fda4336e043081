"""folding: kernels by hand, and the same network with neighbours in the channels."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import models
from rndpo_jax.models import folding, unet


def test_folds_fill_the_lanes_and_halve():
  assert folding.folds(128, 32, 4, 512) == (4, 2, 1, 1)
  assert folding.folds(128, 12, 5, 96) == (8, 4, 2, 1, 1)
  assert folding.folds(128, 8, 2, 24) == (8, 4)  # 16 would not divide 24
  assert folding.folds(128, 128, 2, 512) == (1, 1)
  assert folding.folds(1, 8, 3, 512) == (1, 1, 1)


def test_fold_puts_neighbours_side_by_side():
  x = jnp.arange(8.0).reshape(1, 1, 4, 2)
  np.testing.assert_array_equal(folding.fold(x, 2)[0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])
  np.testing.assert_array_equal(folding.unfold(folding.fold(x, 4), 4), x)


def test_kernel_by_hand():
  """Taps 1, 2, 3 on pairs: output 0 reads entries -1, 0, 1, output 1 reads 0, 1, 2."""
  kernel = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
  np.testing.assert_array_equal(
    folding.fold_kernel(kernel, 2), [[[0, 0], [1, 0]], [[2, 1], [3, 2]], [[0, 3], [0, 0]]]
  )
  # Entries -1, (0, 1), 2 of the repeated input are entries -1, 0, 1 of the input.
  np.testing.assert_array_equal(
    folding.fold_kernel(kernel, 2, repeats=2), [[[1, 0]], [[5, 3]], [[0, 3]]]
  )


def test_pool_by_hand():
  x = jnp.array([[[[1.0, 9.0, 4.0, 2.0, 0.0, 3.0, 5.0, 3.0]]]])  # four neighbours, two channels
  np.testing.assert_array_equal(folding.pool(x, 4)[0, 0], [[4, 9, 5, 3]])


@pytest.mark.parametrize(
  "size,changes",
  [((8, 16), {}), ((8, 4, 8), {"spatial_dims": 3, "depth": 2, "remat": True})],
)
def test_a_folded_network_is_the_plain_one(size, changes):
  """Logits with dropout, and gradients by parameters and images, which see every border."""
  options = dict(
    num_classes=3, spatial_dims=2, width=4, depth=3, max_width=64, norm="group", dropout=0.3,
    dtype=jnp.float32,
  )  # fmt: skip
  plain, folded = (unet.build(**{**options, **changes, "lanes": lanes}) for lanes in (1, 16))
  images = jax.random.normal(jax.random.key(0), (2, *size, 2))
  weight = jax.random.normal(jax.random.key(1), (2, *size, 3))

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def run(images):
    params = plain.init(jax.random.key(2), images)

    def gradient(segmenter):
      def weighted(params, images):
        return jnp.sum(segmenter.apply(params, images, jax.random.key(3)) * weight)

      return jax.value_and_grad(weighted, (0, 1))(params, images)

    return params, folded.init(jax.random.key(2), images), gradient(plain), gradient(folded)

  params, same, expected, found = run(images)
  chex.assert_trees_all_equal(params, same)
  features = jax.eval_shape(folded.encode, params, images)
  assert all(f.shape[-1] == 16 for f in features)
  for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_the_config_key_folds_and_is_off_here(tiny_config):
  for lanes, channels in ((0, 4), (1, 4), (16, 16)):
    config = tiny_config(model__lanes=lanes, model__width=4)
    segmenter = models.build(config.model, num_classes=2, spatial_dims=2)
    images = jnp.zeros((1, 16, 16, 1))
    params = jax.eval_shape(segmenter.init, jax.random.key(0), images)
    assert jax.eval_shape(segmenter.encode, params, images)[0].shape[-1] == channels
