"""Synthetic bad masks: a spread of Dice, mild errors among them, and keys by position."""

import jax
import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.mining import corruptions, judges


def discs(num_classes, shape=(32, 32), count=100):
  """Nested discs off the centre, one a foreground class."""
  grids = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
  radius = np.sqrt(sum((g - 0.45 * n) ** 2 for g, n in zip(grids, shape, strict=True)))
  label = sum((radius < shape[0] * 0.32 / c).astype(np.uint8) for c in range(1, num_classes))
  return np.repeat(label[None], count, 0)


LABELS = discs(4)
IMAGES = np.random.default_rng(0).normal(size=(*LABELS.shape, 1)).astype(np.float32)


@jax.jit
def draw(seed, labels):
  return corruptions.training_batch(jax.random.key(seed), IMAGES, labels, 4, masks_per_image=2)


def test_dice_covers_its_range():
  masks = np.asarray(draw(0, LABELS)[1]).reshape(-1, 32, 32)
  assert masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1, 2, 3}
  labels = np.repeat(LABELS, 2, 0)
  dice = np.asarray(judges.true_scores(masks[:, None], labels, 4))[:, 0]
  shares = np.histogram(dice, [0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.01])[0] / len(dice)
  assert (shares > 0.01).all(), shares
  # A judge compares masks that are nearly right: there must be many of them.
  assert 0.2 < np.mean(dice > 0.9) < 0.8
  # Some masks lose pixels and some gain them.
  change = (masks > 0).sum((1, 2)) - (labels > 0).sum((1, 2), dtype=int)
  assert np.mean(change > 0) > 0.2 and np.mean(change < 0) > 0.2
  assert len({m.tobytes() for m in masks}) > 150


def test_training_batch_gives_several_masks_and_their_dice():
  images, masks, targets = draw(5, LABELS)
  np.testing.assert_array_equal(images, IMAGES)
  assert masks.shape == (100, 2, 32, 32) and targets.shape == (100, 2)
  np.testing.assert_allclose(targets, judges.true_scores(masks, LABELS, 4), rtol=1e-6)
  assert (np.asarray(masks[:, 0]) != np.asarray(masks[:, 1])).any()


def test_a_mask_depends_on_the_key_and_its_position_alone():
  whole = np.asarray(draw(1, LABELS)[1])
  others = np.concatenate([LABELS[:50], np.zeros_like(LABELS[50:])])
  np.testing.assert_array_equal(draw(1, others)[1][:50], whole[:50])
  assert (np.asarray(draw(2, LABELS)[1]) != whole).any()


def test_what_a_label_ignores_counts_in_no_mask():
  ignored = np.zeros(LABELS.shape, bool)
  ignored[:, 8:20] = True
  labels = np.where(ignored, types.IGNORED, LABELS).astype(np.uint8)
  _, masks, targets = draw(5, labels)
  known = np.asarray(draw(5, np.where(ignored, 0, LABELS).astype(np.uint8))[1])
  np.testing.assert_array_equal(masks, np.where(ignored[:, None], types.IGNORED, known))
  rows = ~ignored[0, :, 0]
  expected = judges.true_scores(known[:, :, rows], LABELS[:, rows], 4)
  np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_an_empty_mask_stays_or_gains_a_part():
  drawn = np.asarray(draw(4, np.zeros_like(LABELS))[1]).any(axis=(2, 3))
  # A false positive on an empty image is an error that a judge must know, and so is none.
  assert 0.05 < drawn.mean() < 0.95


@pytest.mark.parametrize("num_classes,shape", [(2, (8, 6)), (3, (12, 10, 8))])
def test_two_classes_and_volumes(num_classes, shape):
  labels = discs(num_classes, shape, 4)
  images = np.zeros((*labels.shape, 1), np.float32)
  shapes = jax.eval_shape(
    lambda key: corruptions.training_batch(key, images, labels, num_classes, 5), jax.random.key(0)
  )
  assert [(x.shape, x.dtype) for x in shapes] == [
    (images.shape, np.float32), ((4, 5, *shape), np.uint8), ((4, 5), np.float32),
  ]  # fmt: skip


def test_a_bump_raises_one_class_in_half_of_the_draws():
  keys = jax.random.split(jax.random.key(6), 400)
  bumps = np.asarray(jax.jit(jax.vmap(lambda key: corruptions._bump(key, (16, 12, 3))))(keys))
  used = bumps.max((1, 2)) > 0
  assert set(used.sum(1)) == {0, 1}  # one class or none
  assert abs(used.any(1).mean() - 0.5) < 5 * 0.025 and used.any(0).all()
  heights = bumps.max((1, 2, 3))[used.any(1)]
  # The centre may lie between pixels, so the peak seen is a little lower than 4.
  assert heights.min() > 2 and 12 < heights.max() <= 14
