"""How far a judge can be trusted: its scores against true scores, on the host in float64.

Each figure is a number of an image first, then the mean over the images of a case, then the
mean over cases, so that a volume of many slices weighs as one case. Intervals are percentile
bootstrap intervals that resample groups of cases, such as patients (see `resampling`). With few
groups those are too narrow, so they are expanded as Hesterberg has it ("What Teachers Should Know
About the Bootstrap", 2015): of n groups the ends are the quantiles Phi(+-t sqrt(n / (n - 1))), t
being the 2.5% quantile of Student's distribution with n - 1 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from rndpo_jax.evaluation import resampling


def reliability(
  scores: np.ndarray,
  truth: np.ndarray,
  case_ids: Sequence[str],
  *,
  num_bootstrap: int,
  seed: int,
  judged: np.ndarray | None = None,
  group_ids: Sequence[str] | None = None,
) -> dict:
  """Measures a judge on images whose truth is known.

  pair_accuracy: share of an image's pairs with differing truth that the judge orders the same
    way; a pair it ties, or scores not finitely, counts one half. What preference learning
    consumes. Undefined for an image whose proposals are all equally good.
  kendall_tau: tau-b (Kendall 1945), (agreeing - disagreeing pairs) / sqrt(pairs untied in truth
    * pairs untied in score); 0 if the judge ties all pairs, undefined as above.
  top1_regret: best truth of the image minus the truth of the judge's top proposal, the lowest
    index on ties, as in mining.

  Args:
    scores: f[N, K], the judge's, higher is better.
    truth: f[N, K], the true scores; finite.
    case_ids: N, the case of each image.
    num_bootstrap: resamples. seed: of the resampling.
    judged: bool[N, K], the proposals that are there and this judge's to score; None for all.
    group_ids: N, the group of each image's case; None if each case is one of its own.

  Returns:
    {"pair_accuracy", "pair_accuracy_ci": [low, high], "kendall_tau", "kendall_tau_ci",
    "top1_regret", "top1_regret_ci", "num_cases"}. A figure without an informative image is
    None, and so is a 95% interval of fewer than two informative groups; never NaN.

  Raises:
    ValueError: shapes that do not fit, or truth that is not finite.
  """
  scores, truth = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
  if scores.shape != truth.shape or scores.ndim != 2 or len(case_ids) != len(scores):
    raise ValueError(
      f"scores {scores.shape}, truth {truth.shape} and {len(case_ids)} case ids do not fit; "
      "expected [N, K], [N, K] and N"
    )
  if not np.all(np.isfinite(truth)):
    raise ValueError("true scores are not all finite")
  judged = np.ones(scores.shape, bool) if judged is None else np.asarray(judged)
  keep = judged.any(axis=1)  # an image without such a proposal tells nothing of the judge
  groups, case_index = _cases(case_ids, group_ids)
  scores, truth, judged, case_index = scores[keep], truth[keep], judged[keep], case_index[keep]
  accuracy, tau = _pair_figures(scores, truth, judged)
  ranked = np.where(np.isfinite(scores), scores, np.finfo(np.float64).min)
  top = np.argmax(np.where(judged, ranked, -np.inf), axis=1)
  best = np.where(judged, truth, -np.inf).max(axis=1)
  regret = best - np.take_along_axis(truth, top[:, None], axis=1)[:, 0]
  result = {}
  for name, values in (("pair_accuracy", accuracy), ("kendall_tau", tau), ("top1_regret", regret)):
    per_case, known = _case_means(values, case_index, len(groups))
    result[name] = float(per_case.mean()) if len(per_case) else None
    result[f"{name}_ci"] = _interval(per_case, 1.0, groups[known], num_bootstrap, seed)
  result["num_cases"] = len(np.unique(case_index))
  return result


def pair_accuracy(
  scores: np.ndarray, truth: np.ndarray, judged: np.ndarray | None = None
) -> np.ndarray:
  """That of `reliability` of each image, f64[N]; NaN if its proposals are all equally good.

  Args:
    scores: f[N, K], the judge's.
    truth: f[N, K], the true scores.
    judged: bool[N, K], the proposals that count; None for all.
  """
  return _pair_figures(np.asarray(scores, np.float64), np.asarray(truth, np.float64), judged)[0]


def mined(
  truth: np.ndarray,
  chosen: np.ndarray,
  rejected: np.ndarray,
  weight: np.ndarray,
  case_ids: Sequence[str],
  *,
  num_bootstrap: int,
  seed: int,
  group_ids: Sequence[str] | None = None,
) -> dict:
  """How many pairs of the kind that mining makes are right: their chosen mask is truly better.

  A pair whose masks are equally good is neither right nor wrong, and left out. Both figures are
  ratios of sums over all pairs, as the training loss is a mean over pairs: sum of w over the right
  pairs / sum of w, with w = 1 (`pair_accuracy`) and w the weight (`weighted_accuracy`).

  Args:
    truth: f[N, K], the true scores; finite.
    chosen: i[N, P], which of the K proposals. rejected: likewise.
    weight: f[N, P] >= 0, such as `pair_value.gradient_mass`; 0 if a slot has no pair.
    case_ids: N, the case of each image.
    num_bootstrap: resamples of groups.
    seed: of the resampling. group_ids: N, as in `reliability`.

  Returns:
    {"pair_accuracy", "pair_accuracy_ci": [low, high], "weighted_accuracy", "weighted_accuracy_ci",
    "num_pairs", "num_cases", "num_groups"}, intervals of 95%. Cases and groups are those that have
    pairs. Without a pair the figures are None, and with fewer than two groups the intervals.
  """
  truth, weight = np.asarray(truth, np.float64), np.asarray(weight, np.float64)
  gain = np.take_along_axis(truth, chosen, 1) - np.take_along_axis(truth, rejected, 1)
  counted = (weight > 0) & (gain != 0)
  groups, case_index = _cases(case_ids, group_ids)

  def per_case(values):
    return np.bincount(case_index, weights=values.sum(axis=1), minlength=len(groups))

  informative = per_case(1.0 * counted) > 0
  result = {}
  for name, share in (("pair_accuracy", 1.0), ("weighted_accuracy", weight)):
    whole = per_case(share * counted)[informative]
    right = per_case(share * (counted & (gain > 0)))[informative]
    result[name] = float(right.sum() / whole.sum()) if len(whole) else None
    result[f"{name}_ci"] = _interval(right, whole, groups[informative], num_bootstrap, seed)
  return {
    **result,
    "num_pairs": int(counted.sum()),
    "num_cases": int(informative.sum()),
    "num_groups": len(set(groups[informative])),
  }


def _pair_figures(scores, truth, judged=None):
  """Pair accuracy and tau-b f[N] of each image, NaN if no pair differs in truth."""
  first, second = np.triu_indices(scores.shape[1], 1)
  usable = np.isfinite(scores[:, first]) & np.isfinite(scores[:, second])
  clean = np.where(np.isfinite(scores), scores, 0.0)
  by_score = np.where(usable, np.sign(clean[:, first] - clean[:, second]), 0.0)
  by_truth = np.sign(truth[:, first] - truth[:, second])
  if judged is not None:
    both = judged[:, first] & judged[:, second]
    by_score, by_truth = np.where(both, by_score, 0.0), np.where(both, by_truth, 0.0)
  balance = np.sum(by_score * by_truth, axis=1)
  informative = np.sum(by_truth != 0, axis=1)
  untied = np.sum(by_score != 0, axis=1)
  undefined = informative == 0
  accuracy = 0.5 + 0.5 * balance / np.maximum(informative, 1)
  tau = balance / np.sqrt(np.maximum(informative * untied, 1))
  return np.where(undefined, np.nan, accuracy), np.where(undefined, np.nan, tau)


def _cases(case_ids, group_ids):
  """The group of each case, cases sorted, and the case of each image."""
  names = np.asarray(case_ids, dtype=str)
  cases, first, case_index = np.unique(names, return_index=True, return_inverse=True)
  return (cases if group_ids is None else np.asarray(group_ids, dtype=str)[first]), case_index


def _case_means(values, case_index, num_cases):
  """Mean over the defined images of each case that has any, and which cases these are."""
  defined = np.isfinite(values)
  count = np.bincount(case_index[defined], minlength=num_cases)
  total = np.bincount(case_index[defined], weights=values[defined], minlength=num_cases)
  return total[count > 0] / count[count > 0], count > 0


def _interval(above, below, groups, num_bootstrap, seed):
  """95% expanded percentile bootstrap interval of sum(above) / sum(below) over cases."""
  count = len(set(groups))
  if count < 2:
    return None
  found = resampling.ratios(above, below, groups, num_resamples=num_bootstrap, seed=seed)
  low = special.ndtr(special.stdtrit(count - 1, 0.025) * np.sqrt(count / (count - 1)))
  return np.quantile(found, [low, 1 - low]).tolist()
