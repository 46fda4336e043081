"""The judge that mines, by what `judges.json` says of those that were measured."""

from __future__ import annotations

import ml_collections
import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax.mining import fused, judge_gate, judges
from rndpo_jax.mining.program import used_judges
from rndpo_jax.runtime import files, multihost, progress
from rndpo_jax.training import image_terms


def pass_gate(config, directory: epath.Path) -> tuple[ml_collections.ConfigDict, str | None]:
  """The config with the judge that mines, which `judges.json` says if it is auto.

  Returns:
    (config, None), or (config, why the phase is left out) if the judge does not pass
    `config.judge.gate` in a phase after the first; the reason itself is on process 0 alone.

  Raises:
    errors.MiningError: on process 0, if it does not in the first.
  """
  names, reasons = used_judges(config), []
  number = config_lib.num_phases(config)

  def look() -> int:
    table = files.read_json(directory / "judges.json")
    name = judge_gate.used(table, config.judge.name)
    table = files.read_json(directory / "judges.json", **{name: dict})
    gate = config.judge.gate.to_dict()
    if "pairs" not in image_terms.reads_of(config):
      gate["action"] = "off"
    found = judge_gate.finding(table, name, **gate)
    if number > 1 and judge_gate.refuses(table, name, found, gate["action"]):
      reasons.append(found)
      progress.say(f"warning: phase {number} is left out: {found}. {judge_gate.REMEDY}")
      return len(names) + names.index(name)
    judge_gate.check(table, name, **gate)
    if config.judge.name == judges.AUTO:
      progress.say(f"judge auto: {name!r}, with {judge_gate.shown(table[name]['mined'])} right")
    if found:
      progress.say(f"warning: {found}")
    return names.index(name)

  is_left_out, place = divmod(multihost.broadcast(look), len(names))
  config = judge_gate.with_judge(config, names[place])
  return config, "".join(reasons) or "the judge" if is_left_out else None


def read_log_odds(config, directory: epath.Path) -> np.ndarray | None:
  """The weights of the judge `fused`, f32[J], which measuring wrote; None for another judge."""
  if config.judge.name != judges.FUSED:
    return None
  found = files.read_json(directory / "judges.json", **{judges.FUSED: dict})[judges.FUSED]
  return np.array([found["weights"][name] for name in fused.members(config)], np.float32)
