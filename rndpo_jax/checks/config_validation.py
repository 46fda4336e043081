"""The checks on a config whose data have no validation cases; each raises ConfigError."""

from __future__ import annotations

from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.mining import judges, pair_value
from rndpo_jax.training import image_terms


def may_have_cases(config) -> bool:
  """Whether there may be validation cases; for sure only where the splits are known."""
  return config.data.num_val > 0 or bool(config.data.split_file)


def check_without_cases(config) -> None:
  """Checks that nothing asks how often a judge is right, which no validation case would tell.

  Args:
    config: of a job or of a phase; every phase up to its last one is looked at.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  for own in config_lib.every_phase(config):
    _check_phase(own)


def _check_phase(config) -> None:
  if config.data.preferences or "pairs" not in image_terms.reads_of(config):
    return
  options = config.finetune
  remedy = "and there are no validation cases to measure that by (config.data.num_val)"
  for key, names in (("name", (config.judge.name,)), ("compare", config.judge.compare)):
    for name in {judges.AUTO, judges.FUSED}.intersection(names):
      raise ConfigError(
        f"config.judge.{key}: found {name!r}, which goes by how often judges are right, {remedy}; "
        "leave it out, and name one judge, such as 'agreement'"
      )
  if pair_value.reads_calibration(options.pair_weight, options.min_pair_probability):
    key = "min_pair_probability" if options.min_pair_probability else "pair_weight"
    raise ConfigError(
      f"config.finetune.{key}: found {options[key]!r}, which goes by how often the judge is right, "
      f"{remedy}; leave it out"
    )
  if options.pair_smoothing == "reliability":
    raise ConfigError(
      "config.finetune.pair_smoothing: found 'reliability', which goes by how often the judge is "
      f"right, {remedy}; leave it out"
    )
