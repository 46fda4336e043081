"""The checks on proposals and preferences that come from files; each raises ConfigError."""

from __future__ import annotations

from rndpo_jax import config as config_lib
from rndpo_jax import workdir
from rndpo_jax.errors import ConfigError
from rndpo_jax.mining import judges


def check(config, mix) -> None:
  """Checks that the keys on files fit those on proposals, judges and terms.

  Args:
    config: of a phase.
    mix: from `proposals.parse_mix`.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  for key in ("proposals", "preferences"):
    workdir.check_path(f"config.data.{key}", config.data[key])
  from_files = any("file" in atoms for atoms, _ in mix)
  if config.data.preferences:
    _check_preferences(config)
    return
  names = (config.judge.name, *config.judge.compare)
  if from_files and not config.data.proposals:
    raise ConfigError(
      "config.data.proposals: not set, but config.proposals.mix takes 'file'; give the folder of "
      "NAME/ID.png, or take 'file' out of the mix"
    )
  if judges.FILE in names and not from_files:
    raise ConfigError(
      f"config.judge: {judges.FILE!r} scores proposals from files, and config.proposals.mix has "
      "none; set config.data.proposals and a mix such as 'file:4', or take another judge"
    )
  own = [name for name in names if name in judges.JUDGES and judges.JUDGES[name].reads_own_probs]
  if from_files and own:
    raise ConfigError(
      f"config.judge: {own[0]!r} looks at the probabilities of each proposal, and masks from files "
      "have none; take it out of judge.name and judge.compare"
    )


def _check_preferences(config) -> None:
  """Checks that no term and no weight reads what pairs of readers do not have."""
  terms, options = config_lib.active_terms(config), config.finetune
  if "consensus" in terms:
    raise ConfigError(
      "config.finetune.terms.consensus: it learns the mean of mined proposals, and pairs of "
      "config.data.preferences have none; set its weight to 0"
    )
  for name, values in terms.items():
    if values.get("image_temperature"):
      raise ConfigError(
        f"config.finetune.terms.{name}.image_temperature: found {values['image_temperature']}, but "
        "pairs of config.data.preferences have no scores; leave it out"
      )
  for key in ("pair_weight", "pair_smoothing", "min_pair_probability"):
    if options[key] in ("none", 0):
      continue
    raise ConfigError(
      f"config.finetune.{key}: found {options[key]!r}, but pairs of config.data.preferences have "
      "no scores; leave it out"
    )
