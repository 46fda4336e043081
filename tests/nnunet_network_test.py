"""models.nnunet: the same function as nnU-Net's networks by their definition, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import nnunet_reference
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, models, pipeline
from rndpo_jax.models import nnunet, nnunet_architecture
from rndpo_jax.nnunet import weights
from rndpo_jax.pairs import shards

# Kernels and strides that differ by axis and level, as for volumes with thick slices.
PLAIN = nnunet_architecture.Architecture(
  is_residual=False, features=(2, 3, 4), kernels=((1, 3), (3, 3), (3, 3)),
  strides=((1, 1), (1, 2), (2, 2)), encoder_counts=(2, 1, 2), decoder_counts=(2, 1),
)  # fmt: skip
# A skip that is projected, one that is pooled and projected, and one that is pooled alone.
RESIDUAL = nnunet_architecture.Architecture(
  is_residual=True, features=(2, 3, 4, 4), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
  strides=((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 1, 2)), encoder_counts=(1, 1, 2, 1),
  decoder_counts=(1, 1, 2), has_bias=False,
)  # fmt: skip
CASES = [(PLAIN, (6, 8)), (RESIDUAL, (4, 6, 8))]
IDS = ["plain", "residual"]


def make(made, space, **options):
  """Segmenter, parameters that are all drawn at random, and two images of two channels."""
  segmenter = nnunet.build(made, num_classes=3, **options)
  images = jax.random.normal(jax.random.key(0), (2, *space, 2)) + 0.5
  params = jax.eval_shape(segmenter.init, jax.random.key(1), images)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  params = [np.float32(rng.normal(size=x.shape) + (x.ndim == 1)) for x in leaves]
  return segmenter, jax.tree.unflatten(tree, params), images


@pytest.mark.parametrize("made,space", CASES, ids=IDS)
def test_logits_are_those_of_the_definition_in_float64(made, space):
  segmenter, params, images = make(made, space)
  logits = jax.jit(segmenter.apply)(params, images)
  assert logits.shape == (2, *space, 3) and logits.dtype == jnp.float32
  named = weights.from_params(params, made)
  for image, found in zip(images, logits, strict=True):
    wanted = nnunet_reference.forward(named, made, np.moveaxis(np.float64(image), -1, 0))
    wanted = np.moveaxis(wanted, 0, -1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_channel_far_from_zero_is_normalised_as_in_float64():
  """A mean of squares minus a squared mean would lose it."""
  x = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32) + [0, 100, 1000]
  ones = jnp.ones(3)
  found = nnunet.normalization.normalize_instances(jnp.float32(x), ones, 0 * ones, nnunet.EPSILON)
  wanted = nnunet_reference.normalize(np.moveaxis(np.float32(x)[0], -1, 0), ones, 0 * ones)
  np.testing.assert_allclose(np.moveaxis(found[0], -1, 0), wanted, atol=1e-3)


def test_encoder_and_decoder_apart_give_the_same_logits_and_a_key_changes_nothing():
  segmenter, params, images = make(*CASES[0])
  features = jax.jit(segmenter.encode)(params, images)
  assert [f.shape for f in features] == [(2, 6, 8, 2), (2, 6, 4, 3), (2, 3, 2, 4)]
  logits = jax.jit(segmenter.decode)(params, features)
  keyed = jax.jit(segmenter.decode)(params, features, jax.random.key(3))
  np.testing.assert_array_equal(logits, keyed)
  whole = jax.jit(segmenter.apply)(params, images, jax.random.key(3))
  np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-5 * jnp.abs(whole).max())


def test_bfloat16_computes_close_to_float32():
  segmenter, params, images = make(*CASES[0])
  value = jax.jit(segmenter.apply)(params, images)
  low = jax.jit(make(*CASES[0], dtype=jnp.bfloat16)[0].apply)(params, images)
  assert low.dtype == jnp.float32 and (low != value).any()
  assert jnp.abs(low - value).mean() < 0.05 * jnp.abs(value).max()


def test_remat_gives_the_same_gradient():
  made = nnunet_architecture.Architecture(
    False, (2, 3), PLAIN.kernels[:2], PLAIN.strides[:2], encoder_counts=(1, 1), decoder_counts=(1,)
  )
  gradients = []
  for remat in (False, True):
    segmenter, params, images = make(made, (4, 4), remat=remat)
    loss = functools.partial(lambda apply, p, x: jnp.mean(apply(p, x) ** 2), segmenter.apply)
    gradients.append(jax.jit(jax.grad(loss))(params, images))
  chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_network_starts_as_nnunet_does():
  """He normal of a leaky ReLU, biases 0; the last norm of a residual block has scale 0."""
  made = nnunet_architecture.derive(
    is_residual=True, spatial_dims=2, width=32, depth=2, max_width=64
  )
  segmenter = nnunet.build(made, num_classes=2)
  params = jax.jit(segmenter.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
  block = params["encoder"]["stages_1"]["blocks_1"]
  kernel, up = block["conv1"]["conv"]["kernel"], params["decoder"]["up_0"]["kernel"]
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / 1.0001 / (9 * 64)), rtol=0.02)
  np.testing.assert_allclose(np.std(up), np.sqrt(2 / 1.0001 / (4 * 32)), rtol=0.05)
  assert not block["conv1"]["conv"]["bias"].any() and (block["conv1"]["norm"]["scale"] == 1).all()
  assert not block["conv2"]["norm"]["scale"].any()


@pytest.mark.parametrize("is_residual", [False, True])
def test_what_is_derived_from_width_and_depth(is_residual):
  made = nnunet_architecture.derive(
    is_residual=is_residual, spatial_dims=3, width=32, depth=6, max_width=320
  )
  assert made.features == (32, 64, 128, 256, 320, 320)
  assert made.divisors == (32, 32, 32)
  images = jax.ShapeDtypeStruct((1, 32, 32, 32, 1), jnp.float32)
  params = jax.eval_shape(nnunet.build(made, num_classes=2).init, jax.random.key(0), images)
  heads = sum(2 * (width + 1) for width in (320, 256, 128, 64))  # which prediction does not read
  count = sum(leaf.size for leaf in jax.tree.leaves(params)) + heads
  # That of PyTorch's network; its residual one has 4 convolutions less than six blocks a level.
  assert is_residual or count == 31_195_594
  if is_residual:
    made = made._replace(encoder_counts=(1, 3, 4, 6, 6, 6))
    params = jax.eval_shape(nnunet.build(made, num_classes=2).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + heads == 102_349_770


def test_sizes_and_descriptions_that_do_not_fit_raise():
  segmenter, params, _ = make(*CASES[0])
  with pytest.raises(ValueError, match=r"size \(6, 6\): expected multiples of \(2, 4\)"):
    segmenter.apply(params, jnp.zeros((1, 6, 6, 2)))
  for changes in ({"features": (2, 3)}, {"decoder_counts": (1,)}, {"strides": ((1,), (2,), (2,))}):
    with pytest.raises(ValueError, match="expected"):
      nnunet.build(PLAIN._replace(**changes), num_classes=3)


def test_it_is_a_base_that_is_trained_and_mined_from(tiny_config, tmp_path):
  config = tiny_config(model__name="nnunet_plain", base__num_steps=50, proposals__mix="tta:4")
  pipeline.run(config, tmp_path, ["prepare", "base", "mine"])
  assert len(list(shards.read(tmp_path / "pairs"))) > 10


@pytest.mark.parametrize("made", [PLAIN, RESIDUAL])
def test_an_architecture_goes_through_the_config(made):
  text = made.to_json()
  assert nnunet_architecture.from_json(text) == made
  config = config_lib.base_config().model
  config.name = "nnunet_residual" if made.is_residual else "nnunet_plain"
  config.architecture = text
  dims = len(made.kernels[0])
  assert models.architecture(config, spatial_dims=dims) == made
  assert models.divisors(config, spatial_dims=dims) == made.divisors
  wrong = {
    "{}": "expected an object of is_residual, features",
    "x": "Expecting value",
    text.replace("[2, ", "[0, ", 1): "expected lists of whole numbers above 0",
    (RESIDUAL if made is PLAIN else PLAIN).to_json(): "and is_residual=",
  }
  for text, message in wrong.items():
    config.architecture = text
    with pytest.raises(errors.ConfigError, match=f"^config.model.architecture: .*{message}"):
      models.divisors(config, spatial_dims=dims)
