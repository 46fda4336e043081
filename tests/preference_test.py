"""losses: exact values by hand, float64 forms from the definition, algebraic properties."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import losses

pytestmark = pytest.mark.usefixtures("optimised")

SHAPES = [((2, 5, 6), 4), ((2, 3, 4, 5), 3), ((3, 4, 4), 1)]


def draw(space, classes, *, pairs=None, seed=0, scale=2.0):
  """Logits f32[B, *S, C] of policy and reference, and two masks u8[B, (P,) *S]."""
  rng = np.random.default_rng(seed)
  logits = [rng.normal(0, scale, (*space, classes)).astype(np.float32) for _ in range(2)]
  shape = space if pairs is None else (space[0], pairs, *space[1:])
  masks = [rng.integers(0, max(classes, 2), shape).astype(np.uint8) for _ in range(2)]
  return *logits, *masks


def log_prob64(logits, mask):
  """log pi(y|x) from the definition, in float64: log-softmax (or log-sigmoid), gathered, summed."""
  z = logits.astype(np.float64)
  if z.shape[-1] == 1:
    signed = np.where(mask == 1, z[..., 0], -z[..., 0])
    picked = -np.logaddexp(0, -signed)
  else:
    log_softmax = z - np.log(np.sum(np.exp(z - z.max(-1, keepdims=True)), -1, keepdims=True))
    log_softmax -= z.max(-1, keepdims=True)
    picked = np.take_along_axis(log_softmax, mask[..., None].astype(int), -1)[..., 0]
  return picked.reshape(len(mask), -1).sum(1)


def loss64(policy, reference, chosen, rejected, objective, beta):
  """The objective from log-probabilities, in float64."""
  h = log_prob64(policy, chosen) - log_prob64(policy, rejected)
  h = h - log_prob64(reference, chosen) + log_prob64(reference, rejected)
  size = (chosen != rejected).reshape(len(chosen), -1).sum(1)
  scale = beta / size if objective == "rn_dpo" else beta
  return np.mean(np.logaddexp(0, -scale * h))


def function(objective):
  return {"dpo": losses.dpo_loss, "rn_dpo": losses.rn_dpo_loss}[objective]


def test_two_by_two_by_hand():
  logits = jnp.array([[[[1.0, 3.0], [0.0, 2.0]], [[5.0, 1.0], [4.0, 4.0]]]])
  chosen = jnp.array([[[1, 1], [0, 0]]], jnp.uint8)
  rejected = jnp.array([[[0, 1], [1, 0]]], jnp.uint8)
  # They differ at (0, 0), where z[1] - z[0] = 2, and at (1, 0), where z[0] - z[1] = 4.
  assert losses.region_size(chosen, rejected).tolist() == [2]
  assert losses.pair_margin(logits, chosen, rejected).tolist() == [6.0]
  loss, metrics = losses.rn_dpo_loss(logits, jnp.zeros_like(logits), chosen, rejected, beta=0.5)
  np.testing.assert_allclose(loss, math.log(1 + math.exp(-0.5 * 6 / 2)), rtol=1e-6)
  assert metrics["h_mean"] == 6.0 and metrics["accuracy"] == 1.0
  loss, _ = losses.dpo_loss(logits, jnp.zeros_like(logits), chosen, rejected, beta=0.5)
  np.testing.assert_allclose(loss, math.log(1 + math.exp(-0.5 * 6)), rtol=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "rn_dpo"])
@pytest.mark.parametrize("space,classes", SHAPES)
def test_equals_the_definition_in_float64(space, classes, objective):
  policy, reference, chosen, rejected = draw(space, classes)
  beta = 0.05 if objective == "dpo" else 1.5
  loss, _ = function(objective)(policy, reference, chosen, rejected, beta=beta)
  expected = loss64(policy, reference, chosen, rejected, objective, beta)
  np.testing.assert_allclose(loss, expected, rtol=2e-6)


@pytest.mark.parametrize("objective", ["dpo", "rn_dpo"])
def test_gradient_equals_differences_of_the_float64_form(objective):
  policy, reference, chosen, rejected = draw((2, 2, 3), 3)
  beta = 0.1 if objective == "dpo" else 1.0
  gradient = jax.grad(lambda z: function(objective)(z, reference, chosen, rejected, beta=beta)[0])(
    policy
  )
  step = 1e-5
  for place in np.ndindex(policy.shape):
    moved = [policy.astype(np.float64) for _ in range(2)]
    moved[0][place] += step
    moved[1][place] -= step
    up, down = (loss64(z, reference, chosen, rejected, objective, beta) for z in moved)
    np.testing.assert_allclose(gradient[place], (up - down) / (2 * step), atol=1e-7)


def test_gradient_is_zero_where_the_masks_agree():
  policy, reference, chosen, rejected = draw((2, 5, 6), 4)
  gradient = jax.grad(lambda z: losses.rn_dpo_loss(z, reference, chosen, rejected, beta=3.0)[0])(
    policy
  )
  assert (np.asarray(gradient)[chosen == rejected] == 0).all()
  assert (np.abs(gradient).max(-1)[chosen != rejected] > 0).all()


@pytest.mark.parametrize("objective", ["dpo", "rn_dpo"])
def test_log_two_and_zero_h_where_policy_is_the_reference(objective):
  policy, _, chosen, rejected = draw((2, 5, 6), 4)
  loss, metrics = function(objective)(policy, policy, chosen, rejected, beta=7.0)
  assert loss == np.float32(math.log(2)) and metrics["h_mean"] == 0 and metrics["accuracy"] == 0.5


def test_a_region_of_one_pixel_is_divided_by_one():
  chosen, rejected = np.zeros((2, 1, 2, 2), np.uint8)
  chosen[0, 0, 1] = 1
  policy, reference = draw((1, 2, 2), 2)[:2]
  dpo, _ = losses.dpo_loss(policy, reference, chosen, rejected, beta=1.5)
  rn_dpo, _ = losses.rn_dpo_loss(policy, reference, chosen, rejected, beta=1.5)
  assert dpo == rn_dpo and abs(dpo - math.log(2)) > 0.01


def test_swapping_the_pair_negates_the_margin():
  policy, _, chosen, rejected = draw((2, 5, 6), 4)
  there = losses.pair_margin(policy, chosen, rejected)
  np.testing.assert_array_equal(there, -losses.pair_margin(policy, rejected, chosen))
  assert (there != 0).all()


def test_tiling_the_image_doubles_h_for_dpo_and_keeps_rn_dpo():
  small = draw((2, 4, 4), 3)
  large = [np.concatenate([x, x], axis=1) for x in small]
  _, one = losses.dpo_loss(*small, beta=0.1)
  _, two = losses.dpo_loss(*large, beta=0.1)
  np.testing.assert_allclose(two["h_mean"], 2 * one["h_mean"], rtol=1e-6)
  one, _ = losses.rn_dpo_loss(*small, beta=2.0)
  two, _ = losses.rn_dpo_loss(*large, beta=2.0)
  np.testing.assert_allclose(two, one, rtol=1e-6)


def test_beta_of_dpo_times_region_size_gives_rn_dpo():
  policy, reference, chosen, rejected = draw((1, 4, 4), 3)
  size = int(losses.region_size(chosen, rejected)[0])
  dpo, _ = losses.dpo_loss(policy, reference, chosen, rejected, beta=0.02)
  rn_dpo, _ = losses.rn_dpo_loss(policy, reference, chosen, rejected, beta=0.02 * size)
  np.testing.assert_allclose(dpo, rn_dpo, rtol=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "rn_dpo"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_logits(objective, dtype):
  policy, reference, chosen, rejected = draw((2, 5, 6), 4)
  policy = jnp.sign(policy).astype(dtype) * 1e4
  value_and_grad = jax.value_and_grad(
    lambda z: function(objective)(z, reference, chosen, rejected, beta=10.0)[0]
  )
  loss, gradient = value_and_grad(policy)
  assert loss.dtype == jnp.float32 and np.isfinite(loss)
  assert gradient.dtype == dtype and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_infinite_logits_outside_the_region_do_not_matter():
  policy, _, chosen, rejected = draw((1, 4, 4), 3)
  expected = losses.pair_margin(policy, chosen, rejected)
  policy[chosen == rejected] = np.inf
  np.testing.assert_allclose(losses.pair_margin(policy, chosen, rejected), expected, rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  # 4096 pixels of margin 1: a bfloat16 sum would stop at 256.
  logits = jnp.zeros((1, 64, 64, 2), jnp.bfloat16).at[..., 1].set(1.0)
  chosen, rejected = jnp.ones((1, 64, 64), jnp.uint8), jnp.zeros((1, 64, 64), jnp.uint8)
  assert losses.pair_margin(logits, chosen, rejected).tolist() == [4096.0]


def test_identical_masks_weigh_nothing_and_are_counted():
  policy, reference, chosen, rejected = draw((2, 4, 4), 3)
  alone, _ = losses.rn_dpo_loss(policy[:1], reference[:1], chosen[:1], rejected[:1], beta=2.0)
  rejected[1] = chosen[1]
  loss, metrics = losses.rn_dpo_loss(policy, reference, chosen, rejected, beta=2.0)
  np.testing.assert_allclose(loss, alone, rtol=1e-6)
  assert metrics["num_empty"] == 1 and metrics["num_pairs"] == 1
  value_and_grad = jax.value_and_grad(
    lambda z: losses.dpo_loss(z, reference, chosen, chosen, beta=2.0)[0]
  )
  loss, gradient = value_and_grad(policy)
  assert loss == 0 and (np.asarray(gradient) == 0).all()


def test_several_pairs_of_an_image_are_its_pairs_one_by_one():
  policy, reference, chosen, rejected = draw((2, 4, 5), 3, pairs=3)
  many = losses.pair_margin(policy, chosen, rejected)
  sizes = losses.region_size(chosen, rejected)
  assert many.shape == sizes.shape == (2, 3)
  for pair in range(3):
    one = losses.pair_margin(policy, chosen[:, pair], rejected[:, pair])
    np.testing.assert_allclose(many[:, pair], one, rtol=1e-6)
    np.testing.assert_array_equal(
      sizes[:, pair], losses.region_size(chosen[:, pair], rejected[:, pair])
    )
  loss, _ = losses.rn_dpo_loss(policy, reference, chosen, rejected, beta=2.0)
  singles = [
    loss64(policy, reference, chosen[:, p], rejected[:, p], "rn_dpo", 2.0) for p in range(3)
  ]
  np.testing.assert_allclose(loss, np.mean(singles), rtol=1e-6)


def test_weights_are_relative_and_zero_takes_a_pair_out():
  policy, reference, size = jnp.array([2.0, -1.0]), jnp.zeros(2), jnp.array([1, 1])
  first, _ = losses.preference_loss(policy[:1], reference[:1], size[:1], beta=1.0)
  out, _ = losses.preference_loss(policy, reference, size, beta=1.0, weight=jnp.array([3.0, 0.0]))
  np.testing.assert_allclose(out, first, rtol=1e-6)


def test_no_gradient_flows_into_the_reference():
  policy, reference, chosen, rejected = draw((1, 4, 4), 3)
  gradient = jax.grad(lambda r: losses.rn_dpo_loss(policy, r, chosen, rejected, beta=2.0)[0])(
    reference
  )
  assert (np.asarray(gradient) == 0).all()


def test_unknown_objective_is_refused():
  with pytest.raises(ValueError, match="'ipo2'.*rn_dpo"):
    losses.preference_loss(jnp.ones(1), jnp.ones(1), jnp.ones(1, int), objective="ipo2", beta=1.0)


def test_cross_entropy_and_dice_by_hand():
  # One pixel row: probabilities of class 1 are 0.5, 0.8; labels 1, 0.
  logits = jnp.array([[[[0.0, 0.0], [0.0, math.log(4.0)]]]])
  labels = jnp.array([[[1, 0]]], jnp.uint8)
  expected = (math.log(2) + math.log(5)) / 2
  np.testing.assert_allclose(losses.cross_entropy(logits, labels), [expected], rtol=1e-6)
  dice = 1 - (2 * 0.5 + 1) / (1.3 + 1 + 1)
  np.testing.assert_allclose(losses.soft_dice_loss(logits, labels), [dice], rtol=1e-6)
  total, _ = losses.supervised_loss(logits, labels, dice_weight=2.0)
  np.testing.assert_allclose(total, expected + 2 * dice, rtol=1e-6)


def test_dice_loss_of_a_class_absent_from_both_costs_nothing():
  logits = jnp.full((1, 4, 4, 3), -50.0).at[..., 0].set(50.0)
  labels = jnp.zeros((1, 4, 4), jnp.uint8)
  np.testing.assert_allclose(losses.soft_dice_loss(logits, labels), [0.0], atol=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.soft_dice_loss])
def test_supervised_losses_want_two_classes_and_labels_below_them(loss):
  with pytest.raises(ValueError, match="logits: found 1 class, expected C >= 2"):
    loss(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2), jnp.uint8))
  with pytest.raises(ValueError, match="labels: found class id 254, expected ids from 0 to 2"):
    loss(jnp.zeros((1, 2, 2, 3)), jnp.full((1, 2, 2), 254, jnp.uint8))


def test_the_example_of_the_readme_runs():
  page = (pathlib.Path(losses.__file__).parent / "README.md").read_text()
  names = {}
  exec(page.split("```python\n")[1].split("```")[0], names)
  assert jnp.isfinite(names["loss"]) and names["gradient"].shape == (8, 64, 64, 3)
