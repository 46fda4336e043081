"""Whether a judge's pairs may be trained on: the gate before fine-tuning, and the judge `auto`.

A judge that is refused ends the job if the phase that would read its pairs is the first. A later
phase is left out instead: what the phases before it have made is evaluated and delivered.

The figure is `reliability.mined`'s share of right pairs, weighted by the gradient that each pair
gets; what is asked is that the lower bound of its 95% interval reaches `judge.gate.min_accuracy`.
Without validation cases there is no figure, and no judge can be refused for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rndpo_jax import errors
from rndpo_jax.mining import judges

ACTIONS = ("refuse", "warn", "off")
REMEDY = (
  "Take another judge (config.judge.name, or 'auto'), a base trained longer or on more labels, or "
  "more validation cases"
)
MIN_GROUPS = 4  # of cases: by chance a judge is right in each of three once in eight times


def is_measured(entry: Mapping[str, Any]) -> bool:
  """Whether there were validation cases to measure a judge by, by its entry in `judges.json`."""
  return entry.get("split", "val") is not None


def lower_bound(entry: Mapping[str, Any]) -> float:
  """Of a judge's entry in `judges.json`; minus infinity with fewer than `MIN_GROUPS` groups."""
  interval = entry.get("mined", {}).get("weighted_accuracy_ci")
  return interval[0] if interval and _groups(entry) >= MIN_GROUPS else -math.inf


def _groups(entry: Mapping[str, Any]) -> int:
  """Of cases, that have pairs; older entries do not say it."""
  return entry.get("mined", {}).get("num_groups", MIN_GROUPS)


def best(table: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
  """Of `names`, the judge with the highest lower bound; of equals that with the highest figure.

  The best bound of several is not one of 95%: of three judges that know nothing and err apart, one
  is above 0.5 in 7% of draws, where one alone is in 2.5%.
  """

  def worth(name: str) -> tuple[float, float]:
    figure = table[name].get("mined", {}).get("weighted_accuracy")
    return lower_bound(table[name]), -math.inf if figure is None else figure

  return max(names, key=worth)


def used(table: Mapping[str, Mapping[str, Any]], name: str) -> str:
  """The judge that mines: `name`, or what `auto` took, by `judges.json`.

  Raises:
    FileError: if no entry is marked as used.
  """
  if name != judges.AUTO:
    return name
  found = [one for one, entry in table.items() if isinstance(entry, dict) and entry.get("used")]
  if not found:
    raise errors.FileError(
      "judges.json: no judge is marked as used, though config.judge.name is 'auto'; it is not what "
      "the program wrote; delete it and run the same command again"
    )
  return found[0]


def with_judge(config, name: str):
  """The config with `judge.name`; the same one if it has it."""
  if config.judge.name == name:
    return config
  config = copy.deepcopy(config)
  with config.unlocked():
    config.judge.name = name
  return config


def finding(
  table: Mapping[str, Mapping[str, Any]], name: str, *, min_accuracy: float, action: str
) -> str | None:
  """What is wrong with the judge `name`, in one line; None if it passes or the gate is off.

  A judge that is handed the truth as it is, `oracle`, passes.

  Args:
    table: `judges.json`, name -> entry with "mined".
    name: of the judge that mines.
    min_accuracy: `config.judge.gate.min_accuracy`.
    action: of ACTIONS.
  """
  entry = table[name]
  is_asked = action != "off" and name != "oracle" and min_accuracy > 0
  if not is_asked or lower_bound(entry) >= min_accuracy:
    return None
  if not is_measured(entry):
    return (
      f"how often the judge {name!r} is right is unknown: there are no validation cases to measure "
      "it by, so nothing was asked of it before training (config.judge.gate). A judge that is "
      "wrong more often than right makes a model worse; a few validation labels "
      "(config.data.num_val) would show it"
    )
  others = [
    other
    for other, found in table.items()
    if other != name and not judges.needs(other, "labels") and lower_bound(found) >= min_accuracy
  ]
  remedy = "no other judge of config.judge.compare passes"
  if _groups(entry) < MIN_GROUPS:
    remedy = (
      f"{_groups(entry)} groups of validation cases have such pairs, and fewer than {MIN_GROUPS} "
      "do not show it, whatever they say"
    )
  if others:
    other = best(table, others)
    remedy = f"the judge {other!r} passes with {shown(table[other]['mined'])}"
  return (
    f"the judge {name!r} has {shown(entry.get('mined', {}))} of the pairs right that mining makes "
    "on validation, by the gradient that each gets; config.judge.gate.min_accuracy="
    f"{min_accuracy:g} is asked of the lower bound, for below it training makes a model worse; "
    f"{remedy}"
  )


def refuses(
  table: Mapping[str, Mapping[str, Any]], name: str, found: str | None, action: str
) -> bool:
  """Whether a `finding` is more than a warning: action `refuse`, of a judge that was measured."""
  return bool(found) and action == "refuse" and is_measured(table[name])


def check(
  table: Mapping[str, Mapping[str, Any]], name: str, *, min_accuracy: float, action: str
) -> str | None:
  """`finding`, for who goes on in spite of it.

  Raises:
    MiningError: if `refuses` says so.
  """
  found = finding(table, name, min_accuracy=min_accuracy, action=action)
  if refuses(table, name, found, action):
    raise errors.MiningError(
      f"{found}. {REMEDY}, in a new --workdir (--config.base.workdir keeps the base); "
      "--config.judge.gate.action=warn goes on all the same"
    )
  return found


def check_foreground(found: np.ndarray, split: str) -> None:
  """Refuses a base that finds nothing, before its empty masks are mined.

  Args:
    found: bool[N], whether its mask of each image has any foreground.
    split: of the images, one of SPLITS.

  Raises:
    MiningError: with what to change.
  """
  if not found.any():
    name = {"val": "validation"}.get(split, split)
    raise errors.MiningError(
      f"the base segmenter finds no foreground in any of {len(found)} {name} images, so that "
      "pairs of its proposals would teach nothing: train it longer (config.base.num_steps), with "
      "another config.base.learning_rate, or on more labelled cases, in a new --workdir"
    )


def shown(mined: Mapping[str, Any]) -> str:
  """'0.640 (0.580 to 0.700)', as a share with its interval."""
  if mined.get("weighted_accuracy") is None:
    return "an unknown share"
  interval = mined["weighted_accuracy_ci"]
  text = f"{mined['weighted_accuracy']:.3f}"
  if not interval:
    return f"{text} (one group of cases gives no interval)"
  return f"{text} ({interval[0]:.3f} to {interval[1]:.3f})"
