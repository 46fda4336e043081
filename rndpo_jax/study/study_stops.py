"""Where a training might have been stopped, and what each rule would have delivered; pure.

By validation, by figures that need no labels (`evaluation.label_free`), and by the test split
itself, the oracle's stop: no rule that may be used delivers more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rndpo_jax import config as config_lib
from rndpo_jax.evaluation import label_free

ORACLE = "best on test (oracle)"
_MAX_KL = "evaluate.delivered_max_kl"
_FIGURES = ("kl", "dice_to_base", "agreement", "labelled_dice")


def stops(record: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
  """Rule, test Dice of its checkpoint, whether that is the base; empty where figures are missing.

  Args:
    record: of a cell that is no cell of tuning.
  """
  curve = record["curve"]
  delivered = (record.get("delivered") or {}).get("step")
  if delivered is None or not all(name in curve for name in ("test", *_FIGURES)):
    return []
  names, steps = ("step", *_FIGURES), curve["step"]
  columns = (curve[name] for name in names)
  points = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
  test = dict(zip(steps, curve["test"], strict=True))
  max_kl = record["config"].get(_MAX_KL, config_lib.leaves(config_lib.base_config())[_MAX_KL])
  free = label_free.stops(
    points, [{"step": step, "test_dice": dice} for step, dice in test.items()], max_kl=max_kl
  )
  taken = [
    ("last checkpoint", steps[-1]),
    ("as delivered", delivered),
    (f"label-free, KL below {max_kl:g}", free["chosen"]["step"]),
    *((f"KL below {stop['max_kl']:g} alone", stop["step"]) for stop in free["by_kl"]),
    (ORACLE, free["oracle"]["step"]),
  ]
  return [(rule, test[step], step == steps[0]) for rule, step in taken]
