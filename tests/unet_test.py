"""unet: shapes, purity, encoder and decoder apart, both norms, both dtypes, two and three axes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax.models import unet


def build(**changes):
  options = dict(
    num_classes=3, spatial_dims=2, width=4, depth=3, max_width=8, norm="group", dropout=0.5,
    dtype=jnp.float32,
  )  # fmt: skip
  return unet.build(**{**options, **changes})


@pytest.mark.parametrize(
  "changes,space",
  [({}, (8, 12)), ({"spatial_dims": 3, "norm": "instance"}, (8, 4, 8))],
)
def test_shapes_and_widths(changes, space):
  segmenter = build(**changes)
  images = jax.random.normal(jax.random.key(0), (2, *space, 2))
  params = segmenter.init(jax.random.key(1), images)
  features = segmenter.encode(params, images)
  assert [f.shape[-1] for f in features] == [4, 8, 8]
  assert features[2].shape[1:-1] == tuple(s // 4 for s in space)
  logits = segmenter.apply(params, images)
  assert logits.shape == (2, *space, 3) and logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, segmenter.decode(params, features))


def test_dropout_acts_with_a_key_alone_and_only_after_the_encoder():
  segmenter = build()
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
  params = segmenter.init(jax.random.key(1), images)
  plain = segmenter.apply(params, images)
  np.testing.assert_array_equal(plain, segmenter.apply(params, images))
  first, second = (segmenter.apply(params, images, jax.random.key(n)) for n in (2, 3))
  assert (first != plain).any() and (first != second).any()
  np.testing.assert_array_equal(first, segmenter.apply(params, images, jax.random.key(2)))
  shared = segmenter.decode(params, segmenter.encode(params, images), jax.random.key(2))
  np.testing.assert_array_equal(first, shared)


def test_an_image_does_not_depend_on_its_batch():
  segmenter = build()
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  params = segmenter.init(jax.random.key(1), images)
  whole = segmenter.apply(params, images)
  np.testing.assert_allclose(whole[2:3], segmenter.apply(params, images[2:3]), atol=1e-5)


def test_bfloat16_computes_close_to_float32_with_float32_parameters():
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  params = build().init(jax.random.key(1), images)
  low = build(dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(low.init(jax.random.key(1), images))} == {
    jnp.dtype("float32")
  }
  logits = low.apply(params, images)
  assert logits.dtype == jnp.float32
  reference = build().apply(params, images)
  assert (logits != reference).any()
  np.testing.assert_allclose(logits, reference, atol=0.1)


def test_pool_takes_maxima_and_upsample_repeats():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  pooled = unet._pool(x)
  np.testing.assert_array_equal(pooled[0, ..., 0], [[5, 7], [13, 15]])
  np.testing.assert_array_equal(
    unet._upsample(pooled)[0, ..., 0],
    [[5, 5, 7, 7], [5, 5, 7, 7], [13, 13, 15, 15], [13, 13, 15, 15]],
  )


def test_gradient_of_pool_goes_to_one_maximum_of_each_block():
  x = jnp.array([[1.0, 4.0, 2.0, 2.0], [3.0, 0.0, 2.0, 1.0]]).reshape(1, 2, 4, 1)
  gradient = jax.grad(lambda x: jnp.sum(unet._pool(x) * jnp.array([5.0, 7.0]).reshape(1, 1, 2, 1)))
  # On ties along an axis the first is taken, so that the gradient's sum is kept.
  np.testing.assert_array_equal(gradient(x)[0, ..., 0], [[0, 5, 7, 0], [0, 0, 0, 0]])


def test_remat_gives_the_same_gradient():
  images = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
  params = jax.jit(build(depth=2).init)(jax.random.key(1), images)
  gradients = []
  for remat in (False, True):
    segmenter = build(depth=2, remat=remat)

    def loss(params, apply=segmenter.apply):
      return jnp.mean(apply(params, images) ** 2)

    gradients.append(jax.jit(jax.grad(loss))(params))
  chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-6)


def test_remat_keeps_less_of_a_volume_for_the_backward_pass():
  images = jax.ShapeDtypeStruct((1, 64, 64, 64, 1), jnp.float32)

  def kept_bytes(remat):
    segmenter = build(spatial_dims=3, remat=remat)
    params = jax.eval_shape(segmenter.init, jax.random.key(1), images)
    # What `jax.vjp` hands to the backward pass, from shapes alone.
    backward = jax.eval_shape(lambda p, x: jax.vjp(segmenter.apply, p, x)[1], params, images)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

  plain, again = kept_bytes(False), kept_bytes(True)
  assert again < plain / 2
