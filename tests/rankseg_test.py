"""rankseg: the best mask by trying all, whose pixel it is, and what is outside a record."""

import itertools

import jax
import numpy as np
import pytest

from rndpo_jax.evaluation import predict, rankseg


@pytest.mark.parametrize("seed", range(6))
def test_no_mask_has_a_higher_expected_dice(seed):
  p = np.random.default_rng(seed).beta(0.4, 0.6 + seed, 9).astype(np.float32)

  def expected(mask):
    return (2 * p[list(mask)].sum() + 1) / (len(mask) + p.sum() + 1)

  masks = (m for n in range(10) for m in itertools.combinations(range(9), n))
  best = max(masks, key=expected)
  found = np.asarray(rankseg.best_masks(np.stack([1 - p, p], -1)[:, None]))[:, 0]
  assert tuple(np.flatnonzero(found)) == best


def test_sparse_foreground_has_a_threshold_below_a_half_and_the_likeliest_class_wins():
  probs = np.full((1, 4, 3), 0.0, np.float32)
  probs[0] = [[0.55, 0.45, 0.0], [0.3, 0.3, 0.4], [0.1, 0.45, 0.45], [1.0, 0.0, 0.0]]
  # Both classes (sums of 1.2) have the highest ratio with all of their pixels but the last.
  np.testing.assert_array_equal(rankseg.best_masks(probs), [[1, 2, 1, 0]])
  nothing = np.zeros((2, 2, 3), np.float32) + np.float32([0.98, 0.01, 0.01])
  assert not np.asarray(rankseg.best_masks(nothing)).any()


@pytest.mark.parametrize("shape", [(40, 30, 3), (9, 8, 7, 4), (5, 5, 2)])
def test_the_form_on_the_host_finds_the_same_masks(shape):
  rng = np.random.default_rng(len(shape))
  probs = rng.dirichlet(np.r_[2.0, np.full(shape[-1] - 1, 0.3)], shape[:-1]).astype(np.float16)
  probs[0] = np.eye(shape[-1], dtype=np.float16)[0]  # outside of what was seen
  found = rankseg.best_mask(probs)
  assert found.dtype == np.uint8 and 0 < np.count_nonzero(found) < found.size
  np.testing.assert_array_equal(found, rankseg.best_masks(probs.astype(np.float32)))
  assert not rankseg.best_mask(np.zeros_like(probs)).any()


def test_what_the_model_has_not_seen_expects_nothing():
  """Rows of padding change no threshold: each record has the mask that it has alone."""
  logits = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
  shapes = [(9, 7), (70, 66)]
  together = predict.resize_matrices(shapes, (6, 6), (6, 6))
  found = np.asarray(jax.jit(rankseg.native_masks)(logits, together))
  alone = [predict.resize_matrices([shape], (6, 6), (6, 6)) for shape in shapes]
  for row, (h, w) in enumerate(shapes):
    own = np.asarray(rankseg.native_masks(logits[row : row + 1], alone[row]))[0]
    np.testing.assert_array_equal(found[row, :h, :w], own[:h, :w])
    assert own.any() and not own[h:].any() and not own[:, w:].any()
