"""unet: shapes, purity, encoder and decoder apart, both norms, both dtypes, two and three axes."""

import math
import re

import chex
import flax.linen as nn
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

  @jax.jit
  def run(images):
    params = segmenter.init(jax.random.key(1), images)
    features = segmenter.encode(params, images)
    return features, segmenter.apply(params, images), segmenter.decode(params, features)

  features, logits, in_two = run(images)
  assert [f.shape[-1] for f in features] == [4, 8, 8]
  assert features[2].shape[1:-1] == tuple(s // 4 for s in space)
  assert logits.shape == (2, *space, 3) and logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, in_two)


def test_dropout_acts_with_a_key_alone_and_only_after_the_encoder():
  segmenter = build()
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
  params = jax.jit(segmenter.init)(jax.random.key(1), images)
  apply = jax.jit(segmenter.apply)
  plain = apply(params, images)
  np.testing.assert_array_equal(plain, apply(params, images))
  first, second = (apply(params, images, jax.random.key(n)) for n in (2, 3))
  assert (first != plain).any() and (first != second).any()
  np.testing.assert_array_equal(first, apply(params, images, jax.random.key(2)))

  @jax.jit
  def in_two(params, images, key):
    features = segmenter.encode(params, images)
    return segmenter.apply(params, images, key), segmenter.decode(params, features, key)

  np.testing.assert_array_equal(*in_two(params, images, jax.random.key(2)))


def test_an_image_does_not_depend_on_its_batch():
  segmenter = build()
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  params = jax.jit(segmenter.init)(jax.random.key(1), images)
  apply = jax.jit(segmenter.apply)
  whole = apply(params, images)
  np.testing.assert_allclose(whole[2:3], apply(params, images[2:3]), atol=1e-5)


def test_bfloat16_computes_close_to_float32_with_float32_parameters():
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
  params = jax.jit(build().init)(jax.random.key(1), images)
  low = build(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(low.init, jax.random.key(1), images)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  logits = jax.jit(low.apply)(params, images)
  assert logits.dtype == jnp.float32
  reference = jax.jit(build().apply)(params, images)
  assert (logits != reference).any()
  np.testing.assert_allclose(logits, reference, atol=0.1)


def plain_apply(params, images):
  """The network from its definition in Flax's layers: repeat, concatenate, convolve, normalise."""

  def block(layers, x):
    for n in range(2):
      kernel, norm = layers[f"Conv_{n}"]["kernel"], layers[f"GroupNorm_{n}"]
      features = kernel.shape[-1]
      convolution = nn.Conv(features, kernel.shape[:-2], use_bias=False)
      x = convolution.apply({"params": {"kernel": kernel}}, x)
      x = nn.relu(nn.GroupNorm(features // 4).apply({"params": norm}, x))
    return x

  features = []
  for level in range(2):
    if level:
      pooled = (2,) * (images.ndim - 2)
      images = nn.max_pool(images, pooled, strides=pooled)
    images = block(params[f"down_{level}"], images)
    features.append(images)
  for axis in range(1, images.ndim - 1):
    images = jnp.repeat(images, 2, axis)
  images = block(params["up_0"], jnp.concatenate([images, features[0]], axis=-1))
  return images @ jnp.squeeze(params["head"]["kernel"]) + params["head"]["bias"].reshape(
    (1,) * (images.ndim - 1) + (-1,)
  )


def test_equals_the_definition_in_plain_layers_and_reads_its_parameters():
  space = (4, 6)
  segmenter = build(spatial_dims=len(space), depth=2)
  images = jax.random.normal(jax.random.key(0), (1, *space, 1))
  params = jax.jit(segmenter.init)(jax.random.key(1), images)
  # Scales and biases start as ones and zeros, which would hide a missing one.
  leaves, tree = jax.tree.flatten(params)
  params = jax.tree.unflatten(
    tree, [x + 0.1 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
  )
  weight = jax.random.normal(jax.random.key(2), (1, *space, 3))

  def value(apply):
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(apply(p, images) * weight)))(params)

  (plain, plain_grad), (ours, ours_grad) = value(plain_apply), value(segmenter.apply)
  np.testing.assert_allclose(ours, plain, rtol=1e-4)
  chex.assert_trees_all_close(ours_grad, plain_grad, rtol=1e-3, atol=1e-3)


def test_a_skip_is_convolved_once_for_all_dropout_samples():
  segmenter = build()
  images, keys = jnp.zeros((2, 8, 8, 1)), jax.random.split(jax.random.key(0), (2, 5))
  params = jax.eval_shape(segmenter.init, jax.random.key(1), images)

  def samples(params, images, keys):
    def decode(item, key):
      return segmenter.decode(params, jax.tree.map(lambda x: x[None], item), key)

    features = segmenter.encode(params, images)
    return jax.vmap(jax.vmap(decode, (None, 0)))(features, keys)

  program = jax.jit(samples).lower(params, images, keys).as_text()
  shapes = re.findall(r"stablehlo.convolution.*: \(tensor<(.*?)xf32>, tensor<(.*?)xf32>", program)
  seen = []
  for image, kernel in shapes:
    image, kernel = ([int(n) for n in shape.split("x")] for shape in (image, kernel))
    seen.append((math.prod(image[:-3]) // 2, *kernel[-2:]))
  # Samples at once, channels in and out, after the six convolutions of the encoder: in each block
  # the skip for one, and for five the level below in four phases and the second convolution.
  skips = [entry for entry in seen[6:] if entry[0] == 1]
  assert skips == [(1, 8, 8), (1, 4, 4)]
  assert [entry for entry in seen[6:] if entry[0] == 5] == [
    (5, 8, 32), (5, 8, 8), (5, 8, 16), (5, 4, 4), (5, 4, 3),
  ]  # fmt: skip


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
