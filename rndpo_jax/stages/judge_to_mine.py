"""The judge that mines, by what `judges.json` says of those that were measured."""

from __future__ import annotations

import numpy as np
from etils import epath

from rndpo_jax.mining import fused, judge_gate, judges
from rndpo_jax.mining.program import used_judges
from rndpo_jax.runtime import files, multihost, progress
from rndpo_jax.training import image_terms


def pass_gate(config, directory: epath.Path):
  """The config with the judge that mines, which `judges.json` says if it is auto.

  Raises:
    errors.MiningError: on process 0, if the judge does not pass `config.judge.gate`.
  """
  names = used_judges(config)

  def look() -> int:
    table = files.read_json(directory / "judges.json")
    name = judge_gate.used(table, config.judge.name)
    table = files.read_json(directory / "judges.json", **{name: dict})
    action = config.judge.gate.action if "pairs" in image_terms.reads_of(config) else "off"
    found = judge_gate.check(
      table, name, min_accuracy=config.judge.gate.min_accuracy, action=action
    )
    if config.judge.name == judges.AUTO:
      progress.say(f"judge auto: {name!r}, with {judge_gate.shown(table[name]['mined'])} right")
    if found:
      progress.say(f"warning: {found}")
    return names.index(name)

  return judge_gate.with_judge(config, names[multihost.broadcast(look)])


def read_log_odds(config, directory: epath.Path) -> np.ndarray | None:
  """The weights of the judge `fused`, f32[J], which measuring wrote; None for another judge."""
  if config.judge.name != judges.FUSED:
    return None
  found = files.read_json(directory / "judges.json", **{judges.FUSED: dict})[judges.FUSED]
  return np.array([found["weights"][name] for name in fused.members(config)], np.float32)
