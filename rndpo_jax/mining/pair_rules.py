"""From scored proposals to preference pairs, per image and on the device.

Each image has a K x K table of ordered candidate pairs (chosen i, rejected j). The rule says
which entries are candidates and in which order they are wanted; the filters take candidates
away; the first P that are left become pairs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from rndpo_jax import types

FILTERS = ("not_finite", "identical", "tie", "score_gap", "region_size")


def mine(
  scores: jax.Array,
  sizes: jax.Array,
  keys: jax.Array,
  *,
  rule: str,
  pairs_per_image: int,
  min_score_gap: float,
  min_region_size: int,
  max_region_size: int,
  present: jax.Array | None = None,
) -> types.Pairs:
  """Mines up to P preference pairs an image.

  Filters act in the order of FILTERS, and a candidate counts for the first that takes it:
  `not_finite` (a score is NaN or infinite), `identical` (|D| = 0; before `tie`, for judges
  score equal masks equally), `tie` (equal scores), `score_gap` (gap <= min_score_gap),
  `region_size` (outside min_region_size..max_region_size). They act before the choice of P, so
  `top_vs_random` draws among the candidates that are left. Empty masks are masks like others.

  Args:
    scores: f32[b, K], higher is better.
    sizes: i32[b, K, K], |D| of each two masks, see `overlap.pairwise_region_size`.
    keys: [b], one key an image; used by the random rules.
    rule: a key of RULES.
    pairs_per_image: P >= 1.
    min_score_gap: a pair needs a gap above it.
    min_region_size: least |D| of a pair, in pixels.
    max_region_size: greatest |D|; 0 sets no limit.
    present: bool[b, K]; a proposal that is not there makes no candidate. None if all are.

  Returns:
    types.Pairs; slots without a pair have valid False and zeros.

  Raises:
    ValueError: unknown rule, or more pairs asked for than K proposals make.
  """
  count = scores.shape[1]
  _check(rule, pairs_per_image, count)
  if present is not None:
    scores = jnp.where(present, scores, jnp.nan)
  finite = jnp.isfinite(scores)
  ranked = jnp.where(finite, scores, -jnp.inf)
  candidate, priority = jax.vmap(RULES[rule])(ranked, keys)
  # A proposal paired with itself is no pair, whatever the rule says.
  others = jnp.broadcast_to(~jnp.eye(count, dtype=bool), candidate.shape)
  candidate = candidate & others
  if present is not None:
    candidate = candidate & present[:, :, None] & present[:, None, :]
  known = jnp.where(finite, scores, 0.0)
  gap = known[:, :, None] - known[:, None, :]
  takers = _takers(finite, sizes, gap, min_score_gap, min_region_size, max_region_size)
  candidate, dropped = _filter(candidate, takers)
  select = partial(_select, pairs_per_image=pairs_per_image)
  return types.Pairs(*jax.vmap(select)(candidate, priority, gap, sizes), dropped)


def _takers(finite, sizes, gap, min_score_gap, min_region_size, max_region_size):
  """bool[b, K, K] of each filter, which candidates it takes; in the order of FILTERS."""
  too_large = (sizes > max_region_size) & (max_region_size > 0)
  return (
    ~(finite[:, :, None] & finite[:, None, :]),
    sizes == 0,
    gap == 0,
    gap <= min_score_gap,
    (sizes < min_region_size) | too_large,
  )


def _check(rule: str, pairs_per_image: int, count: int) -> None:
  """Raises ValueError if the rule is unknown, or K = count proposals do not make so many pairs."""
  if rule not in RULES:
    raise ValueError(f"unknown mining rule {rule!r}; known: {', '.join(RULES)}")
  most = count * (count - 1) // 2
  if not 1 <= pairs_per_image <= most:
    raise ValueError(
      f"pairs_per_image is {pairs_per_image}, but {count} proposals make {most} pairs"
    )


def _filter(candidate, takers):
  """What the filters leave of bool[b, K, K], and how many each took: i32[b, filters]."""
  dropped = []
  for taken in takers:
    dropped.append(jnp.sum(candidate & taken, axis=(1, 2), dtype=jnp.int32))
    candidate = candidate & ~taken
  return candidate, jnp.stack(dropped, axis=1)


def _select(candidate, priority, gap, size, *, pairs_per_image):
  """The P candidates of highest priority of one image, the first in the table on ties."""
  count = candidate.shape[0]
  wanted = jnp.where(candidate, priority, -jnp.inf).ravel()
  order = jnp.argsort(-wanted, stable=True)[:pairs_per_image]
  valid = candidate.ravel()[order]
  zero = jnp.zeros_like(order)
  chosen = jnp.where(valid, order // count, zero).astype(jnp.int32)
  rejected = jnp.where(valid, order % count, zero).astype(jnp.int32)
  return (
    chosen,
    rejected,
    jnp.where(valid, gap[chosen, rejected], 0.0),
    jnp.where(valid, size[chosen, rejected], 0),
    valid,
  )


# A rule: (scores f32[K] with -inf for unusable ones, key) -> (candidate bool[K, K], priority
# f32[K, K]), finite if candidate; higher priority is wanted first.


def top_vs_random(scores, key):
  """The best proposal against each other one, in random order."""
  return _against_top(scores, jax.random.uniform(key, scores.shape))


def top_vs_bottom(scores, key):
  """The best proposal against the worst, then the second worst, and so on."""
  del key
  return _against_top(scores, -scores)


def top_vs_rest(scores, key):
  """The best proposal against every other one, in order of index."""
  del key
  return _against_top(scores, -jnp.arange(scores.shape[0], dtype=jnp.float32))


def top_vs_base(scores, key):
  """The best proposal against the first, which is the model's own mask; none where that is best."""
  candidate, priority = top_vs_rest(scores, key)
  return candidate & (jnp.arange(scores.shape[0]) == 0)[None, :], priority


def random_pair(scores, key):
  """Every pair of proposals, in random order; the better is chosen."""
  count = scores.shape[0]
  draw = jnp.triu(jax.random.uniform(key, (count, count)), 1)
  first = jnp.triu(jnp.ones((count, count), bool), 1)
  better = scores[:, None] > scores[None, :]
  # Equal scores stay candidates, once, so that the filter for ties counts them.
  equal = (scores[:, None] == scores[None, :]) & first
  return better | equal, draw + draw.T


def adjacent(scores, key):
  """Rank r against rank r + 1, the best ranks first."""
  del key
  count = scores.shape[0]
  order = jnp.argsort(-scores, stable=True)
  rank = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
  candidate = rank[:, None] + 1 == rank[None, :]
  return candidate, jnp.broadcast_to(-rank[:, None].astype(jnp.float32), candidate.shape)


def _against_top(scores, priority):
  """The best proposal (the lowest index on ties) against the others."""
  count = scores.shape[0]
  is_top = jnp.arange(count) == jnp.argmax(scores)
  candidate = is_top[:, None] & ~is_top[None, :]
  return candidate, jnp.broadcast_to(priority[None, :], (count, count))


RULES = {
  "top_vs_random": top_vs_random,
  "top_vs_bottom": top_vs_bottom,
  "top_vs_rest": top_vs_rest,
  "top_vs_base": top_vs_base,
  "random_pair": random_pair,
  "adjacent": adjacent,
}
