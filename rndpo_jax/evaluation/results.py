"""From the pixel counts of cases to the figures of `results.json`; pure, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rndpo_jax.evaluation import metrics

# Mean Dice on test below which a base has learned nothing, and of Dice below the peak a warning.
LEARNED_NOTHING = 0.01
MAX_DROP = 0.01


class Case(NamedTuple):
  """What one model did on one case.

  Attributes:
    split: 'val' or 'test'.
    case_id: of the case; its slices count together.
    counts: i64[3, C] of `metrics.pixel_counts`, summed over the case.
    surface: `metrics.surface_metrics` of each foreground class, or None if not asked for.
  """

  split: str
  case_id: str
  counts: np.ndarray
  surface: list[dict[str, float]] | None = None


def case_values(case: Case, names: Sequence[str]) -> dict[str, list[float]]:
  """Each named metric of a case, one value a foreground class."""
  overlap = metrics.overlap(case.counts)
  values = {}
  for name in names:
    if name in metrics.SURFACE:
      values[name] = [float(entry[name]) for entry in case.surface]
    else:
      values[name] = [float(x) for x in overlap[name]]
  return values


def case_dice(case: Case) -> float:
  """Mean Dice over the foreground classes of a case."""
  return float(np.mean(case_values(case, ["dice"])["dice"]))


def split_dice(cases: Sequence[Case], split: str) -> np.ndarray:
  """`case_dice` of the cases of a split, f64[n], in their order."""
  return np.array([case_dice(case) for case in cases if case.split == split])


def split_groups(cases: Sequence[Case], split: str, group_of: Mapping[str, str]) -> list[str]:
  """The group of each case of a split, in the order of `split_dice`; `group_of` is by case id."""
  return [group_of[case.case_id] for case in cases if case.split == split]


def mean_metrics(
  cases: Sequence[Case], split: str, names: Sequence[str]
) -> dict[str, float | None]:
  """Mean over the split's cases of the mean over foreground classes; empty masks stay in.

  None of a split without cases.
  """
  rows = [case_values(case, names) for case in cases if case.split == split]
  if not rows:
    return dict.fromkeys(names)
  return {name: float(np.mean([np.mean(row[name]) for row in rows])) for name in names}


def empty_masks(cases: Sequence[Case], split: str) -> dict[str, int]:
  """Counts (case, class) entries by emptiness: {'total', 'both', 'mask_only', 'label_only'}.

  'mask_only': the segmenter's mask is empty and the label is not, a structure missed;
  'label_only': the other way round, a structure made up.
  """
  found = [metrics.overlap(case.counts) for case in cases if case.split == split]
  mask = np.array([entry["mask_empty"] for entry in found], bool)
  label = np.array([entry["label_empty"] for entry in found], bool)
  return {
    "total": int(mask.size),
    "both": int((mask & label).sum()),
    "mask_only": int((mask & ~label).sum()),
    "label_only": int((~mask & label).sum()),
  }


def curve_point(step: int, cases: Sequence[Case]) -> dict[str, float | None]:
  """One entry of the curve: mean Dice on validation and test after `step` steps; None without."""
  dice = {split: mean_metrics(cases, split, ["dice"])["dice"] for split in ("val", "test")}
  return {"step": step, "val_dice": dice["val"], "test_dice": dice["test"]}


def select_step(curve: Sequence[Mapping[str, float]]) -> int | None:
  """The step with the highest validation Dice, the earliest on ties; 0 is the base.

  None without validation cases.
  """
  if curve[0]["val_dice"] is None:
    return None
  return min(curve, key=lambda point: (-point["val_dice"], point["step"]))["step"]


def sustained(curve: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
  """How well the gain on test Dice holds over the fine-tuned checkpoints, steps above 0.

  Args:
    curve: entries of `curve_point` by ascending step, the base (step 0) first.

  Returns:
    "peak" and "final": the highest and the last test Dice. "last_third_mean": mean of the last
    max(1, n // 3) of n checkpoints. "fraction_above_base": share of checkpoints strictly above
    the base. "drop_from_peak": peak - final. All None without test cases.
  """
  if curve[0]["test_dice"] is None:
    names = ("peak", "final", "last_third_mean", "fraction_above_base", "drop_from_peak")
    return dict.fromkeys(names)
  base, dice = curve[0]["test_dice"], [point["test_dice"] for point in curve[1:]]
  return {
    "peak": max(dice),
    "final": dice[-1],
    "last_third_mean": float(np.mean(dice[-max(1, len(dice) // 3) :])),
    "fraction_above_base": float(np.mean([d > base for d in dice])),
    "drop_from_peak": max(dice) - dice[-1],
  }


def warnings(content: Mapping[str, Any], *, has_beta: bool, is_judged: bool) -> list[str]:
  """What a reader of `results.json` must not miss, a sentence or two each.

  Args:
    content: of `results.json`; "base", "sustained", "judge" and "judges" are read.
    has_beta: whether fine-tuning has a term on preferences, and so a beta.
    is_judged: whether it has one on pairs, and so a judge.

  Returns:
    One text for each that holds: the base has learned nothing, the last checkpoint is worse than
    the base or far below the peak, the judge of the run is at chance or below.
  """
  found = [] if content["base"]["test"]["dice"] is None else _test_warnings(content, has_beta)
  if not is_judged:
    return found
  return found + _judge_warning(content["judge"], content["judges"].get(content["judge"], {}))


def _test_warnings(content: Mapping[str, Any], has_beta: bool) -> list[str]:
  """Those by test Dice."""
  remedy, holds = "lower config.finetune.learning_rate", "A lower config.finetune.learning_rate"
  if has_beta:
    remedy, holds = "raise beta, choose another judge or rule", "A larger beta"
  held, base = content["sustained"], content["base"]["test"]["dice"]
  found = []
  if base < LEARNED_NOTHING:
    found.append(
      f"The base has learned nothing: its test Dice is {base:.3f}, and its proposals, the pairs "
      "and the fine-tuned network are worth no more. Train it longer (config.base.num_steps), with "
      "another config.base.learning_rate, or on more labelled cases."
    )
  if held["final"] < base:
    found.append(
      f"The last checkpoint is worse than the base on test: Dice {held['final']:.3f} against "
      f"{base:.3f}. Do not use it; {remedy}, or stop earlier."
    )
  if held["drop_from_peak"] > MAX_DROP:
    found.append(
      f"The last checkpoint lies {held['drop_from_peak']:.3f} Dice below the peak on test "
      f"({held['peak']:.3f}): the gain did not last. {holds} holds the network closer to the base."
    )
  return found


def _judge_warning(name: str, judge: Mapping[str, Any]) -> list[str]:
  """Of a judge whose pair accuracy, or the interval about it, is not above chance."""
  accuracy = judge.get("pair_accuracy")
  low, high = judge.get("pair_accuracy_ci") or (None, None)
  if accuracy is None or (accuracy if low is None else low) > 0.5:
    return []
  interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
  worse = (accuracy if high is None else high) < 0.5
  return [
    f"The judge {name} {'is worse than' if worse else 'cannot be told from'} chance: its pair "
    f"accuracy is {accuracy:.3f}{interval}, and 0.5 is a coin."
  ]


def gallery_choice(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, str]:
  """Which cases to show: best, median and worst by change of Dice, then by Dice after.

  Args:
    before: case id -> Dice of the base.
    after: case id -> Dice of the fine-tuned segmenter, same keys.

  Returns:
    case id -> why it was chosen; up to six different cases.
  """
  change = {case: after[case] - before[case] for case in after}
  chosen: dict[str, str] = {}
  for key, what in ((change, "change"), (after, "Dice after")):
    order = sorted(key, key=lambda case: (-key[case], case))
    middle, last = len(order) // 2, len(order) - 1
    for start, name in ((0, "best"), (last, "worst"), (middle, "median")):
      near = sorted(range(len(order)), key=lambda i, start=start: abs(i - start))
      free = [order[i] for i in near if order[i] not in chosen]
      if free:
        chosen[free[0]] = f"{name} {what}"
  return chosen


def fullest_slice(masks: np.ndarray) -> int:
  """Of masks [..., H, W, Z], the slice with the most foreground; of equals, the middle one."""
  foreground = (masks > 0).reshape(-1, masks.shape[-1]).sum(axis=0)
  best = np.flatnonzero(foreground == foreground.max())
  return int(best[len(best) // 2])


def units(spacing_unit: str) -> dict[str, str]:
  """The unit of each metric."""
  share = "fraction, 0 to 1"
  return {name: spacing_unit if row.distance else share for name, row in metrics.METRICS.items()}


def quoted(text: str) -> str:
  """A cell that a spreadsheet shows as it is: one that begins like a formula gets an apostrophe."""
  return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def plain(value: Any) -> Any:
  """Nested values as JSON can hold them: plain numbers, and None for NaN and infinity."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [plain(item) for item in value]
  if isinstance(value, (bool, np.bool_)):
    return bool(value)
  if isinstance(value, (int, np.integer)):
    return int(value)
  if isinstance(value, (float, np.floating)):
    return float(value) if math.isfinite(value) else None
  return value
