"""objectives: every one, under every normalization, against float64 forms from probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import losses
from rndpo_jax.losses import objectives

pytestmark = pytest.mark.usefixtures("optimised")

BETA, SMOOTHING, TEMPERATURE, EXPONENT, FLOOR = 0.7, 0.15, 0.3, 0.5, 6.0
SIZES = np.array([4, 9, 1, 0, 25])
MARGINS = np.array([[3.0, 1.0], [-2.0, 2.5], [0.4, 0.1], [0.0, 0.0], [30.0, -8.0]])
CHOSEN = np.array([[-2.0, -3.5], [-6.0, -4.0], [-0.2, -0.3], [0.0, 0.0], [-1.0, -9.0]])


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def form64(name, up, down, weight):
  """A pair's loss from the scaled log-ratios of chosen and rejected, as the papers write it."""
  p, q = sigmoid(BETA * (up - down)), sigmoid(-BETA * (up - down))
  e = SMOOTHING
  if name == "bco_pair":
    shift = np.sum(weight * BETA * (up + down) / 2) / np.sum(weight)
    return -np.log(sigmoid(BETA * up - shift)) - np.log(sigmoid(shift - BETA * down))
  if name == "discopop":
    blend = sigmoid(BETA * (up - down) / TEMPERATURE)
    return (1 - blend) * -np.log(p) + blend * np.exp(-BETA * (up - down))
  return {
    "dpo": -np.log(p),
    "rn_dpo": -np.log(p),
    "cdpo": -(1 - e) * np.log(p) - e * np.log(q),
    "robust": (-(1 - e) * np.log(p) + e * np.log(q)) / (1 - 2 * e),
    "ipo": (up - down - 1 / (2 * BETA)) ** 2,
    "hinge": np.maximum(0, 1 - BETA * (up - down)),
    "exo_pair": p * np.log(p / (1 - e)) + q * np.log(q / e),
    "nca_pair": -np.log(sigmoid(BETA * up))
    - 0.5 * np.log(1 - sigmoid(BETA * up))
    - 0.5 * np.log(1 - sigmoid(BETA * down)),
    "sppo_hard": (up - 1 / (2 * BETA)) ** 2 + (down + 1 / (2 * BETA)) ** 2,
    "apo_zero": 1 - sigmoid(BETA * up) + sigmoid(BETA * down),
    "apo_down": sigmoid(BETA * up) + q,
  }[name]


def aot64(margin, informative):
  """Policy's and reference's margins matched by rank, by sorting both."""
  values = np.zeros(len(margin))
  places = np.flatnonzero(informative)
  by_policy = places[np.argsort(margin[places, 0])]
  matched = np.sort(margin[places, 1])
  values[by_policy] = -np.log(sigmoid(BETA * (margin[by_policy, 0] - matched)))
  return values


def loss64(name, normalization, margin, chosen, weight):
  informative = np.where(SIZES > 0, weight, 0.0)
  size = np.maximum(SIZES, 1)
  divisor = {
    "none": 1.0, "region": size, "power": np.maximum(SIZES, FLOOR) ** EXPONENT
  }[normalization]  # fmt: skip
  up = (chosen[:, 0] - chosen[:, 1]) / divisor
  h = (margin[:, 0] - margin[:, 1]) / divisor
  if name == "aot":
    values = aot64(margin / np.reshape(divisor, (-1, 1)), informative > 0)
  else:
    values = form64(name, up, up - h, informative)
  return np.sum(values * informative) / np.sum(informative)


def call(name, normalization, margin, chosen, weight):
  return losses.preference_loss(
    margin[:, 0],
    MARGINS[:, 1].astype(np.float32),
    SIZES,
    objective=name,
    beta=BETA,
    weight=weight,
    normalization=normalization,
    exponent=EXPONENT,
    floor=FLOOR,
    label_smoothing=SMOOTHING if objectives.readers(name, "label_smoothing") else 0.0,
    temperature=TEMPERATURE,
    policy_log_prob=chosen[:, 0],
    reference_log_prob=CHOSEN[:, 1].astype(np.float32),
  )


CASES = [
  (name, normalization)
  for name in objectives.OBJECTIVES
  for normalization in objectives.NORMALIZATIONS
  if name != "rn_dpo" or normalization == "region"
]


@pytest.mark.parametrize("name,normalization", CASES)
def test_value_and_gradient_equal_the_float64_form(name, normalization):
  weight = np.array([1.0, 2.0, 0.5, 3.0, 1.0])
  margin, chosen = MARGINS.astype(np.float32), CHOSEN.astype(np.float32)

  def loss(policy_margin, policy_log_prob):
    pair = (policy_margin[:, None], MARGINS[:, 1:].astype(np.float32))
    return call(name, normalization, jnp.concatenate(pair, 1), policy_log_prob[:, None], weight)[0]

  value, found = jax.value_and_grad(loss, argnums=(0, 1))(margin[:, 0], chosen[:, 0])
  np.testing.assert_allclose(value, loss64(name, normalization, MARGINS, CHOSEN, weight), rtol=2e-5)
  step = 1e-6
  # The shift of bco_pair carries no gradient, so its differences keep it where it is.
  for which in range(2):
    for row in range(len(SIZES)):
      ends = []
      for sign in (1, -1):
        moved = [MARGINS.copy(), CHOSEN.copy()]
        moved[which][row, 0] += sign * step
        ends.append(_with_fixed_shift(name, normalization, *moved, weight))
      difference = (ends[0] - ends[1]) / (2 * step)
      np.testing.assert_allclose(found[which][row], difference, rtol=2e-4, atol=2e-6)


