"""Views that a network which was trained without flips has never seen."""

from __future__ import annotations

from rndpo_jax import config as config_lib
from rndpo_jax.checks import config_unread
from rndpo_jax.errors import ConfigError


def check_unflipped(config) -> None:
  """Refuses flips and quarter turns, in training, proposals and teachers.

  Args:
    config: of a phase, whose base was not trained on flips along every axis.

  Raises:
    ConfigError: naming all that flips or turns, and what to set.
  """
  readers, values = config_unread.readers(config), config_lib.leaves(config)
  still = {
    "augment.flip": 0.0,
    "augment.turn": 0.0,
    "finetune.teacher_views": "one",
    "proposals.mix": _without_flips(config.proposals.mix),
  }
  changes = {
    key: value
    for key, value in still.items()
    if values[key] != value and (config_unread.find(readers, key) or (True,))[0]
  }
  if changes:
    found = ", ".join(f"config.{key}={values[key]}" for key in changes)
    wanted = " ".join(f"--config.{key}={value}" for key, value in changes.items())
    raise ConfigError(
      "config.base.nnunet_folder: the network was not trained on flips along every axis, so "
      f"{found} would show it images that it does not know; set {wanted}"
    )


def _without_flips(mix: str) -> str:
  """A mix of proposals without the sampler `tta`; where it stood alone, `threshold` does."""
  parts = []
  for part in mix.split(","):
    names, colon, count = part.partition(":")
    every = [name.strip() for name in names.split("+")]
    left = "+".join([name for name in every if name != "tta"] or ["threshold"])
    parts.append(left + colon + count if "tta" in every else part)
  return ",".join(parts)
