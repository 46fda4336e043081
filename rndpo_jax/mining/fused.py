"""One judge of several: proposals compared by a vote of judges, each weighted by its reliability.

    w_j        = log(p_j / (1 - p_j)),   0 if p_j <= 1/2        p_j: share of pairs that j has right
    score_k    = sum_j w_j mean_{l != k} sign(s_jk - s_jl)

For two proposals this is the weighted majority that is right most often if judges err
independently: Nitzan and Paroush, "Optimal decision rules in uncertain dichotomous choice
situations", International Economic Review 1982. For more the votes over all opponents add up, as in
Borda's count. Only the order of a judge's scores within an image counts, so judges of different
scales can be fused. p_j is measured on the validation split; where the fused judge is itself
measured, an image's weights come from the other groups of cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax.evaluation import resampling
from rndpo_jax.mining import judges, reliability

# A judge that had every pair right in a few cases must not outvote all others for ever.
MAX_ACCURACY = 0.99


def members(config) -> tuple[str, ...]:
  """The judges of `config.judge.compare` that are fused: those that read no labels."""
  names = dict.fromkeys(config.judge.compare)
  return tuple(n for n in names if n != judges.FUSED and not judges.needs(n, "labels"))


def log_odds(
  scores: Mapping[str, np.ndarray],
  truth: np.ndarray,
  case_ids: Sequence[str],
  judged: Mapping[str, np.ndarray] | None = None,
  group_ids: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The judges' weights.

  Args:
    scores: judge -> f[N, K], of J judges.
    truth: f[N, K], the true scores.
    case_ids: N, the case of each image.
    judged: judge -> bool[N, K], the proposals that count; None for all.
    group_ids: N, the group of each image's case; None if each case is one of its own.

  Returns:
    (w f32[J], f32[N, J]: w as the other groups than the image's give it). p_j is the mean over
    cases of `reliability.pair_accuracy`; 1/2 without an informative case.
  """
  names = np.asarray(case_ids, dtype=str)
  cases, first, case_index = np.unique(names, return_index=True, return_inverse=True)
  place = resampling.places(cases if group_ids is None else np.asarray(group_ids)[first])
  whole, others = [], []
  for name, values in scores.items():
    accuracy = reliability.pair_accuracy(values, truth, judged and judged[name])
    known = np.isfinite(accuracy)
    count = np.bincount(case_index, weights=known)
    total = np.bincount(case_index, weights=np.where(known, accuracy, 0.0))
    informative = count > 0
    mean = np.where(informative, total / np.maximum(count, 1), 0.0)
    whole.append(_weight(mean.sum(), informative.sum()))
    own = np.bincount(place, weights=mean), np.bincount(place, weights=informative)
    left_out = _weight(mean.sum() - own[0], informative.sum() - own[1])
    others.append(left_out[place[case_index]])
  return np.float32(whole), np.stack(others, axis=1).astype(np.float32)


def _weight(total, count):
  share = np.where(count > 0, total / np.maximum(count, 1), 0.5)
  share = np.clip(share, 0.5, MAX_ACCURACY)
  return np.log(share / (1.0 - share))


def fuse(scores: jax.Array, weights: jax.Array) -> jax.Array:
  """The formula of the module.

  Args:
    scores: f32[b, J, K]; one that is not finite has no vote, for or against.
    weights: f32[J] or f32[b, J].

  Returns:
    f32[b, K].
  """
  usable = jnp.isfinite(scores)
  clean = jnp.where(usable, scores, 0.0)
  votes = jnp.sign(clean[..., :, None] - clean[..., None, :])
  votes = jnp.where(usable[..., :, None] & usable[..., None, :], votes, 0.0)
  count = max(scores.shape[-1] - 1, 1)
  wins = jnp.sum(votes, axis=-1) / count
  weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), scores.shape[:2])
  return jnp.sum(weights[..., None] * wins, axis=1)
