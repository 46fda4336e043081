"""Recipes of fine-tuning: one file each, with `apply(config)`, which sets keys of a config."""

import importlib
import pathlib

from rndpo_jax.errors import ConfigError


def apply(config, name):
  """Sets what the recipe `name` says on the config of a data set."""
  known = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("[!_]*.py"))
  if name not in known:
    raise ConfigError(f"recipe: unknown recipe {name!r}; known: {', '.join(known)}")
  importlib.import_module(f"configs.recipes.{name}").apply(config)
