"""The fine-tuning loss: references, terms, weights and region options act as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from rndpo_jax import losses, models, types
from rndpo_jax.checks import config_checks
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.losses import bit_planes, objectives
from rndpo_jax.pairs import pair_batches
from rndpo_jax.runtime import files, sharding
from rndpo_jax.stages import base, finetune, measure_judges
from rndpo_jax.training import accumulation, loss_fns, pair_terms, term_inputs, train_step

SIZE, CLASSES = (4, 4), 3


def segmenter():
  """One linear map a pixel: logits = image @ params."""

  def apply(params, images, key=None):
    del key
    return images @ params

  return types.Segmenter(None, apply, None, None)


def draw():
  rng = np.random.default_rng(0)
  masks = rng.integers(0, CLASSES, (2, 2, 3, *SIZE)).astype(np.uint8)
  params, reference = rng.normal(size=(2, 2, CLASSES)).astype(np.float32)
  image = rng.normal(size=(2, *SIZE, 2)).astype(np.float32)
  frozen = image @ reference
  batch = types.PairBatch(
    images=image,
    chosen=bit_planes.pack(masks[0], CLASSES, 2),
    rejected=bit_planes.pack(masks[1], CLASSES, 2),
    reference_margin=losses.pair_margin(frozen, *masks),
    reference_log_prob=losses.pair_log_prob(frozen, *masks),
    weight=np.array([[1, 1, 0], [1, 0, 0]], np.float32),
    voxel_volume=np.ones(2, np.float32),
  )
  return params, reference, batch, masks


def loss_fn(objective="rn_dpo", beta=2.0, terms=None, dice_weight=0.7, **options):
  apply = segmenter().apply
  pairs = pair_terms.Settings(
    apply, CLASSES, SIZE, {"objective": objective, "beta": beta}, dice_weight=dice_weight, **options
  )
  images = term_inputs.Settings(apply, CLASSES, dice_weight, False, None, {}, apply)
  terms = {"preference": {"weight": 1.0}, **(terms or {})}
  return loss_fns.make_loss_fn(pairs, images, terms, weak={})


def value_and_grad(function, params, batch, **inputs):
  inputs = types.StepInputs(jax.random.key(0), **inputs)
  if isinstance(batch, types.PairBatch):
    batch = types.FinetuneBatch(pairs=batch)
  (value, metrics), gradient = jax.value_and_grad(
    lambda p: function(p, batch, inputs), has_aux=True
  )(params)
  return value, gradient, metrics


def test_cached_margins_and_online_reference_are_the_same_and_give_log_two_at_the_start():
  params, reference, batch, _ = draw()
  cached = value_and_grad(loss_fn(), params, batch)
  online = value_and_grad(loss_fn(reference="online"), params, batch, reference=reference)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cached, online)
  start, _, metrics = value_and_grad(loss_fn(), reference, batch)
  np.testing.assert_allclose(start, np.log(2), rtol=1e-6)
  assert abs(metrics["chosen_log_ratio"]) < 1e-5 and metrics["num_pairs"] == 3


@pytest.mark.parametrize("objective", ["rn_dpo", "apo_zero"])
def test_log_ratios_at_other_than_logged_steps_cost_nothing_where_nothing_reads_them(objective):
  params, reference, batch, _ = draw()
  function = loss_fn(objective, beta=0.3, reference="online")

  def run(params, is_logged):
    return value_and_grad(function, params, batch, reference=reference, is_logged=is_logged)

  logged, silent = (jax.jit(run)(params, jnp.bool_(on)) for on in (True, False))
  always = jax.jit(lambda p: run(p, True))(params)
  for (value, gradient, _), (other, other_gradient, _) in ((logged, silent), (logged, always)):
    np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(gradient, other_gradient)
  np.testing.assert_allclose(
    logged[2]["chosen_log_ratio"], always[2]["chosen_log_ratio"], rtol=1e-5
  )
  assert jnp.isnan(silent[2]["chosen_log_ratio"]) == (objective == "rn_dpo")
  # The logsumexp, and so its maximum, is in a branch, or in every step.
  always_run = primitives(jax.make_jaxpr(run)(params, jnp.bool_(True)).jaxpr)
  assert ("reduce_max" in always_run) == (objective == "apo_zero")


def primitives(jaxpr):
  """Names of what is run in any case, that is, outside the branches of conditions."""
  names = {equation.primitive.name for equation in jaxpr.eqns}
  inner = (
    jaxpr
    for equation in jaxpr.eqns
    if equation.primitive.name != "cond"
    for jaxpr in jax_core.jaxprs_in_params(equation.params)
  )
  return names.union(*map(primitives, inner))


def test_without_reference_the_margins_stand_alone():
  params, _, batch, masks = draw()
  value, _, _ = value_and_grad(loss_fn(reference="none"), params, batch)
  margin = losses.pair_margin(batch.images @ params, *masks)
  size = losses.region_size(*masks)
  terms = np.logaddexp(0, -2.0 * np.asarray(margin) / np.asarray(size))
  expected = np.sum(terms * batch.weight) / np.sum(batch.weight)
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_chosen_masks_and_labelled_images_add_their_supervised_loss():
  params, _, batch, masks = draw()
  plain, _, _ = value_and_grad(loss_fn(), params, batch)
  logits = batch.images @ params
  each = [
    losses.cross_entropy(logits, masks[0][:, pair])
    + 0.7 * losses.soft_dice_loss(logits, masks[0][:, pair])
    for pair in range(3)
  ]
  expected = np.sum(np.stack(each, 1) * batch.weight) / np.sum(batch.weight)
  chosen = {"chosen": {"weight": 0.5, "image_temperature": 0.0}}
  value, _, metrics = value_and_grad(loss_fn(terms=chosen), params, batch)
  np.testing.assert_allclose(value, plain + 0.5 * expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["chosen"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["preference"], plain, rtol=1e-6)
  labelled = {"image": batch.images[::-1], "label": masks[1][:, 0]}
  supervised, _ = losses.supervised_loss(logits[::-1], labelled["label"], dice_weight=0.7)
  value, _, _ = value_and_grad(
    loss_fn(terms={"labelled": {"weight": 2.0}}),
    params,
    types.FinetuneBatch(pairs=batch, labelled=labelled),
  )
  np.testing.assert_allclose(value, plain + 2.0 * supervised, rtol=1e-5)


def test_images_weigh_by_their_top_score():
  params, _, batch, masks = draw()
  consensus = np.random.default_rng(1).integers(1, 255, (2, *SIZE, CLASSES)).astype(np.uint8)
  batch = batch._replace(consensus=consensus, top_score=np.float32([0.9, 0.7]))
  share = 1 / (1 + np.exp(-0.2 / 0.1))

  def loss(name, batch, temperature=0.0):
    terms = {name: {"weight": 1.0, "image_temperature": temperature}}
    settings = pair_terms.Settings(segmenter().apply, CLASSES, SIZE, {"objective": "dpo"})
    function = pair_terms.make(settings, terms)
    inputs = types.StepInputs(jax.random.key(0))
    return function(params, batch, inputs, jax.random.key(1), jax.random.key(2))[0][name]

  def of_image(name, row):
    return loss(name, jax.tree.map(lambda x: x[row : row + 1], batch))

  expected = share * of_image("consensus", 0) + (1 - share) * of_image("consensus", 1)
  np.testing.assert_allclose(loss("consensus", batch, 0.1), expected, rtol=1e-5)
  pairs = np.array([2 * share, 1 - share])  # two pairs and one
  expected = (pairs @ [of_image("chosen", 0), of_image("chosen", 1)]) / pairs.sum()
  np.testing.assert_allclose(loss("chosen", batch, 0.1), expected, rtol=1e-5)


def test_parts_of_a_batch_add_up_if_a_pair_of_a_chosen_mask_is_empty():
  params, _, batch, _ = draw()
  batch = batch._replace(rejected=batch.rejected.at[0, 0].set(batch.chosen[0, 0]))
  batch = types.FinetuneBatch(pairs=batch)
  function = loss_fn(terms={"chosen": {"weight": 0.5, "image_temperature": 0.0}})
  gradient = jax.value_and_grad(function, has_aux=True)
  inputs = types.StepInputs(jax.random.key(0))
  (value, _), whole = gradient(params, batch, inputs)
  in_parts = accumulation.in_micro_batches(gradient, 2)
  (total, _), summed = in_parts(params, batch, inputs)
  np.testing.assert_allclose(total, value, rtol=1e-6)
  np.testing.assert_allclose(summed, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ["dpo", "apo_zero"])
def test_region_classes_leave_other_pixels_out(objective):
  params, _, batch, masks = draw()
  options = {"objective": objective, "beta": 0.3}
  value, _, metrics = value_and_grad(loss_fn(**options, region_classes=(2,)), params, batch)
  counted = (masks[0] == 2) | (masks[1] == 2)
  agreed = bit_planes.pack(np.where(counted, masks[1], masks[0]), CLASSES, 2)
  expected, _, plain = value_and_grad(loss_fn(**options), params, batch._replace(rejected=agreed))
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert metrics["region_size_p95"] == plain["region_size_p95"]


def test_pair_weights_by_gap_and_by_what_the_judge_is_worth_at_it(tiny_config, tmp_path):
  calibration = {"gap_edges": [0.1, 0.2], "accuracy": [0.4, 0.75, 1.0]}
  files.write_json(tmp_path / "judges.json", {"agreement": {"calibration": calibration}})
  gap = np.array([0.05, 0.15, 0.3], np.float32)

  def weights(how):
    return pair_batches.weights_by_gap(tiny_config(finetune__pair_weight=how), tmp_path)(gap)

  np.testing.assert_array_equal(weights("none"), [1, 1, 1])
  np.testing.assert_array_equal(weights("score_gap"), gap)
  np.testing.assert_allclose(weights("reliability"), [0, 0.5, 1])
  sure = tiny_config(finetune__pair_weight="score_gap", finetune__min_pair_probability=0.7)
  np.testing.assert_array_equal(pair_batches.weights_by_gap(sure, tmp_path)(gap), [0, *gap[1:]])
  smoothed = tiny_config(finetune__objective="cdpo", finetune__pair_smoothing="reliability")
  config_checks.validate(smoothed)
  by_gap = pair_batches.smoothing_by_gap(smoothed, tmp_path)
  np.testing.assert_allclose(by_gap(gap), [0.5, 0.25, 0.0])
  assert pair_batches.smoothing_by_gap(sure, tmp_path) is None
  entry, valid = {"calibration": calibration}, np.array([True, True, False])
  worth = measure_judges.pair_worth(smoothed, gap, valid, entry)
  np.testing.assert_allclose(worth, [0.0, 0.5, 0.0])
  calibration["accuracy"] = [0.4, 0.5, 0.3]
  files.write_json(tmp_path / "judges.json", {"agreement": {"calibration": calibration}})
  with pytest.raises(ConfigError, match="pair_weight: 'reliability' gives every pair the weight 0"):
    weights("reliability")
  with pytest.raises(ConfigError, match="min_pair_probability: found 0.7.* no gap more than 0.500"):
    pair_batches.weights_by_gap(sure, tmp_path)
  with pytest.raises(ConfigError, match="'reliability' smooths every pair by 1/2.*'agreement'"):
    pair_batches.smoothing_by_gap(smoothed, tmp_path)


def test_a_pair_is_smoothed_by_its_own_probability():
  params, _, batch, masks = draw()
  smoothing = np.array([[0.1, 0.4, 0.3], [0.2, 0.0, 0.0]], np.float32)
  value, _, _ = value_and_grad(loss_fn("cdpo"), params, batch._replace(smoothing=smoothing))
  margin, size = losses.margin_and_size(batch.images @ params, *masks)
  expected, _ = losses.preference_loss(
    margin, batch.reference_margin, size, objective="cdpo", beta=2.0, weight=batch.weight,
    label_smoothing=smoothing,
  )  # fmt: skip
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_loss_options_of_every_objective_can_be_called(tiny_config):
  params, _, batch, _ = draw()
  for objective in (*objectives.OBJECTIVES, "rn_dpo,ipo"):
    changes = {"finetune__objective": objective}
    if "," in objective:
      changes["finetune__objective_weights"] = (1.0, 0.2)
    if objectives.readers(objective, "label_smoothing"):
      changes["finetune__label_smoothing"] = 0.1
    config = tiny_config(**changes)
    config_checks.validate(config)
    config.data.size = SIZE
    function = finetune.make_loss_fn(config, segmenter().apply, num_classes=CLASSES)
    inputs = types.StepInputs(jax.random.key(0))
    loss, _ = function(params, types.FinetuneBatch(pairs=batch), inputs)
    assert jnp.isfinite(loss), objective


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"label_smoothing": 0.1}, "label_smoothing: found 0.1, which nothing reads"),
    ({"objective": "cdpo"}, "label_smoothing: found 0.0"),
    ({"normalization": "none"}, "normalization: found 'none', which nothing reads"),
    ({"power_exponent": 0.3}, "power_exponent: found 0.3, which nothing reads"),
    ({"discopop_temperature": 0.3}, "discopop_temperature: found 0.3"),
    ({"region_classes": (5,)}, "region_classes: found class id 5"),
    ({"pair_weight": "gap"}, "pair_weight: found 'gap'"),
    ({"pair_smoothing": "reliability"}, "pair_smoothing: found 'reliability', which nothing reads"),
    ({"objective": "bco_pair", "accumulate_steps": 2}, "found 2, but objective bco_pair reads"),
    ({"objective": "dpo,aot", "accumulate_steps": 2}, "found 2, but objective aot reads"),
    ({"objective": "dpo2"}, "finetune.objective: found 'dpo2', expected one of dpo, rn_dpo"),
    ({"objective": "dpo,ipo", "normalization": "region"}, "normalization: found 'region'"),
    ({"objective": "dpo,ipo", "objective_weights": (1.0,)}, r"found \(1.0,\), expected 2"),
    ({"objective": "dpo,ipo", "objective_weights": (1.0, 0.0)}, "objective_weights: found 0.0"),
    ({"objective_weights": (2.0,)}, "objective_weights: found .*which nothing reads"),
  ],
)
def test_options_without_effect_raise(tiny_config, changes, message):
  with pytest.raises(ConfigError, match=message):
    config_checks.validate(
      tiny_config(**{f"finetune__{key}": value for key, value in changes.items()})
    )


def test_one_program_serves_every_step(tiny_run):
  config, workdir = tiny_run
  dataset = dataset_lib.open_dataset(config, workdir)
  mesh = sharding.make_mesh()
  segmenter = models.build(config.model, num_classes=2, spatial_dims=2)
  function = finetune.make_loss_fn(config, segmenter.apply, num_classes=2)
  optimizer = finetune.optimizer(config.finetune)
  step = train_step.make_train_step(function, optimizer, mesh)
  state = train_step.make_state(base.load(workdir, dataset), optimizer, mesh)
  stream = pair_batches.on_devices(config, workdir / "pairs", dataset, mesh)(0)
  for _ in range(3):
    state, _ = step(state, next(stream), jax.random.key(0))
  assert step._cache_size() == 1 and int(state.step) == 3
