"""The checks on `config.model`: its names, the grid that its levels need, and dropout."""

from __future__ import annotations

from rndpo_jax import config as config_lib
from rndpo_jax import models
from rndpo_jax.checks import config_unread
from rndpo_jax.errors import ConfigError

_CHOICES = {"norm": ("group", "instance"), "dtype": ("float32", "bfloat16")}


def check(config) -> None:
  """Checks the network alone.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  models.check_name(config.model.name)
  for key, allowed in _CHOICES.items():
    if config.model[key] not in allowed:
      raise ConfigError(
        f"config.model.{key}: found {config.model[key]!r}, expected one of {', '.join(allowed)}"
      )


def check_mix(config, mix) -> None:
  """Checks that proposals by dropout are asked of a network that has some.

  Raises:
    ConfigError: otherwise.
  """
  name = config.model.name
  if any("mc_dropout" in atoms for atoms, _ in mix) and not models.reads(name, "dropout"):
    raise ConfigError(
      f"config.proposals.mix: found 'mc_dropout', but config.model.name={name!r} has no dropout: "
      "its proposals would all be the same; take it out, as in 'base:1,tta+threshold:7'"
    )


def check_size(config) -> None:
  """Checks that every level has whole pixels, and that devices can share its rows.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  size = config_lib.input_size(config)
  key = "patch_size" if config.data.spacing else "size"
  steps = models.divisors(config.model, spatial_dims=len(size))
  has_architecture = models.has_architecture(config.model)
  made_of = "architecture" if has_architecture else f"depth={config.model.depth}"
  if any(s % step for s, step in zip(size, steps, strict=True)):
    multiples = f"multiples of {steps[0] if len(set(steps)) == 1 else steps}"
    raise ConfigError(
      f"config.data.{key}: found {size}, but config.model.{made_of} needs {multiples}"
    )
  deepest = size[0] // steps[0]
  if deepest % config.mesh.space:
    divisors = [n for n in range(1, deepest + 1) if deepest % n == 0]
    raise ConfigError(
      f"config.mesh.space: found {config.mesh.space}, but the deepest level of data.{key}={size} "
      f"at model.{made_of} has {deepest} rows; use {', '.join(map(str, divisors))}"
    )


def check_turns(config) -> None:
  """Checks that what is turned by a quarter is square, and that flipped views are trained on.

  Raises:
    ConfigError: otherwise.
  """
  size = config_lib.input_size(config)
  is_turned, _ = config_unread.find(config_unread.readers(config), "augment.turn")
  if is_turned and config.augment.turn > 0 and size[0] != size[1]:
    raise ConfigError(
      f"config.augment.turn: quarter turns need H equal to W, found size {size}; set it to 0"
    )
  views = config.finetune.teacher_views
  if views != "one" and not config.augment.flip:
    raise ConfigError(
      f"config.finetune.teacher_views: found {views!r}, but config.augment.flip is 0, so that "
      "flipped images are strange to the network; set it to one"
    )
  if views == "flips_turns" and size[0] != size[1]:
    raise ConfigError(
      f"config.finetune.teacher_views: quarter turns need H equal to W, found size {size}; set it "
      "to flips"
    )
