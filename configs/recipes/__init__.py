"""Recipes: how fine-tuning uses pairs, labelled and unlabelled images; one file each.

  python -m launch.run --config=configs/ph2.py:weak_to_strong --config.data.root=DIR --workdir=OUT

A recipe is `apply(config)`, which sets keys on the config of a data set; the part of --config after
the colon names it. Without one a data set takes `DEFAULT`, the best in configs/results.
"""

import importlib
import pathlib

from rndpo_jax.errors import ConfigError

DEFAULT = "weak_to_strong_affine_rn_dpo"


def names():
  """All of them, by name."""
  files = pathlib.Path(__file__).parent.glob("*.py")
  return sorted(path.stem for path in files if path.stem != "__init__")


def apply(config, name):
  """Sets the keys of a recipe; "" leaves the config as it is.

  Raises:
    ConfigError: if there is no such recipe.
  """
  if not name:
    return
  if name not in names():
    raise ConfigError(f"--config: unknown recipe {name!r}; known: {', '.join(names())}")
  with config.unlocked():
    importlib.import_module(f"configs.recipes.{name}").apply(config)


def without_pairs(config):
  """Labelled images alone in the loss: what recipes without a judge start from."""
  config.finetune.terms.preference.weight = 0.0
  config.finetune.terms.labelled.weight = 1.0
  config.finetune.augment = False
  config.finetune.reference = "cached"
  config.finetune.num_steps = 400


def average(config, ema_decay=0.99):
  """A moving average of the policy: the teacher, and what is evaluated."""
  config.finetune.ema_decay = ema_decay