def _with_fixed_shift(name, normalization, margin, chosen, weight):
  if name != "bco_pair":
    return loss64(name, normalization, margin, chosen, weight)
  informative = np.where(SIZES > 0, weight, 0.0)
  divisor = {
    "none": 1.0, "region": np.maximum(SIZES, 1), "power": np.maximum(SIZES, FLOOR) ** EXPONENT
  }[normalization]  # fmt: skip
  ratios = []
  for m, c in ((margin, chosen), (MARGINS, CHOSEN)):
    up = (c[:, 0] - c[:, 1]) / divisor
    ratios.append((up, up - (m[:, 0] - m[:, 1]) / divisor))
  (up, down), (up0, down0) = ratios
  shift = np.sum(informative * BETA * (up0 + down0) / 2) / np.sum(informative)
  values = -np.log(sigmoid(BETA * up - shift)) - np.log(sigmoid(shift - BETA * down))
  return np.sum(values * informative) / np.sum(informative)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_finite_value_and_gradient_at_extreme_log_ratios_and_for_empty_regions(name):
  margin = np.array([[1e4, -1e4], [-1e4, 1e4], [0, 0], [0, 0], [5, 5]], np.float32)
  chosen = np.array([[-1e4, 0], [0, -1e4], [0, 0], [0, 0], [-1, -1]], np.float32)
  normalization = objectives.OBJECTIVES[name].normalization

  def loss(policy_margin, policy_log_prob):
    both = jnp.stack([policy_margin, margin[:, 1]], 1)
    return call(name, normalization, both, policy_log_prob[:, None], None)[0]

  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(margin[:, 0], chosen[:, 0])
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
  assert all(g[3] == 0 for g in gradients)  # |D| = 0


def test_beta_converts_between_normalizations_by_the_region_size():
  one = [np.array([value], np.float32) for value in (6.0, 2.0)]
  options = {"policy_log_prob": np.float32([-3.0]), "reference_log_prob": np.float32([-4.0])}
  for name in ("cdpo", "hinge", "nca_pair", "apo_zero", "discopop"):
    smoothing = 0.1 if objectives.readers(name, "label_smoothing") else 0.0
    results = [
      losses.preference_loss(
        *one, np.array([8]), objective=name, beta=beta, normalization=normalization,
        label_smoothing=smoothing, **options,
      )[0]
      for beta, normalization in ((0.05, "none"), (0.05 * 8, "region"), (0.05 * 8**0.5, "power"))
    ]  # fmt: skip
    np.testing.assert_allclose(results, results[0], rtol=1e-5, err_msg=name)


def test_volume_of_a_voxel_multiplies_sums_and_sizes():
  margin, reference, size = np.float32([3.0, -1.0]), np.float32([1.0, 0.5]), np.array([4, 2])
  volume = np.float32([2.0, 0.5])

  def loss(normalization, *inputs, **more):
    return losses.preference_loss(
      *inputs, objective="dpo", beta=0.4, normalization=normalization, floor=0.1, **more
    )[0]

  for normalization in ("none", "power"):
    np.testing.assert_allclose(
      loss(normalization, margin, reference, size, voxel_volume=volume),
      loss(normalization, margin * volume, reference * volume, np.array([8, 1])),
      rtol=1e-6,
    )
  np.testing.assert_allclose(
    loss("region", margin, reference, size, voxel_volume=volume),
    loss("region", margin, reference, size),
    rtol=1e-6,
  )


def test_where_the_gradient_lies_by_hand():
  # Slope 1/2 at h = 0: beta / 2 a pair under dpo, beta / (2 |D|) under rn_dpo.
  zeros, size = np.zeros(3, np.float32), np.array([10, 90, 0])
  _, dpo = losses.preference_loss(zeros, zeros, size, objective="dpo", beta=0.4)
  _, rn_dpo = losses.preference_loss(zeros, zeros, size, objective="rn_dpo", beta=40.0)
  np.testing.assert_allclose([dpo["gradient_share_16"], dpo["gradient_share_256"]], [0.1, 0.9])
  np.testing.assert_allclose(
    [rn_dpo["gradient_share_16"], rn_dpo["gradient_share_256"]], [0.5, 0.5], rtol=1e-6
  )
  assert dpo["gradient_weight_p50"] == 0.2 and dpo["region_size_p50"] == 50
  np.testing.assert_allclose(
    [rn_dpo["gradient_weight_p5"], rn_dpo["gradient_weight_p95"]],
    np.quantile([20 / 10, 20 / 90], [0.05, 0.95]), rtol=1e-6,
  )  # fmt: skip


