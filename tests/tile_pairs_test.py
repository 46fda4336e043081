"""Weights of tiles: what an image's pair means in the tiles that it is cut into."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import losses
from rndpo_jax.pairs import pair_batches

SHAPE, HALVES = (4, 6), (slice(0, 2), slice(2, 6))
BETA = 3.0


@pytest.fixture(scope="module")
def pair():
  """Logits of policy and base f32[1, *S, C], chosen and rejected u8[1, *S]; more differs on the
  right, where the tile is wider."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 1, *SHAPE, 3)).astype(np.float32)
  masks = rng.integers(0, 3, (2, 1, *SHAPE)).astype(np.uint8)
  return *map(jnp.asarray, logits), *map(jnp.asarray, masks)


def loss_of(policy, base, chosen, rejected, objective, normalization):
  margin, size = losses.margin_and_size(policy, chosen, rejected)
  value, _ = losses.preference_loss(
    margin, losses.pair_margin(base, chosen, rejected), size,
    objective=objective, beta=BETA, normalization=normalization, exponent=0.5,
  )  # fmt: skip
  return value


def of_tiles(tiny_config, policy, base, chosen, rejected, objective, normalization):
  """The sum over both tiles of weight times loss."""
  config = tiny_config(
    finetune__objective=objective, finetune__normalization=normalization or "",
  )  # fmt: skip
  whole, total = int((chosen != rejected).sum()), 0.0
  for own in HALVES:
    parts = [x[:, :, own] for x in (policy, base, chosen, rejected)]
    size = int((parts[2] != parts[3]).sum())
    sizes = np.array([[size, 0], [whole, 0]], np.float32)
    weight = pair_batches.tile_weights(config, sizes, 1.0)
    assert weight[1] == 0  # a slot without a pair
    total += weight[0] * loss_of(*parts, objective, normalization)
  return total


KINDS = (("rn_dpo", None), ("dpo", None), ("dpo", "power"), ("ipo", "region"))


@pytest.mark.parametrize("objective,normalization", KINDS)
def test_at_the_base_tiles_have_the_gradient_of_the_image(
  tiny_config, pair, objective, normalization
):
  _, base, *masks = pair
  expected = jax.grad(lambda z: loss_of(z, base, *masks, objective, normalization))(base)
  found = jax.grad(lambda z: of_tiles(tiny_config, z, base, *masks, objective, normalization))(base)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  assert np.abs(expected).max() > 0


def test_under_region_tiles_bound_the_loss_of_the_image(tiny_config, pair):
  policy, base, chosen, rejected = pair
  for scale in (-2.0, 0.5, 3.0):
    moved = base + scale * (policy - base)
    image = loss_of(moved, base, chosen, rejected, "rn_dpo", None)
    tiles = of_tiles(tiny_config, moved, base, chosen, rejected, "rn_dpo", None)
    assert tiles > image
  # Where every pixel of D has gained alike, so has every tile.
  gain = jax.nn.one_hot(chosen, 3) - jax.nn.one_hot(rejected, 3)
  moved = base + 0.3 * gain
  arguments = (moved, base, chosen, rejected, "rn_dpo", None)
  np.testing.assert_allclose(of_tiles(tiny_config, *arguments), loss_of(*arguments), rtol=1e-5)


def test_weights_of_several_objectives_go_by_their_sum(tiny_config):
  config = tiny_config(finetune__objective="rn_dpo,ipo", finetune__objective_weights=(1.0, 0.5))
  for own, whole in itertools.product((1, 7), (10, 100)):
    weight = pair_batches.tile_weights(config, np.float32([[own], [whole]]), 1.0)
    np.testing.assert_allclose(weight, (1 / whole + 0.5) / (1 / own + 0.5), rtol=1e-6)
