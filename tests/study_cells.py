"""Studies for the tests: two recipes on the tiny phantom, and records made by hand."""

import os
import pathlib

import numpy as np

from configs import recipes
from rndpo_jax.study import (
  grid,
)

ROOT = pathlib.Path(__file__).parent.parent


TINY = os.fspath(pathlib.Path(__file__).parent / "tiny_config.py")


PH2 = os.fspath(ROOT / "configs" / "ph2.py")


RN, DPO = "rn_dpo", "dpo"


def study(**changes):
  """Two recipes and two seeds on the tiny phantom."""
  return {
    "data": {"tiny": {"config": TINY, "set": {"data.num_val": 3}}},
    "seeds": (0, 1),
    "set": {"finetune.batch_size": 8, "finetune.num_steps": 8},
    "arms": [{"recipes": (RN, DPO)}],
    **changes,
  }


def expand(content, **options):
  return grid.expand(content, recipes.apply, options.pop("roots", {}), **options)


def record(recipe, draw, seed, sustained, base=(0.5, 0.7), **more):
  axes = more.pop("axes", {})
  test = float(np.mean(sustained))
  return {
    "key": f"{recipe}-{axes}-{draw}-{seed}", "data": "tiny", "budget": 4, "draw": draw,
    "seed": seed, "recipe": recipe, "axes": axes, "tuning": False, "versions": {"jax": "0"},
    "device": "cpu", "seconds": {"mine": 1.0, "finetune": 3.0, "prepare": 1.0, "base": 4.0},
    "steps": 4, "base": {"val": 0.6, "test": float(np.mean(base))},
    "mb": {"base": 1.0, "cell": 2.0}, "curve": {"step": [0, 4], "test": [0.6, test]},
    "test": {"last": test, "last_third_mean": test, "peak": test, "drop": 0.0},
    "judge": {"name": "agreement", "pair_accuracy": 0.65}, "pairs": {"count": 9},
    "cases": {"ids": f"draw{draw}", "patient": [0, 1], "base": list(base), "last": list(sustained),
              "sustained": list(sustained)},
    **more,
  }  # fmt: skip
