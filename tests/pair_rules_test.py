"""Mining: direction, order, ties, filters counted by hand, and device independence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.mining import judges, overlap, pair_rules, proposals

# Five proposals on nine pixels: mask k has its first k pixels set, so |D| of i, j is |i - j|.
MASKS = (np.arange(9)[None, :] < np.arange(5)[:, None]).astype(np.uint8).reshape(1, 5, 3, 3)
SCORES = np.array([[0.3, 0.9, 0.1, 0.7, 0.5]], np.float32)
RANKED = [1, 3, 4, 0, 2]  # best first


@partial(jax.jit, static_argnames=("rule", "pairs_per_image"))
def _mine(scores, masks, keys, rule, pairs_per_image, **limits):
  limits = {"min_score_gap": 0.0, "min_region_size": 1, "max_region_size": 0} | limits
  sizes = overlap.pairwise_region_size(masks, 2)
  return pair_rules.mine(scores, sizes, keys, rule=rule, pairs_per_image=pairs_per_image, **limits)


def mine(scores, masks=MASKS, rule="top_vs_rest", pairs_per_image=4, key=0, **limits):
  keys = jax.random.split(jax.random.key(key), len(scores))
  scores = jnp.asarray(scores, jnp.float32)
  return jax.device_get(_mine(scores, masks, keys, rule, pairs_per_image, **limits))


def pairs_of(mined, image=0):
  valid = mined.valid[image]
  return list(zip(mined.chosen[image][valid], mined.rejected[image][valid], strict=True))


def random_case(seed, num_images=20, count=5):
  rng = np.random.default_rng(seed)
  masks = rng.integers(0, 2, (num_images, count, 3, 3)).astype(np.uint8)
  return rng.permuted(np.tile(np.linspace(0, 1, count), (num_images, 1)), axis=1), masks


@pytest.mark.parametrize(
  "rule,expected",
  [
    ("top_vs_bottom", [(1, 2), (1, 0), (1, 4), (1, 3)]),
    ("top_vs_rest", [(1, 0), (1, 2), (1, 3), (1, 4)]),
    ("top_vs_base", [(1, 0)]),
    ("adjacent", [(1, 3), (3, 4), (4, 0), (0, 2)]),
  ],
)
def test_pairs_and_their_order_by_hand(rule, expected):
  mined = mine(SCORES, rule=rule)
  assert pairs_of(mined) == expected
  chosen, rejected = np.array(expected).T
  found = mined.valid[0]
  np.testing.assert_array_equal(mined.score_gap[0][found], SCORES[0][chosen] - SCORES[0][rejected])
  np.testing.assert_array_equal(mined.region_size[0][found], abs(chosen - rejected))
  np.testing.assert_array_equal(mined.dropped, [[0, 0, 0, 0, 0]])


@pytest.mark.parametrize("rule", pair_rules.RULES)
def test_chosen_has_the_higher_score_and_masks_differ(rule):
  scores, masks = random_case(1)
  mined = mine(scores, masks, rule, 3)
  assert mined.valid.any()
  for image in range(len(scores)):
    assert len(set(map(frozenset, pairs_of(mined, image)))) == mined.valid[image].sum()
    for slot, (i, j) in enumerate(pairs_of(mined, image)):
      gap = np.float32(scores[image, i]) - np.float32(scores[image, j])
      assert gap == mined.score_gap[image, slot] > 0
      assert mined.region_size[image, slot] == (masks[image, i] != masks[image, j]).sum() > 0
  off = ~mined.valid
  assert not (mined.chosen[off].any() or mined.rejected[off].any())
  assert not (mined.score_gap[off].any() or mined.region_size[off].any())


def test_top_vs_random_draws_every_other_proposal_alike():
  scores, masks = np.repeat(SCORES, 4000, 0), np.repeat(MASKS, 4000, 0)
  mined = mine(scores, masks, "top_vs_random", 1)
  assert mined.valid.all() and (mined.chosen == 1).all()
  counts = np.bincount(mined.rejected[:, 0], minlength=5)
  # Binomial with p = 1/4: standard deviation 27.
  assert counts[1] == 0 and (abs(counts[[0, 2, 3, 4]] - 1000) < 5 * 27.4).all()


def test_random_pair_draws_every_pair_alike():
  scores, masks = np.repeat(SCORES, 4000, 0), np.repeat(MASKS, 4000, 0)
  mined = mine(scores, masks, "random_pair", 1)
  counts = np.zeros((5, 5), int)
  np.add.at(counts, (mined.chosen[:, 0], mined.rejected[:, 0]), 1)
  allowed = SCORES[0][:, None] > SCORES[0][None]
  assert counts[~allowed].sum() == 0 and (abs(counts[allowed] - 400) < 5 * 19).all()
  everything = mine(SCORES, rule="random_pair", pairs_per_image=10)
  assert len(set(pairs_of(everything))) == 10


def test_ties():
  # The lowest index is on top; the tie of 0 and 2 is dropped and counted.
  mined = mine([[0.8, 0.1, 0.8, 0.1, 0.1]], rule="top_vs_bottom")
  assert pairs_of(mined) == [(0, 1), (0, 3), (0, 4)]
  assert mined.dropped.tolist() == [[0, 0, 1, 0, 0]]
  # Ranks 0 2 | 1 3 4: three of the four neighbours tie.
  mined = mine([[0.8, 0.1, 0.8, 0.1, 0.1]], rule="adjacent")
  assert pairs_of(mined) == [(2, 1)] and mined.dropped.tolist() == [[0, 0, 3, 0, 0]]
  for rule, candidates in {"random_pair": 10, "top_vs_random": 4}.items():
    mined = mine([[0.5] * 5], rule=rule)
    assert not mined.valid.any() and mined.dropped.tolist() == [[0, 0, candidates, 0, 0]]


def test_filters_in_order_counted_by_hand():
  masks = MASKS.copy()
  masks[0, 3] = masks[0, 1]  # 3 is the same mask as the top, 1
  scores = [[0.85, 0.9, 0.9, 0.2, 0.3]]
  # Against 1: 0 has gap 0.05; 2 ties; 3 is identical, so its score counts no more; 4 differs in 3
  # pixels.
  limits = {"min_score_gap": 0.1, "min_region_size": 1, "max_region_size": 2}
  mined = mine(scores, masks, **limits)
  assert not mined.valid.any() and mined.dropped.tolist() == [[0, 1, 1, 1, 1]]
  mined = mine(scores, masks, **(limits | {"max_region_size": 0}))
  assert pairs_of(mined) == [(1, 4)] and mined.dropped.tolist() == [[0, 1, 1, 1, 0]]
  mined = mine(scores, masks, **(limits | {"max_region_size": 3, "min_score_gap": 0.0}))
  assert pairs_of(mined) == [(1, 0), (1, 4)] and mined.dropped.tolist() == [[0, 1, 1, 0, 0]]
  mined = mine(scores, masks, min_score_gap=0.0, min_region_size=2)
  assert pairs_of(mined) == [(1, 4)] and mined.dropped.tolist() == [[0, 1, 1, 0, 1]]


def test_a_gap_equal_to_the_minimum_is_dropped():
  mined = mine([[0.0, 1.0, 0.5, 0.25, 0.75]], min_score_gap=0.5)
  assert pairs_of(mined) == [(1, 0), (1, 3)] and mined.dropped.tolist() == [[0, 0, 0, 2, 0]]


def test_filters_act_before_the_choice():
  # Only 4 passes: the draw must never fall on another and leave the slot empty.
  for key in range(8):
    mined = mine(SCORES, rule="top_vs_random", pairs_per_image=1, key=key, min_region_size=3)
    assert pairs_of(mined) == [(1, 4)]
    assert mined.dropped.tolist() == [[0, 0, 0, 0, 3]]


def test_empty_masks_are_masks_like_others():
  masks = np.zeros_like(MASKS)
  mined = mine(SCORES, masks)
  assert not mined.valid.any() and mined.dropped.tolist() == [[0, 4, 0, 0, 0]]
  masks[0, 4] = 1
  mined = mine(SCORES, masks)
  assert pairs_of(mined) == [(1, 4)] and mined.region_size[0, 0] == 9


def test_against_the_own_mask_there_is_one_pair_or_none():
  """None where the first proposal is the best, has no score, or is as good or the same mask."""
  scores = [
    [0.3, 0.9, 0.1, 0.7, 0.5], [0.95, 0.9, 0.1, 0.7, 0.5], [np.nan, 0.9, 0.1, 0.7, 0.5],
    [0.3, 0.1, 0.3, 0.3, 0.2], [0.3, 0.1, 0.9, 0.3, 0.2],
  ]  # fmt: skip
  masks = np.repeat(MASKS, 5, 0)
  masks[4, 2] = masks[4, 0]
  mined = mine(scores, masks, "top_vs_base", 1)
  assert [pairs_of(mined, image) for image in range(5)] == [[(1, 0)], [], [], [], []]
  np.testing.assert_array_equal(
    mined.dropped[:, :3], [[0] * 3, [0] * 3, [1, 0, 0], [0] * 3, [0, 1, 0]]
  )


@pytest.mark.parametrize("rule", sorted(pair_rules.RULES.keys() - {"top_vs_base"}))
def test_scores_that_are_not_finite_are_dropped_and_counted(rule):
  scores = [[np.nan, 0.9, np.inf, 0.7, -np.inf], [np.nan] * 5]
  mined = mine(scores, np.repeat(MASKS, 2, 0), rule)
  assert pairs_of(mined) == [(1, 3)] and not mined.valid[1].any()
  assert np.isfinite(mined.score_gap).all()
  assert (mined.dropped[:, 0] > 0).all() and not mined.dropped[:, 1:].any()


@pytest.mark.parametrize("rule", ["top_vs_bottom", "adjacent"])
def test_a_proposal_that_is_not_there_is_in_no_pair_and_in_no_count(rule):
  """Whatever its mask and score: pairs are those of the others alone."""
  present = np.array([[True, False, True, True, True]])
  few = mine(SCORES[present][None], MASKS[present][None], rule, pairs_per_image=4)
  for score in (9.0, np.nan):
    scores = np.where(present, SCORES, score)
    got = mine(scores, np.where(present[..., None, None], MASKS, 1), rule, present=present)
    places = np.flatnonzero(present[0])
    assert pairs_of(got) == [(places[i], places[j]) for i, j in pairs_of(few)] and pairs_of(got)
    np.testing.assert_array_equal(got.dropped, few.dropped)


@pytest.mark.parametrize("rule", ["top_vs_bottom", "adjacent"])
def test_permuting_proposals_permutes_the_pairs(rule):
  scores, masks = random_case(2)
  order = np.random.default_rng(3).permutation(5)
  before, after = mine(scores, masks, rule), mine(scores[:, order], masks[:, order], rule)
  np.testing.assert_array_equal(before.valid, after.valid)
  valid = before.valid
  np.testing.assert_array_equal(before.chosen[valid], order[after.chosen[valid]])
  np.testing.assert_array_equal(before.rejected[valid], order[after.rejected[valid]])
  np.testing.assert_array_equal(before.dropped, after.dropped)


def test_negating_scores_swaps_chosen_and_rejected():
  scores, masks = random_case(4)
  ahead, back = (mine(s, masks, "adjacent") for s in (scores, -scores))
  for image in range(len(scores)):
    assert {(j, i) for i, j in pairs_of(ahead, image)} == set(pairs_of(back, image))


def test_unknown_rule_and_too_many_pairs_are_refused():
  with pytest.raises(ValueError, match="unknown mining rule 'best'"):
    mine(SCORES, rule="best")
  with pytest.raises(ValueError, match="5 proposals make 10 pairs"):
    mine(SCORES, pairs_per_image=11)


def conv(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def small_segmenter():
  """One convolution each way and dropout between: enough to draw masks of three classes."""

  def encode(params, images):
    return jax.nn.relu(conv(images, params[0]))

  def decode(params, features, key=None):
    if key is not None:
      features = features * 2 * jax.random.bernoulli(key, 0.5, features.shape)
    return conv(features, params[1])

  return types.Segmenter(None, None, encode, decode)


def test_sample_judge_and_mine_do_not_depend_on_devices_or_batch_size():
  segmenter = small_segmenter()
  images = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
  keys = jax.random.split(jax.random.key(1))
  params = [jax.random.normal(keys[0], (3, 3, 1, 4)), jax.random.normal(keys[1], (3, 3, 4, 3))]
  mix = proposals.parse_mix("mc_dropout+logit_noise:3,tta:2,zoom:2")
  judge = judges.build("agreement", num_classes=3, border=1, flip_rate=0.0, noise_level=0.0)

  def program(params, images, index):
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(7), i), 3))(index)
    sampled = proposals.sample(
      segmenter, params, images, keys[:, 0], mix=mix, noise_scale=1.0, noise_smoothing=2.0,
      temperature_low=1.0, temperature_high=1.0, threshold_shift=0.0, zoom=1.5,
    )  # fmt: skip
    probs = jax.nn.softmax(sampled.logits)
    scores = judge(images, sampled.masks, probs, judges.Context(keys[:, 1]))
    sizes = overlap.pairwise_region_size(sampled.masks, 3)
    mined = pair_rules.mine(
      scores, sizes, keys[:, 2], rule="top_vs_random", pairs_per_image=2,
      min_score_gap=0.0, min_region_size=1, max_region_size=0,
    )  # fmt: skip
    return sampled.masks, mined, scores, sampled.logits

  index = jnp.arange(16)
  whole = jax.device_get(jax.jit(program)(params, images, index))
  assert whole[1].valid.any() and len(np.unique(whole[0])) == 3

  def check(parts):
    np.testing.assert_array_equal(parts[0], whole[0])
    for got, expected in zip(parts[1], whole[1], strict=True):
      if got.dtype == np.float32:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
      else:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(parts[2], whole[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts[3], whole[3], rtol=1e-4, atol=1e-4)

  assert jax.local_device_count() == 8
  mapped = jax.pmap(program, in_axes=(None, 0, 0))
  spread = mapped(params, images.reshape(8, 2, 8, 8, 1), index.reshape(8, 2))
  check(jax.tree.map(lambda x: np.asarray(x).reshape(16, *x.shape[2:]), spread))
  once = jax.jit(program)
  parts = [once(params, images[a : a + 1], index[a : a + 1]) for a in range(16)]
  check(jax.tree.map(lambda *xs: np.concatenate(xs), *parts))


def test_region_classes_decide_the_size_that_filters_and_records_read():
  # Against the first mask: 2 pixels of class 1, 3 of class 2, and both.
  masks = np.zeros((1, 4, 3, 3), np.uint8)
  masks[0, 1, 0, :2] = 1
  masks[0, 2, 1] = 2
  masks[0, 3] = masks[0, 1] + masks[0, 2]
  scores = jnp.float32([[0.9, 0.1, 0.2, 0.3]])

  def sizes(region_classes, **limits):
    mined = pair_rules.mine(
      scores, overlap.pairwise_region_size(masks, 3, region_classes),
      jax.random.split(jax.random.key(0), 1), rule="top_vs_rest", pairs_per_image=3,
      **{"min_score_gap": 0.0, "min_region_size": 1, "max_region_size": 0, **limits},
    )  # fmt: skip
    return mined.region_size[0].tolist(), mined.rejected[0].tolist(), mined.dropped[0].tolist()

  assert sizes(None) == ([2, 3, 5], [1, 2, 3], [0, 0, 0, 0, 0])
  assert sizes((2,)) == ([3, 3, 0], [2, 3, 0], [0, 1, 0, 0, 0])
  assert sizes((1,), min_region_size=3) == ([0, 0, 0], [0, 0, 0], [0, 1, 0, 0, 2])