def test_smoothing_of_each_pair_holds_it_where_it_is_right_so_often():
  """cdpo under region by hand; its gradient is 0 at sigmoid(beta h / |D|) = 1 - e."""
  h, size, beta = np.float32([3, -2, 5, 4]), np.array([2, 4, 10, 0]), 2.0
  e = np.float32([0.0, 0.25, 0.5, 0.1])

  def loss(h, e):
    return losses.preference_loss(
      h, jnp.zeros_like(h), size, objective="cdpo", normalization="region", beta=beta,
      label_smoothing=e,
    )[0]  # fmt: skip

  x = beta * h[:3].astype(np.float64) / size[:3]
  by_hand = (1 - e[:3]) * np.logaddexp(0, -x) + e[:3] * np.logaddexp(0, x)
  np.testing.assert_allclose(loss(h, e), by_hand.mean(), rtol=1e-6)
  slope = jax.grad(loss)(h, e)
  by_hand = beta / size[:3] * (1 / (1 + np.exp(-x)) - (1 - e[:3])) / 3
  np.testing.assert_allclose(slope, [*by_hand, 0.0], rtol=1e-5)
  settled = np.float32([1.0, size[1] / beta * np.log(3.0), 0.0, 1.0])
  np.testing.assert_allclose(jax.grad(loss)(settled, e)[1:], 0.0, atol=1e-7)
  equal = losses.preference_loss(
    h, np.zeros_like(h), size, objective="cdpo", beta=beta, label_smoothing=0.2
  )[0]
  each = losses.preference_loss(
    h, np.zeros_like(h), size, objective="cdpo", beta=beta, label_smoothing=np.full(4, 0.2, "f4")
  )[0]
  np.testing.assert_allclose(each, equal, rtol=1e-6)


def test_options_that_an_objective_does_not_read_are_refused():
  one = np.ones(1, np.float32)

  def loss(**options):
    return losses.preference_loss(one, one, np.ones(1, int), beta=1.0, **options)

  for options, message in (
    ({"normalization": "none"}, "'rn_dpo' is 'dpo' under 'region'"),
    ({"objective": "dpo", "normalization": "mean"}, "normalization: found 'mean'"),
    ({"objective": "dpo", "label_smoothing": 0.1}, "label_smoothing: found 0.1"),
    ({"objective": "exo_pair"}, "label_smoothing: found 0.0"),
    ({"objective": "robust", "label_smoothing": one}, "found one for each pair with .*'robust'"),
    ({"objective": "cdpo,dpo", "label_smoothing": one}, "read by cdpo alone"),
    ({"objective": "apo_zero"}, "policy_log_prob: objective 'apo_zero' needs it"),
    ({"objective": "ipo,apo_zero"}, "policy_log_prob: objective 'apo_zero' needs it"),
    ({"objective": "ipo,ipo"}, "objective: found 'ipo' twice"),
    ({"objective": "ipo,dpo", "normalization": "region"}, "each of 'ipo,dpo' has its own"),
    ({"objective": "ipo,dpo", "objective_weights": (1.0,)}, r"found \(1.0,\) for 'ipo,dpo'"),
    ({"objective_weights": (1.0,)}, "objective_weights"),
  ):
    with pytest.raises(ValueError, match=message):
      loss(**options)


def test_ranks_of_aot_by_hand():
  # Informative are rows 0, 1, 3; their policy margins have the ranks 2, 0, 1.
  policy, reference = np.float32([5, -1, 9, 2]), np.float32([1, 0, 7, 3])
  size, weight = np.array([2, 3, 4, 1]), np.float32([1, 1, 0, 1])
  loss, metrics = losses.preference_loss(
    policy, reference, size, objective="aot", beta=1.0, weight=weight
  )
  differences = np.array([5 - 3, -1 - 0, 2 - 1])
  np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -differences)), rtol=1e-6)
  dpo, _ = losses.preference_loss(policy, reference, size, objective="dpo", beta=1.0, weight=weight)
  assert abs(loss - dpo) > 0.01 and np.isfinite(metrics["gradient_weight_p95"])


def test_several_objectives_add_up_each_under_its_own_normalization():
  margin, reference, size = np.float32([3, -1, 0.5]), np.float32([1, 0.5, 0]), np.array([4, 2, 9])

  def loss(policy, objective, **options):
    return losses.preference_loss(policy, reference, size, objective=objective, beta=0.4, **options)

  def value_and_grad(objective, **options):
    return jax.value_and_grad(lambda m: loss(m, objective, **options)[0])(margin)

  both = value_and_grad("rn_dpo, ipo", objective_weights=(1.0, 0.2))
  apart = value_and_grad("rn_dpo"), value_and_grad("ipo")
  for found, one, other in zip(both, *apart, strict=True):
    np.testing.assert_allclose(found, one + np.float32(0.2) * other, rtol=1e-6)
  plain = value_and_grad("rn_dpo,ipo")[0]
  np.testing.assert_allclose(plain, apart[0][0] + apart[1][0], rtol=1e-6)
  _, metrics = loss(margin, "rn_dpo,ipo", objective_weights=(1.0, 0.2))
  assert metrics["loss"] == both[0]
