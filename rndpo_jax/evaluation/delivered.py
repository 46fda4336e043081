"""Which model a run hands over: the last checkpoint that is shown not to be below the base.

The rule, on validation Dice. With d_i the difference checkpoint - base of case i, in n groups
(see `resampling`; most often each case is one):

    q = share of bootstrap resamples of the groups whose mean of d over cases is >= 0
    p = min(T_{n-1}(z(q) sqrt((n - 1) / n)), 1 - 2^-n) < 1    probability of not being below

z is the normal quantile and T_{n-1} Student's distribution: the percentile bootstrap (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; of pairs, so that what is hard in
a case is hard for both) is too sure with few groups, and this widens it as Hesterberg's expanded
percentile interval does ("What Teachers Should Know About the Bootstrap", 2015). 1 - 2^-n is what n
groups can show at most: all n are better by chance once in 2^n times. Delivered is the last
checkpoint with p >= `min_probability`. Without one it is the last with p >= NEAR_PROBABILITY that
passes the label-free rule (`label_free`) too: two signs that know nothing of each other. Without
such a one, the base. Each checkpoint is asked by itself: of many that are worth no more than the
base, some one may pass by chance. Deterministic: the seed is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import special

from rndpo_jax import errors, provenance, types
from rndpo_jax.evaluation import resampling
from rndpo_jax.runtime import files
from rndpo_jax.training import checkpoint

FOLDER = "delivered"
FILE = "delivered.json"
RULE = "the last checkpoint whose validation Dice is not below the base's, by a paired bootstrap"
# Lower, and of the runs in which checkpoints drift down slowly too many deliver a worse one.
NEAR_PROBABILITY = 0.8
NEAR_RULE = (
  f"{RULE}; without one the last that is not with probability {NEAR_PROBABILITY:g}, and that the "
  "label-free rule lets pass"
)
NUM_RESAMPLES = 10_000
_SEED = 0


def paired(
  difference: np.ndarray,
  group_ids: Sequence[str] | None = None,
  *,
  num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
  """What the differences of cases say about the mean difference.

  Args:
    difference: f64[n], one a case, n >= 1; in the unit of the metric.
    group_ids: n, the group of each case; None if each is one of its own.
    num_resamples: of the groups.

  Returns:
    {"mean", "ci": [low, high], a 95% percentile interval, or None for a single group,
    "probability": p as above}.
  """
  difference = np.asarray(difference, np.float64)
  groups = _groups(group_ids, len(difference))
  count = len(set(groups))
  means = resampling.ratios(difference, 1.0, groups, num_resamples=num_resamples, seed=_SEED)
  low, high = np.percentile(means, [2.5, 97.5])
  share = np.mean(means >= 0)
  probability = share
  if count > 1:
    # Of the normal distribution and of t; `scipy.stats`, which calls these, is slow to import.
    expanded = special.ndtri(share) * np.sqrt((count - 1) / count)
    probability = special.stdtr(count - 1, expanded)
  return {
    "mean": float(difference.mean()),
    "ci": [float(low), float(high)] if count > 1 else None,
    "probability": float(min(probability, _most(count))),
  }


def _groups(group_ids: Sequence[str] | None, count: int) -> Sequence[str]:
  return [str(case) for case in range(count)] if group_ids is None else group_ids


def _most(count: int) -> float:
  """The highest probability that so many groups can show, below 1: float64 has no 1 - 2^-54."""
  return min(1 - 2.0**-count, float(np.nextafter(1.0, 0.0)))


def choose(
  steps: Sequence[int],
  dice: np.ndarray,
  group_ids: Sequence[str] | None = None,
  *,
  min_probability: float,
  near: Sequence[bool] = (),
) -> dict[str, Any]:
  """Applies the rule.

  Args:
    steps: of the rows of `dice`, rising; the first is the base.
    dice: f64[len(steps), n], validation Dice of each case.
    group_ids: n, as in `paired`.
    min_probability: p that a checkpoint needs; 0 takes the last, 1 the base.
    near: whether each checkpoint, in the order of `steps` without the base, passes the label-free
      rule; empty if that is not known.

  Returns:
    {"step", "is_base", "chosen_by": "validation", or "validation, label_free" where the second part
    of the rule took it, "rule", "reason" (a sentence), "val_dice",
    "base_val_dice", "mean", "ci" and "probability" of `paired` (of the base: 0, [0, 0], 1),
    "min_probability", "num_cases", "num_groups", "checkpoints": [{"step", "val_dice", "mean", "ci",
    "probability"}, ...] without the base}.

  Raises:
    ValueError: shapes that do not fit, or Dice that is not finite.
  """
  dice = np.asarray(dice, np.float64)
  if dice.ndim != 2 or len(dice) != len(steps) or not dice.size or not np.isfinite(dice).all():
    raise ValueError(f"dice {dice.shape} of {len(steps)} steps: expected finite [steps, cases]")
  checkpoints = [
    {"step": int(step), "val_dice": float(row.mean()), **paired(row - dice[0], group_ids)}
    for step, row in zip(steps[1:], dice[1:], strict=True)
  ]
  base = {"step": int(steps[0]), "val_dice": float(dice[0].mean())}
  base |= {"mean": 0.0, "ci": [0.0, 0.0], "probability": 1.0}
  passing = [entry for entry in checkpoints if entry["probability"] >= min_probability]
  supported = []
  if not passing and min_probability < 1:
    supported = [
      entry
      for entry, is_near in zip(checkpoints, near, strict=len(near) > 0)
      if is_near and entry["probability"] >= NEAR_PROBABILITY
    ]
  taken = [base, *supported, *passing][-1]
  figures = {"base_val_dice": base["val_dice"], "num_cases": dice.shape[1]}
  figures["num_groups"] = len(set(_groups(group_ids, dice.shape[1])))
  figures["min_probability"] = min_probability
  return {
    **taken,
    "is_base": taken is base,
    "chosen_by": "validation, label_free" if supported else "validation",
    "rule": NEAR_RULE if len(near) else RULE,
    "reason": _reason(taken, checkpoints, figures, bool(passing)),
    **figures,
    "checkpoints": checkpoints,
  }


def _reason(taken, checkpoints, figures, is_passing) -> str:
  """One sentence."""
  is_base = taken not in checkpoints
  count, groups, asked = (figures[x] for x in ("num_cases", "num_groups", "min_probability"))
  most, cases = _most(groups), "cases" if groups == count else f"cases of {groups} groups"
  if is_base and most < asked:
    return (
      f"The base is delivered: {count} validation {cases} show with probability {most:.3g} at most "
      f"that a checkpoint is not below it, and {asked:g} is asked."
    )
  if is_base and not checkpoints:
    return "The base is delivered: there is no checkpoint."
  shown = max(checkpoints, key=lambda entry: entry["probability"]) if is_base else taken
  compared = (
    f"{shown['val_dice']:.4f} against {figures['base_val_dice']:.4f} over {count} {cases}, "
    f"probability {shown['probability']:.3f} of not being below, {asked:g} asked"
  )
  if is_base:
    return (
      "The base is delivered: no checkpoint is shown to be as good on validation (the nearest, "
      f"step {shown['step']}: Dice {compared})."
    )
  if not is_passing:
    return (
      f"The checkpoint of step {shown['step']} is delivered, the last that is near the base, has "
      f"kept the labelled images, and has a validation Dice that is not below ({compared} where "
      "that alone shows it)."
    )
  return (
    f"The checkpoint of step {shown['step']} is delivered, the last whose validation Dice is not "
    f"below the base's ({compared})."
  )


def write(
  workdir: epath.Path, content: dict[str, Any], params: types.Params, made_of: dict[str, str]
) -> None:
  """Writes `delivered/params/STEP` and then `delivered/delivered.json`; what is there may stay.

  Process 0 calls it alone.

  Args:
    workdir: of the run.
    content: from `choose`.
    params: of the step in it.
    made_of: fingerprints of the data and the base.
  """
  folder = epath.Path(workdir) / FOLDER
  content = {**content, "fingerprints": {**made_of, "params": provenance.fingerprint(params)}}
  if not _is_there(folder, content):
    # First: it must never stand beside the parameters of another step.
    (folder / FILE).unlink(missing_ok=True)
    checkpoint.save(folder / "params", content["step"], params, alone=True)
    checkpoint.keep_only(folder / "params", [content["step"]])
  files.write_json(folder / FILE, content)


def _is_there(folder: epath.Path, content: dict[str, Any]) -> bool:
  """Whether the parameters that `content` names are there, whole, and no others."""
  if checkpoint.steps(folder / "params") != [content["step"]]:
    return False
  try:
    kept = checkpoint.restore_params(folder / "params", content["step"], stage_directory=folder)
  except errors.CheckpointError:
    return False
  return provenance.fingerprint(kept) == content["fingerprints"]["params"]
