"""Judges: values by hand, empty masks, what each needs, and what each must not depend on."""

import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax.evaluation import metrics
from rndpo_jax.mining import judges

KEYS = jax.random.split(jax.random.key(0), 2)


def build(name, num_classes=2, border=0, flip_rate=0.0, noise_level=0.0, learned_apply=None):
  return judges.build(
    name, num_classes=num_classes, border=border, flip_rate=flip_rate, noise_level=noise_level,
    learned_apply=learned_apply,
  )  # fmt: skip


def case(seed=0, num_images=2, count=4, num_classes=3, shape=(5, 6)):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(num_images, *shape, 1)).astype(np.float32)
  masks = rng.integers(0, num_classes, (num_images, count, *shape)).astype(np.uint8)
  logits = 2 * rng.normal(size=(*masks.shape, num_classes)).astype(np.float32)
  labels = rng.integers(0, num_classes, (num_images, *shape)).astype(np.uint8)
  return images, masks, np.asarray(jax.nn.softmax(logits)), labels


def foreground_dice(a, b, num_classes):
  return metrics.overlap(metrics.pixel_counts(a, b, num_classes))["dice"].mean()


def test_true_scores_are_the_mean_foreground_dice():
  _, masks, _, labels = case()
  got = judges.true_scores(masks, labels, 3)
  expected = [[foreground_dice(m, y, 3) for m in row] for row, y in zip(masks, labels, strict=True)]
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  empty = np.zeros((1, 1, 2, 2), np.uint8)
  assert judges.true_scores(empty, empty[0], 2).tolist() == [[1.0]]


def test_agreement_with_the_others_and_an_ensemble():
  _, masks, _, _ = case()
  ensemble = case(1)[1][:, :3]
  for members in (None, ensemble):
    context = judges.Context(KEYS, ensemble_masks=members)
    got = build("agreement", 3)(None, masks, None, context)
    for i in range(2):
      for k in range(4):
        others = [masks[i, j] for j in range(4) if j != k]
        others += [] if members is None else list(members[i])
        expected = np.mean([foreground_dice(masks[i, k], other, 3) for other in others])
        np.testing.assert_allclose(got[i, k], expected, rtol=1e-5)


def test_equal_masks_tie_exactly_by_agreement():
  _, masks, _, _ = case(2, count=7)
  masks[:, 5] = masks[:, 1]
  got = np.asarray(
    jax.jit(lambda m: build("agreement", 3)(None, m, None, judges.Context(KEYS)))(masks)
  )
  np.testing.assert_array_equal(got[:, 1], got[:, 5])


def test_confidence_by_hand():
  # Mean foreground probability q = 0.9, 0.5 / 0.1, 0.1: sum 1.6.
  q = np.array([[0.9, 0.5], [0.1, 0.1]], np.float32)
  spread = np.array([0.1, -0.1, 0.0], np.float32).reshape(1, 3, 1, 1)
  foreground = q[None, None] + spread
  probs = np.stack([1 - foreground, foreground], axis=-1)
  masks = np.array([[[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]]], np.uint8)
  got = build("confidence")(None, masks, probs, judges.Context(KEYS[:1]))
  np.testing.assert_allclose(got, [[3.8 / 4.6, 2.8 / 3.6, 1 / 2.6]], rtol=1e-5)


def test_confidence_of_empty_masks_depends_on_what_is_expected():
  masks = np.zeros((2, 2, 4, 4), np.uint8)
  foreground = np.array([1e-4, 0.9], np.float32).reshape(2, 1, 1, 1) * np.ones(
    (2, 2, 4, 4), np.float32
  )
  probs = np.stack([1 - foreground, foreground], axis=-1)
  got = build("confidence")(None, masks, probs, judges.Context(KEYS))
  assert (got[0] > 0.99).all() and (got[1] < 0.1).all()


def entropy_of(border, masks, probs):
  return np.asarray(build("entropy", border=border)(None, masks, probs, judges.Context(KEYS[:1])))


def test_entropy_by_hand_in_and_around_the_mask():
  foreground = np.zeros((1, 2, 5, 5), np.float32)
  foreground[0, 0, 2, 2] = 0.5  # one uncertain pixel, next to the mask
  probs = np.stack([1 - foreground, foreground], axis=-1)
  masks = np.zeros((1, 2, 5, 5), np.uint8)
  masks[0, :, 1, 1] = 1
  np.testing.assert_array_equal(entropy_of(0, masks, probs), [[0, 0]])
  # The box of 3 x 3 around (1, 1) holds the pixel; the second mask's own probabilities are sure.
  np.testing.assert_allclose(entropy_of(1, masks, probs), [[-np.log(2) / 9, 0]], rtol=1e-6)
  np.testing.assert_allclose(entropy_of(9, masks, probs), [[-np.log(2) / 25, 0]], rtol=1e-6)


def test_entropy_of_an_empty_mask():
  foreground = np.zeros((1, 2, 3, 3), np.float32)
  foreground[0, :, 0, 0] = 0.5
  probs = np.stack([1 - foreground, foreground], axis=-1)
  masks = np.zeros((1, 2, 3, 3), np.uint8)
  # Both empty: the whole image. One empty: the foreground of the other.
  np.testing.assert_allclose(entropy_of(0, masks, probs), [[-np.log(2) / 9] * 2], rtol=1e-6)
  masks[0, 1, 0, :2] = 1
  np.testing.assert_allclose(entropy_of(0, masks, probs), [[-np.log(2) / 2] * 2], rtol=1e-6)


