"""How much of the gradient comes from wrong pairs: by hand, and against the gradient itself."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import losses
from rndpo_jax.evaluation import harm, validation_pairs
from rndpo_jax.stages import measure_harm, measure_judges

SIZE = np.array([[4, 100], [4, 9], [16, 7]])
GAIN = np.array([[0.1, -0.2], [0.3, 0.0], [-0.1, 0.5]])  # right, wrong; right, tie; wrong, no pair
WEIGHT = np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
OPTIONS = {"edges": (16, 64), "beta": 10.0, "normalization": "region"}


def _account(h, **changes):
  share = changes.pop("share", np.ones(SIZE.shape))
  h = np.stack([0 * h, h])
  return harm.account([0, 50], h, SIZE, GAIN, WEIGHT, share, **OPTIONS | changes)


def test_shares_at_step_0_by_hand():
  """Sizes 4, 100 (wrong), 4, 16 (wrong, weight 2): of the region form 3 / 5, of DPO 132 / 140."""
  found = _account(np.zeros((3, 2)))
  assert found["num_pairs"] == 4 and found["wrong_share"] == 0.5
  assert found["median_region_size"] == 10 and found["beta"] == {"region": 10.0, "none": 1.0}
  assert [entry["num_pairs"] for entry in found["bins"]] == [2, 1, 1]
  assert [entry["wrong_share"] for entry in found["bins"]] == [0, 1, 1]
  assert [(entry["from"], entry["below"]) for entry in found["bins"]] == [
    (0, 16),
    (16, 64),
    (64, None),
  ]
  start = found["curve"][0]
  assert start["region"]["wrong_mass"] == pytest.approx(3 / 5)
  assert start["none"]["wrong_mass"] == pytest.approx(132 / 140)
  assert [b["wrong_mass"] for b in start["none"]["bins"]] == pytest.approx([0, 32 / 140, 100 / 140])
  assert [b["mass"] for b in start["region"]["bins"]] == pytest.approx([2 / 5, 2 / 5, 1 / 5])


def test_a_tile_weighs_its_share_of_the_image_by_hand():
  """Of images of |D| 8, 400, 16 and 64: right 4/8 and 4/16, wrong 100/400 and twice 16/64."""
  share = SIZE / np.array([[8, 400], [16, 9], [64, 7]])
  start = _account(np.zeros((3, 2)), share=share)["curve"][0]
  assert start["region"]["wrong_mass"] == pytest.approx(0.75 / 1.5)
  assert [b["mass"] for b in start["region"]["bins"]] == pytest.approx([1 / 2, 1 / 3, 1 / 6])
  assert start["none"]["wrong_mass"] == pytest.approx(132 / 140)  # the weight under DPO is 1


@pytest.mark.parametrize(("reference", "h"), [("cached", [0.0, 2.0]), ("none", [1.0, 3.0])])
def test_without_a_reference_h_is_the_margin_itself(monkeypatch, reference, h):
  """Margins of one pair at two steps: 1 and 3 nats."""
  config = config_lib.base_config()
  config.finetune.reference = reference
  pairs = {name: np.ones((1, 1)) for name in ("region_size", "score_gap", "valid", "index")}
  monkeypatch.setattr(validation_pairs, "read", lambda path: pairs)
  for place, name, value in (
    (validation_pairs, "margins", np.array([[[1.0]], [[3.0]]])),
    (validation_pairs, "gain", np.ones((1, 1))),
    (validation_pairs, "share", np.ones((1, 1))),
    (measure_judges, "pair_worth", np.ones((1, 1))),
    (measure_judges, "volumes", 1.0),
  ):
    monkeypatch.setattr(place, name, lambda *_, value=value: value)
  monkeypatch.setattr(harm, "account", lambda steps, h, *_, **__: {"h": h.ravel().tolist()})
  evaluation = types.SimpleNamespace(dataset=None)
  assert measure_harm._harm(config, pathlib.Path("."), evaluation, [0, 4], {})["h"] == h


def test_a_wrong_pair_that_is_learned_loses_its_mass():
  """h of +1000 nats on wrong pairs: S(-beta h / |D|) is 0, and right ones have all the mass."""
  found = _account(np.where(GAIN < 0, 1000.0, 0.0))["curve"][1]
  assert found["region"]["wrong_mass"] < 1e-9 and found["none"]["wrong_mass"] < 1e-9
  assert found["h_per_pixel"] == {"right": 0.0, "wrong": pytest.approx((10 + 62.5) / 2)}
  # And -1000 gives no overflow: all the mass but what right pairs have at h = 0.
  found = _account(np.where(GAIN < 0, -1000.0, 0.0))["curve"][1]
  assert found["region"]["wrong_mass"] == pytest.approx(3 / (3 + 1))


def test_masses_are_those_of_training_in_mm():
  """With `finetune.region_unit` mm a pixel of the first image stands for 4 mm^2."""
  size, h, volume = np.array([[40], [40]]), np.array([[8.0], [8.0]]), np.array([[4.0], [0.01]])

  def loss(margin):
    options = {"objective": "dpo", "beta": 0.05, "voxel_volume": jnp.asarray(volume, jnp.float32)}
    return losses.preference_loss(margin, 0 * margin, jnp.asarray(size), **options)[0]

  mass = np.abs(jax.grad(loss)(jnp.asarray(h, jnp.float32))) * size
  gain = np.array([[0.1], [-0.1]])
  options = {"edges": (16, 64), "beta": 0.05, "normalization": "none", "voxel_volume": volume}
  found = harm.account([50], h[None], size, gain, *np.ones((2, 2, 1)), **options)["curve"][0]
  assert found["none"]["wrong_mass"] == pytest.approx(mass[1, 0] / mass.sum(), rel=1e-5)
  assert found["region"]["wrong_mass"] == pytest.approx(0.5)  # it makes no difference there


def test_without_a_pair_nothing_is_claimed():
  found = harm.account(
    [0], np.zeros((1, 1)), np.array([5]), np.zeros(1), *np.ones((2, 1)), **OPTIONS
  )
  assert found["num_pairs"] == 0 and found["wrong_share"] is None
  assert found["curve"][0]["none"]["wrong_mass"] is None


@pytest.mark.parametrize("kind,objective", [("region", "rn_dpo"), ("none", "dpo")])
def test_mass_is_the_l1_norm_of_the_gradient_on_the_logits(kind, objective):
  keys = jax.random.split(jax.random.key(0), 4)
  logits, reference = (jax.random.normal(k, (5, 6, 7, 2)) for k in keys[:2])
  chosen, rejected = (jax.random.bernoulli(k, 0.5, (5, 6, 7)).astype(jnp.uint8) for k in keys[2:])
  before = losses.pair_margin(reference, chosen, rejected)
  margin, size = losses.margin_and_size(logits, chosen, rejected)

  def loss(logits):
    margin, size = losses.margin_and_size(logits, chosen, rejected)
    return losses.preference_loss(margin, before, size, objective=objective, beta=0.7)[0]

  want = np.abs(jax.grad(loss)(logits)).sum(axis=(1, 2, 3))
  got = harm.gradient_mass(np.float64(margin - before), np.asarray(size), 0.7, kind)
  np.testing.assert_allclose(got / got.sum(), want / want.sum(), rtol=1e-5)


def test_matched_betas_act_alike_on_a_pair_of_the_median_size():
  for normalization in ("none", "region", "power"):
    betas = harm.matched_betas(3.0, normalization, 0.5, 25.0)
    masses = [harm.gradient_mass(2.0, 25.0, betas[kind], kind) for kind in harm.KINDS]
    assert masses[0] == pytest.approx(masses[1])
  assert harm.matched_betas(3.0, "none", 0.5, 25.0) == {"none": 3.0, "region": 75.0}
  assert harm.matched_betas(3.0, "power", 0.5, 25.0)["none"] == pytest.approx(3.0 / 5)
  # Below the floor a pair is divided by the floor.
  assert harm.matched_betas(3.0, "power", 0.5, 25.0, 100.0)["none"] == pytest.approx(3.0 / 10)
  found = _account(np.zeros((3, 2)), normalization="power", floor=100.0)["beta"]
  assert found == pytest.approx({"none": 10.0 / 10, "region": 10.0})
