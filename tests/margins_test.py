"""margins: the closed-form gradient, its transforms, packed masks, ignored pixels and classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core
from jax.sharding import NamedSharding, PartitionSpec

from rndpo_jax import losses
from rndpo_jax.losses import bit_planes, margins
from rndpo_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("optimised")

SPACES = [((2, 5, 6), 4), ((2, 3, 4, 5), 3), ((3, 4, 4), 1), ((1, 3, 5), 2)]


def draw(space, classes, pairs=2, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, (*space, classes)).astype(np.float32)
  shape = (space[0], pairs, *space[1:])
  chosen, rejected = rng.integers(0, max(classes, 2), (2, *shape)).astype(np.uint8)
  return logits, chosen, rejected, rng.normal(size=(space[0], pairs)).astype(np.float32)


def gradient64(logits, chosen, rejected, factor, counted=None):
  """sum over P of factor (onehot(y+) - onehot(y-)) on D, in float64, by loops."""
  gradient = np.zeros(logits.shape, np.float64)
  for b, p in np.ndindex(factor.shape):
    for place in np.ndindex(chosen.shape[2:]):
      plus, minus = chosen[(b, p, *place)], rejected[(b, p, *place)]
      if plus == minus or (counted is not None and not counted[(b, p, *place)]):
        continue
      if logits.shape[-1] == 1:
        gradient[(b, *place, 0)] += factor[b, p] * (int(plus) - int(minus))
      else:
        gradient[(b, *place, plus)] += factor[b, p]
        gradient[(b, *place, minus)] -= factor[b, p]
  return gradient


def gradient(logits, chosen, rejected, factor, **region_options):
  return jax.grad(
    lambda z: jnp.sum(margins.pair_margin(z, chosen, rejected, **region_options) * factor)
  )(logits)


@pytest.mark.parametrize("space,classes", SPACES)
def test_gradient_of_several_pairs_adds_up_and_margin_is_linear_in_it(space, classes):
  logits, chosen, rejected, factor = draw(space, classes)
  expected = gradient64(logits, chosen, rejected, factor)
  np.testing.assert_allclose(gradient(logits, chosen, rejected, factor), expected, atol=1e-6)
  # The margin is linear in the logits: it is the product with its own gradient.
  margin = margins.pair_margin(logits, chosen, rejected)
  np.testing.assert_allclose(np.sum(margin * factor), np.sum(expected * logits), rtol=1e-4)


@pytest.mark.parametrize("space,classes", SPACES)
def test_packed_masks_give_the_same_bits(space, classes):
  logits, chosen, rejected, factor = draw(space, classes)
  planes = [bit_planes.pack(m, max(classes, 2), len(space) - 1) for m in (chosen, rejected)]
  np.testing.assert_array_equal(
    margins.pair_margin(logits, *planes, packed=True), margins.pair_margin(logits, chosen, rejected)
  )
  np.testing.assert_array_equal(
    gradient(logits, *planes, factor, packed=True), gradient(logits, chosen, rejected, factor)
  )
  single = [plane[:, 0] for plane in planes]
  np.testing.assert_array_equal(
    margins.pair_margin(logits, *single, packed=True),
    margins.pair_margin(logits, chosen[:, 0], rejected[:, 0]),
  )
  np.testing.assert_array_equal(
    margins.margin_and_size(logits, *planes, packed=True)[1],
    losses.region_size(chosen, rejected, spatial_dims=len(space) - 1),
  )


@pytest.mark.parametrize("space,classes", SPACES[:3])
def test_ignored_pixels_and_other_classes_leave_margin_size_log_prob_and_gradient(space, classes):
  logits, chosen, rejected, factor = draw(space, classes)
  ignore = np.random.default_rng(3).random(space) < 0.4
  subset = (1,) if classes < 4 else (1, 3)
  region_options = {"ignore": ignore, "classes": subset}
  counted = (np.isin(chosen, subset) | np.isin(rejected, subset)) & ~ignore[:, None]
  # A pixel that does not count is one where the masks agree.
  agreed = np.where(counted, rejected, chosen)
  for function in (margins.pair_margin, margins.pair_log_prob):
    np.testing.assert_array_equal(
      function(logits, chosen, rejected, **region_options), function(logits, chosen, agreed)
    )
  dims = len(space) - 1
  sizes = losses.region_size(chosen, rejected, spatial_dims=dims, **region_options)
  np.testing.assert_array_equal(sizes, losses.region_size(chosen, agreed, spatial_dims=dims))
  assert 0 < sizes.sum() < losses.region_size(chosen, rejected, spatial_dims=dims).sum()
  expected = gradient64(logits, chosen, rejected, factor, counted)
  np.testing.assert_allclose(
    gradient(logits, chosen, rejected, factor, **region_options), expected, atol=1e-6
  )


@pytest.mark.parametrize("space,classes", SPACES[:3])
def test_pixels_that_do_not_count_may_hold_nan_or_infinity(space, classes):
  """Neither value nor gradient of any function sees them."""
  logits, chosen, rejected, _ = draw(space, classes)
  ignore = np.random.default_rng(3).random(space) < 0.4
  spoilt = logits.copy()
  spoilt[ignore | (chosen == rejected).all(1)] = np.inf
  spoilt[ignore, 0] = np.nan
  assert not np.isfinite(spoilt).all()
  for function in (margins.pair_margin, margins.pair_log_prob):

    def both(z, function=function):
      return jax.value_and_grad(lambda z: jnp.sum(function(z, chosen, rejected, ignore=ignore)))(z)

    for found, expected in zip(both(spoilt), both(logits), strict=True):
      np.testing.assert_array_equal(found, expected)


def test_class_ids_that_the_logits_lack_are_refused_where_they_count():
  logits, chosen, rejected, _ = draw((2, 5, 6), 4)
  marked = chosen.astype(np.int32)
  for mark in (255, -1):
    marked[0, 1, 2, 3] = mark
    ignore = np.zeros((2, 5, 6), bool)
    for function in (margins.margin_and_size, margins.pair_log_prob):
      with pytest.raises(ValueError, match=f"rejected: found class id {mark}, expected .* 0 to 3"):
        function(logits, chosen.astype(np.int32), marked, ignore=ignore)
    ignore[0, 2, 3] = True
    for function in (margins.margin_and_size, margins.pair_log_prob):
      jax.tree.map(
        np.testing.assert_array_equal,
        function(logits, marked, rejected.astype(np.int32), ignore=ignore),
        function(logits, chosen, rejected, ignore=ignore),
      )
  with pytest.raises(ValueError, match="chosen: found class id 2, expected ids from 0 to 1"):
    margins.pair_margin(logits[..., :1], chosen * 0 + 2, chosen * 0)


@pytest.mark.parametrize("axes", [(8,), (4, 2)], ids=["images", "rows too"])
@pytest.mark.parametrize("objective", ["rn_dpo", "apo_zero", "aot"])
def test_on_a_mesh_with_explicit_axes_value_and_gradient_are_those_of_one_device(axes, objective):
  """As `jax.make_mesh` makes it by default."""
  logits, chosen, rejected, _ = draw((8, 8, 6), 3)
  reference = draw((8, 8, 6), 3, seed=1)[0]

  def loss(z, r, plus, minus):
    margin, size = margins.margin_and_size(z, plus, minus)
    options = {"beta": 0.3, "objective": objective}
    if objective == "apo_zero":
      options["policy_log_prob"] = margins.pair_log_prob(z, plus, minus)
      options["reference_log_prob"] = margins.pair_log_prob(r, plus, minus)
    return losses.preference_loss(margin, margins.pair_margin(r, plus, minus), size, **options)

  arrays = (logits, reference, chosen, rejected)
  expected = jax.value_and_grad(loss, has_aux=True)(*arrays)
  mesh = jax.make_mesh(axes, ("data", "rows")[: len(axes)])
  rows = mesh.axis_names[1] if len(axes) > 1 else None
  specs = [PartitionSpec("data", rows)] * 2 + [PartitionSpec("data", None, rows)] * 2
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(*placed)
    assert found[1].sharding.spec[:2] == ("data", rows)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), found, expected)


def test_log_prob_on_the_region_by_hand_and_for_one_sigmoid_logit():
  logits = np.log(np.array([[[[1.0, 3.0], [1.0, 1.0]]]], np.float32))
  chosen, rejected = np.array([[[1, 0]]], np.uint8), np.array([[[0, 0]]], np.uint8)
  np.testing.assert_allclose(
    margins.pair_log_prob(logits, chosen, rejected), [np.log(0.75)], rtol=1e-6
  )
  single = logits[..., 1:] - logits[..., :1]
  np.testing.assert_allclose(
    margins.pair_log_prob(single, chosen, rejected), [np.log(0.75)], rtol=1e-6
  )


def test_backward_pass_keeps_masks_and_never_the_logits():
  logits, chosen, rejected, _ = draw((2, 5, 6), 4)
  _, backward = jax.vjp(lambda z: margins.pair_margin(z, chosen, rejected), logits)
  kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "dtype")]
  assert kept and all(leaf.dtype == jnp.uint8 for leaf in kept)
  # Nor is there an array of P gradients: the largest float has the size of the logits.
  program = jax.make_jaxpr(functools.partial(gradient, factor=np.ones((2, 2), np.float32)))(
    logits, chosen, rejected
  )
  sizes = [
    variable.aval.size
    for equation in _equations(program.jaxpr)
    for variable in equation.outvars
    if variable.aval.dtype == jnp.float32
  ]
  assert max(sizes) == logits.size


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


def test_transforms_agree_with_the_plain_call():
  logits, chosen, rejected, factor = draw((8, 4, 4), 3)
  plain = functools.partial(gradient, logits, chosen, rejected, factor)

  def of(z, c, r, f):
    return gradient(z, c, r, f)

  lead = [x[:, None] for x in (logits, chosen, rejected, factor)]
  mesh = sharding.make_mesh()
  spec = PartitionSpec("data")
  forms = {
    "jit": jax.jit(of)(logits, chosen, rejected, factor),
    "vmap": jax.vmap(of)(*lead)[:, 0],
    "pmap": jax.pmap(of)(*lead)[:, 0],
    "shard_map": jax.jit(jax.shard_map(of, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))(
      logits, chosen, rejected, factor
    ),
    "scan": jax.lax.scan(lambda c, x: (c, of(*x)), 0, tuple(lead))[1][:, 0],
    "remat": jax.grad(
      jax.checkpoint(lambda z: jnp.sum(margins.pair_margin(z, chosen, rejected) * factor))
    )(logits),
  }
  expected = plain()
  for name, found in forms.items():
    np.testing.assert_array_equal(found, expected, err_msg=name)
  scale = jnp.float32(1.5)
  larger = jax.grad(lambda s: jnp.sum(margins.pair_margin(s * logits, chosen, rejected) * factor))
  np.testing.assert_allclose(larger(scale), np.sum(expected * logits), rtol=1e-4)


def test_second_order_by_reverse_mode_and_clear_refusal_of_forward_mode():
  logits, chosen, rejected, _ = draw((1, 3, 3), 2, pairs=1)

  def loss(z):
    return jnp.sum(margins.pair_margin(z, chosen, rejected) ** 2)

  # The Hessian of m^2 is 2 g g^T, with g the gradient of m.
  g = gradient(logits, chosen, rejected, np.ones((1, 1), np.float32))
  curvature = jax.grad(lambda z: jnp.sum(jax.grad(loss)(z) * g))(logits)
  np.testing.assert_allclose(curvature, 2 * g * np.sum(g * g), rtol=1e-6)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(loss, (logits,), (logits,))


def test_gradient_has_the_dtype_of_the_logits():
  logits, chosen, rejected, factor = draw((2, 5, 6), 4)
  found = gradient(jnp.asarray(logits, jnp.bfloat16), chosen, rejected, factor)
  assert found.dtype == jnp.bfloat16
  expected = gradient(logits, chosen, rejected, factor).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