def test_learned_hands_each_mask_over_with_its_image():
  images, masks, _, _ = case()

  def apply(params, images, masks):
    assert images.shape[:1] == masks.shape[:1] == (2,)
    return params * jnp.sum(images, axis=(1, 2, 3)) + jnp.sum(masks, axis=(1, 2))

  context = judges.Context(KEYS, learned_params=100.0)
  got = build("learned", 3, learned_apply=apply)(images, masks, None, context)
  expected = 100 * images.sum((1, 2, 3))[:, None] + masks.sum((2, 3), dtype=int)
  np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_noisy_oracle_flips_and_adds_noise():
  _, masks, _, labels = case(num_images=1000, count=3, shape=(3, 3))
  context = judges.Context(jax.random.split(jax.random.key(1), 1000), labels=labels)
  truth = np.asarray(build("oracle", 3)(None, masks, None, context))
  flipped = build("noisy_oracle", 3, flip_rate=1.0)(None, masks, None, context)
  np.testing.assert_array_equal(flipped, -truth)
  some = np.asarray(build("noisy_oracle", 3, flip_rate=0.3)(None, masks, None, context))
  reversed_rows = (some == -truth).all(axis=1)
  # Whole images are reversed or kept; binomial with standard deviation 0.0145.
  assert (reversed_rows | (some == truth).all(axis=1)).all()
  assert abs(reversed_rows[truth.any(1)].mean() - 0.3) < 5 * 0.0145
  noise = np.asarray(build("noisy_oracle", 3, noise_level=0.2)(None, masks, None, context)) - truth
  assert abs(noise.std() - 0.2) < 0.02 and abs(noise.mean()) < 0.02
  assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.16


@pytest.mark.parametrize("name", judges.JUDGES)
def test_permuting_proposals_permutes_scores(name):
  images, masks, probs, labels = case(4)
  judge = build(
    name, 3, border=1, learned_apply=lambda p, x, m: jnp.mean(m * x[..., 0], axis=(1, 2))
  )
  context = judges.Context(KEYS, None, labels, (), file_scores=masks.mean((2, 3), np.float32))
  got = judge(images, masks, probs, context)
  order = np.array([2, 0, 3, 1])
  moved = context._replace(file_scores=context.file_scores[:, order])
  after = judge(images, masks[:, order], probs[:, order], moved)
  assert got.shape == (2, 4) and got.dtype == np.float32
  np.testing.assert_allclose(after, got[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["agreement", "confidence", "entropy"])
def test_judges_without_truth_ignore_labels(name):
  images, masks, probs, labels = case(5)
  judge = build(name, 3, border=1)
  blind = judge(images, masks, probs, judges.Context(KEYS))
  seeing = judge(images, masks, probs, judges.Context(KEYS, labels=labels))
  np.testing.assert_array_equal(blind, seeing)


@pytest.mark.parametrize("name", ["agreement", "confidence"])
def test_a_missing_proposal_tells_nothing_of_the_others(name):
  images, masks, probs, _ = case(6)
  judge = build(name, 3)
  present = np.array([[True, False, True, True], [True, True, True, False]])
  got = judge(images, masks, probs, judges.Context(KEYS, masks[:, :1], present=present))
  for n, there in enumerate(present):
    few = (x[n : n + 1] for x in (images, masks[:, there], probs[:, there]))
    alone = judge(*few, judges.Context(KEYS, masks[n : n + 1, :1]))
    np.testing.assert_allclose(got[n, there], alone[0], rtol=1e-6)


@pytest.mark.parametrize(
  "name,what",
  [
    ("learned", "learned_params"), ("oracle", "labels"), ("noisy_oracle", "labels"),
    ("file", "file_scores"),
  ],
)  # fmt: skip
def test_what_is_missing_is_named_at_trace_time(name, what):
  images, masks, probs, _ = case()
  judge = build(name, 3)
  with pytest.raises(ValueError, match=f"{name}.*{what}"):
    jax.eval_shape(lambda: judge(images, masks, probs, judges.Context(KEYS)))


def test_a_function_of_your_own(monkeypatch):
  module = python_types.ModuleType("my_judges")
  module.size = lambda images, masks, probs: jnp.sum(masks, axis=(2, 3))
  module.wrong = lambda images, masks, probs: jnp.sum(masks, axis=(1, 2, 3))
  monkeypatch.setitem(sys.modules, "my_judges", module)
  images, masks, probs, _ = case()
  context = judges.Context(KEYS)
  got = build("my_judges:size")(images, masks, probs, context)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, masks.sum((2, 3)))
  with pytest.raises(ValueError, match=r"my_judges:wrong.*\(2,\).*\(2, 4\)"):
    build("my_judges:wrong")(images, masks, probs, context)


@pytest.mark.parametrize("name", ["sharpness", "no_such_module:f", "math:no_such_function"])
def test_unknown_judges_raise(name):
  with pytest.raises(ValueError, match=name):
    build(name)
