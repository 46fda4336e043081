"""Terms of fine-tuning on images: each against its formula, and what teaches gets no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import losses, types
from rndpo_jax.config import base_config
from rndpo_jax.data import components
from rndpo_jax.losses import consistency
from rndpo_jax.mining import proposals
from rndpo_jax.stages import finetune
from rndpo_jax.training import image_terms, loss_fns, online_terms, term_inputs

SIZE, CLASSES, ROWS, DICE = (4, 4), 3, 4, 0.7


def apply(params, images, key=None):
  """One linear map a pixel, so that what a view shows is what comes out; dropout scales it."""
  logits = images @ params
  return logits if key is None else logits * (1.0 + 0.1 * jax.random.normal(key, logits.shape))


def without_dropout(params, images, key=None):
  del key
  return images @ params


def draw():
  rng = np.random.default_rng(0)
  policy, average, base, partner = rng.normal(size=(4, 2, CLASSES)).astype(np.float32)
  images = rng.normal(size=(2, ROWS, *SIZE, 2)).astype(np.float32)
  labels = rng.integers(0, CLASSES, (ROWS, *SIZE)).astype(np.uint8)
  batch = types.FinetuneBatch(
    labelled={"image": images[0], "label": labels}, unlabelled={"image": images[1]}
  )
  return policy, average, base, partner, batch


def loss_of(terms, params, batch, function=without_dropout, views=False, step=0, **inputs):
  """Value, gradient and metrics; without `views` the weak and the strong view are the image."""
  config = base_config()
  config.data.size = SIZE
  config.base.dice_weight = DICE
  config.base.augment = False
  for section in () if views else (config.augment, config.strong):
    for name in section:
      section[name] = 0.0
  config.finetune.ramp_steps = inputs.pop("ramp_steps", 0)
  config.finetune.terms.preference.weight = 0.0
  for name, options in terms.items():
    config.finetune.terms[name].update({"weight": 1.0, **options})
  loss_fn = finetune.make_loss_fn(config, function, num_classes=CLASSES)
  given = types.StepInputs(jax.random.key(0), step=step, **inputs)
  (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, given)
  return value, grads, metrics


def supervised(logits, labels):
  return losses.supervised_loss(logits, labels, dice_weight=DICE, has_ignored=True)[0]


@pytest.mark.parametrize("teacher", ["base", "average"])
def test_pseudo_labels_are_the_classes_of_who_teaches(teacher):
  policy, average, base, _, batch = draw()
  images = batch.unlabelled["image"]
  source = base if teacher == "base" else average
  labels = jnp.argmax(images @ source, -1).astype(jnp.uint8)
  value, _, metrics = loss_of(
    {"pseudo": {"teacher": teacher}}, policy, batch, reference=base, teacher=average
  )
  np.testing.assert_allclose(value, supervised(images @ policy, labels), rtol=1e-5)
  assert metrics["pseudo_sure"] == 1.0


def test_unsure_pixels_are_left_out_and_their_share_is_told():
  policy, _, base, _, batch = draw()
  images = batch.unlabelled["image"]
  probs = jax.nn.softmax(images @ base)
  sure = np.asarray(jnp.max(probs, -1) >= 0.7)
  assert 0.2 < sure.mean() < 0.9
  value, _, metrics = loss_of({"pseudo": {"threshold": 0.7}}, policy, batch, reference=base)
  classes = jnp.argmax(probs, -1)
  picked = jnp.take_along_axis(jax.nn.log_softmax(images @ policy), classes[..., None], -1)[..., 0]
  ignoring = jnp.where(sure, classes, types.IGNORED).astype(jnp.uint8)
  dice = jnp.mean(losses.soft_dice_loss(images @ policy, ignoring))
  np.testing.assert_allclose(value, np.mean(-picked * sure) + DICE * dice, rtol=1e-5)
  np.testing.assert_allclose(metrics["pseudo_sure"], sure.mean(), rtol=1e-6)


def test_weak_to_strong_without_boxes_is_pseudo_of_the_average():
  policy, average, _, _, batch = draw()
  same = {"threshold": 0.6}
  expected, _, _ = loss_of(
    {"pseudo": {**same, "teacher": "average"}}, policy, batch, teacher=average
  )
  for options in ({}, {"second_view": True}, {"dropout_view": True}):
    value, _, _ = loss_of(
      {"weak_to_strong": {**same, "cutmix": 0.0, **options}}, policy, batch, teacher=average
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_boxes_bring_their_own_classes():
  """A policy equal to a sure teacher has no loss, whatever was pasted where."""
  policy, _, _, _, batch = draw()
  sure = 100.0 * policy
  value, _, _ = loss_of(
    {"weak_to_strong": {"cutmix": 1.0, "threshold": 0.0}}, sure, batch, teacher=sure
  )
  assert value < 0.05
  keys = jax.random.split(jax.random.key(1), 2)
  images = batch.unlabelled["image"]
  mixed, goal = image_terms._cutmix(keys[0], images, images @ policy, 1.0)
  assert 0 < np.mean(np.any(mixed != images, axis=-1)) < 0.9
  np.testing.assert_allclose(goal, mixed @ policy, rtol=1e-5, atol=1e-6)


def test_consistency_is_the_mean_square_and_leaves_unsure_pixels_out():
  policy, average, _, _, batch = draw()
  images = batch.unlabelled["image"]
  value, _, _ = loss_of({"consistency": {}}, policy, batch, teacher=average)
  difference = jax.nn.softmax(images @ policy) - jax.nn.softmax(images @ average)
  np.testing.assert_allclose(value, np.mean(np.square(difference)), rtol=1e-5)
  same, _, _ = loss_of({"consistency": {}}, policy, batch, teacher=policy)
  assert same < 1e-12
  options = {"max_entropy": 0.6, "passes": 2}
  masked, _, _ = loss_of({"consistency": options}, policy, batch, teacher=average)
  keep = consistency.pixel_entropy(images @ average) < 0.6 * np.log(CLASSES)
  each = np.sum(np.mean(np.square(difference), -1) * keep, (1, 2)) / np.sum(keep, (1, 2))
  np.testing.assert_allclose(masked, np.mean(each), rtol=1e-4)


def test_partners_teach_each_other_alike():
  policy, _, _, partner, batch = draw()
  images = batch.unlabelled["image"]
  terms = {"cross_pseudo": {}, "labelled": {}}
  value, grads, _ = loss_of(terms, types.Partners(policy, partner), batch)
  swapped, turned, _ = loss_of(terms, types.Partners(partner, policy), batch)
  np.testing.assert_allclose(value, swapped, rtol=1e-6)
  np.testing.assert_allclose(grads.policy, turned.partner, rtol=1e-5)
  known = batch.labelled
  one, two = images @ policy, images @ partner
  expected = supervised(one, jnp.argmax(two, -1).astype(jnp.uint8))
  expected += supervised(two, jnp.argmax(one, -1).astype(jnp.uint8))
  for params in (policy, partner):
    expected += supervised(known["image"] @ params, known["label"])
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_copies_of_an_image_into_itself_change_nothing():
  """The same images on both sides, and a teacher whose classes are whole: the parts add up."""
  policy, average, _, _, batch = draw()
  images = batch.unlabelled["image"]
  guess = jnp.argmax(images @ average, -1).astype(jnp.uint8)
  labels = components.largest(guess, CLASSES)
  batch = types.FinetuneBatch({}, {"image": images, "label": labels}, {"image": images})
  values = [
    loss_of({"copy_paste": {"unlabelled_weight": w}}, policy, batch, teacher=average)[0]
    for w in (0.0, 1.0, 2.0)
  ]
  # inside and outside of the same boxes, once as labelled and once as unlabelled pixels.
  np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-5)
  np.testing.assert_allclose(values[2], 3 * values[0], rtol=1e-5)


def test_entropy_is_that_of_the_policy():
  policy, _, _, _, batch = draw()
  probs = jax.nn.softmax(batch.unlabelled["image"] @ policy)
  value, _, _ = loss_of({"entropy": {"weight": 0.3}}, policy, batch)
  np.testing.assert_allclose(value, -0.3 * np.mean(np.sum(probs * np.log(probs), -1)), rtol=1e-5)


def test_no_gradient_flows_into_what_teaches():
  policy, average, base, _, batch = draw()
  config = base_config()
  config.data.size = SIZE
  config.augment.turn = 0.0
  config.finetune.terms.preference.weight = 0.0
  for name in ("pseudo", "weak_to_strong", "consistency", "copy_paste"):
    config.finetune.terms[name].weight = 1.0
  loss_fn = finetune.make_loss_fn(config, apply, num_classes=CLASSES)

  def loss(teacher, base):
    inputs = types.StepInputs(jax.random.key(0), reference=base, teacher=teacher)
    return loss_fn(policy, batch, inputs)[0]

  for grads in jax.grad(loss, (0, 1))(average, base):
    assert not np.any(grads)


def test_no_view_changes_the_zeros_around_a_region():
  """Images of zeros alone, seen by a network that tells any other value."""
  policy, average, _, _, batch = draw()
  batch = jax.tree.map(lambda x: x if x.dtype == np.uint8 else np.zeros_like(x), batch)
  config = base_config()
  config.data.size = SIZE
  config.augment.update({"intensity": 1.0, "noise": 1.0, "turn": 0.0})
  config.strong.update({"intensity": 1.0, "noise": 1.0})
  config.finetune.terms.preference.weight = 0.0
  for name in ("labelled", "weak_to_strong", "consistency"):
    config.finetune.terms[name].weight = 1.0
  config.finetune.terms.weak_to_strong.threshold = 0.0
  given = types.StepInputs(jax.random.key(0), teacher=average)
  shows = []
  for in_mask in ((), (True, True)):
    loss_fn = finetune.make_loss_fn(config, apply, num_classes=CLASSES, in_mask=in_mask)
    grads = jax.grad(lambda params, f=loss_fn: f(params, batch, given)[0])(policy)
    shows.append(bool(np.any(grads)))  # of a linear map, 0 where its input is
  assert shows == [True, False]


def test_weights_rise_but_not_those_of_what_is_known():
  policy, average, _, _, batch = draw()
  terms = {"labelled": {"weight": 0.5}, "consistency": {"weight": 2.0}}
  given = {"teacher": average, "ramp_steps": 10}
  whole, _, metrics = loss_of(terms, policy, batch, step=10, **given)
  parts = 0.5 * metrics["labelled"], 2.0 * metrics["consistency"]
  np.testing.assert_allclose(whole, sum(parts), rtol=1e-6)
  for step, share in ((0, np.exp(-5)), (5, np.exp(-1.25)), (99, 1.0)):
    value, _, _ = loss_of(terms, policy, batch, step=step, **given)
    np.testing.assert_allclose(value, parts[0] + share * parts[1], rtol=1e-5)


def test_views_change_intensities_of_the_weak_view_alone():
  options = base_config().strong.to_dict()
  images = np.random.default_rng(0).normal(size=(ROWS, *SIZE, 2)).astype(np.float32)
  images[:, 0, 0] = images[:, 1, 1]
  options["noise"] = 0.0
  strong = term_inputs.strong_view(jax.random.key(0), images, options)
  assert np.any(strong != images)
  np.testing.assert_allclose(strong[:, 0, 0], strong[:, 1, 1], rtol=1e-5, atol=1e-6)


def test_online_pairs_are_the_best_by_expected_dice_against_another_one():
  policy, average, base, _, batch = draw()
  batch.unlabelled["image"][0] *= 1e4  # sure of every pixel: all its proposals are the same
  options = {"num_proposals": 3, "noise_scale": 0.5, "noise_smoothing": 1.0, "threshold_shift": 1.0}
  value, grads, metrics = loss_of(
    {"online": options}, policy, batch, reference=base, teacher=average, beta=jnp.float32(3.0)
  )
  images = batch.unlabelled["image"]
  keys = dict(zip(loss_fns._PLACES, loss_fns._keys(jax.random.key(0)), strict=True))
  noise_key, pair_key = jax.random.split(keys["online"])
  count = options.pop("num_proposals")
  logits = proposals.perturbed(images @ policy, noise_key, count, **options)
  masks, q = np.asarray(jnp.argmax(logits, -1)), np.asarray(jax.nn.softmax(images @ average))
  np.testing.assert_array_equal(masks[:, 0], jnp.argmax(images @ policy, -1))
  drawn = masks[..., None] == np.arange(1, CLASSES)
  shared = np.sum(drawn * q[:, None, ..., 1:], (2, 3))
  total = np.sum(drawn, (2, 3)) + np.sum(q, (1, 2))[:, None, 1:]
  scores = np.mean((2 * shared + 1) / (total + 1), -1)
  chosen, rejected, gap = online_terms.top_against_random(pair_key, masks, jnp.asarray(scores))
  top = scores.argmax(1)
  np.testing.assert_array_equal(chosen, masks[np.arange(ROWS), top])
  np.testing.assert_allclose(gap >= 0, True)

  def by_hand(params):
    size = losses.region_size(chosen, rejected)
    margin = losses.pair_margin(images @ params, chosen, rejected)
    margin -= losses.pair_margin(images @ base, chosen, rejected)
    each = jax.nn.softplus(-3.0 * margin / jnp.maximum(size, 1))
    return jnp.sum(jnp.where((size > 0) & (gap > 0), each, 0.0)) / ROWS

  assert 0 < metrics["online_pairs"] < 1
  np.testing.assert_allclose(value, by_hand(policy), rtol=1e-5)
  np.testing.assert_allclose(grads, jax.grad(by_hand)(policy), rtol=1e-4, atol=1e-6)


def test_the_other_mask_of_an_online_pair_is_any_but_the_best():
  masks = np.broadcast_to(np.arange(4, dtype=np.uint8)[None, :, None], (300, 4, 2))
  scores = np.float32([[0.1, 0.3, 0.9, 0.9]] * 300)
  chosen, rejected, gap = online_terms.top_against_random(jax.random.key(1), masks, scores)
  assert np.all(chosen == 2) and {*np.unique(rejected)} == {0, 1, 3}
  np.testing.assert_array_equal(gap, scores[0, 2] - scores[0, np.asarray(rejected)[:, 0]])
