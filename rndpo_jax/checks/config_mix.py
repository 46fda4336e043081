"""The checks on `config.proposals.mix`: samplers that can act, and no mask twice."""

from __future__ import annotations

from rndpo_jax import config as config_lib
from rndpo_jax.checks import config_model
from rndpo_jax.errors import ConfigError
from rndpo_jax.mining import proposals, views


def check(config, mix) -> None:
  """Checks that each sampler can act, and that no proposal is bound to be given twice.

  Args:
    config: the whole config.
    mix: of `proposals.parse_mix`.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  values, table = config_lib.leaves(config), proposals.SAMPLERS
  size, grid = config_lib.input_size(config), "patch_size" if config.data.spacing else "size"
  num_views = len(views.symmetries(size))
  fixed = [frozenset(atoms) for atoms, _ in mix if not any(table[name].random for name in atoms)]
  config_model.check_mix(config, mix)
  for atoms, count in mix:
    name = "+".join(atoms)
    strengths = {sampler: table[sampler].strength for sampler in atoms if table[sampler].strength}
    for sampler, key in strengths.items():
      if values[key] == 0:
        raise ConfigError(
          f"config.{key}: it is 0, so {sampler!r} proposals would all be the same; set it above 0 "
          f"or take {sampler} out of config.proposals.mix"
        )
    if fixed.count(frozenset(atoms)) > 1:
      raise ConfigError(
        f"config.proposals.mix: {name!r} is there twice and draws nothing at random, so the second "
        "would repeat the first; make it one entry with the sum of the counts"
      )
    if "file" not in atoms:  # as many different masks as there are folders
      _check_repeats(config, atoms, count, bool(strengths) or frozenset(atoms) not in fixed)
    if "tta" in atoms and not strengths and count > num_views:
      raise ConfigError(
        f"config.proposals.mix: found {name}:{count}, but data.{grid}={size} has "
        f"{num_views} flips and turns besides the image itself, and more would repeat them; use "
        f"at most tta:{num_views}, or compose it, as in 'tta+threshold:{count}'"
      )


def _check_repeats(config, atoms, count: int, varies: bool) -> None:
  """Checks that an entry has as many members as it takes, and does not repeat one mask."""
  others = config.base.num_members - 1
  if "member" in atoms and not others:
    raise ConfigError(
      "config.base.num_members: found 1, but 'member' of config.proposals.mix is a proposal of "
      "another base model; set it to 2 or more"
    )
  distinct = others if "member" in atoms else 1
  if "tta" not in atoms and not varies and count > distinct:
    raise ConfigError(
      f"config.proposals.mix: found {'+'.join(atoms)}:{count}, which makes {distinct} different "
      f"masks; use a count of {distinct}, or compose it with 'threshold' or 'logit_noise'"
    )
