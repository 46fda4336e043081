"""What each value of a config may be: its type, and the range of a number."""

from __future__ import annotations

import math
from typing import NamedTuple

from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.types import IGNORED


class Range(NamedTuple):
  """Values that a number may have; `above` leaves out `low` itself, `below` leaves out `high`."""

  low: float
  high: float = math.inf
  above: bool = False
  below: bool = False

  def holds(self, value: float) -> bool:
    low = value > self.low if self.above else value >= self.low
    high = value < self.high if self.below or self.high == math.inf else value <= self.high
    return low and high

  def __str__(self) -> str:
    if self.high == math.inf:
      low = f"above {self.low}" if self.above else f"of {self.low} or more"
      return f"a finite value {low}"
    open_ends = f", above {self.low}" * self.above + f", below {self.high}" * self.below
    return f"{self.low}..{self.high}{open_ends}"


# JAX takes the last 32 bits of a seed, so that a larger one would be another seed's twin.
_SEED = Range(0, 2**32 - 1)
_ABOVE_0, _FROM_0 = Range(0, above=True), Range(0)
_SHARE, _RATE = Range(0, 1), Range(0, 1, below=True)
# Upper ends keep typing errors from taking all memory before anything says that they do not fit.
_STEPS, _BATCH, _WIDTH = Range(1, 10**7), Range(1, 2**16), Range(1, 2**14)
_PIXELS, _KEPT = Range(0, 2**31 - 1), Range(1, 1000)
RANGES = {
  "seed": _SEED,
  "data.num_labelled": Range(1), "data.num_val": Range(0), "data.num_test": Range(0),
  "data.num_unlabelled": Range(-1), "data.split_fold": Range(-1), "data.split_seed": _SEED,
  "data.num_workers": Range(0, 1024), "data.prefetch": Range(0, 1024),
  "data.spatial_dims": Range(2, 3), "data.num_classes": Range(0, IGNORED),
  "data.phantom.num_cases": Range(1, 10**7), "data.phantom.contrast": _FROM_0,
  "data.phantom.noise": _FROM_0, "data.phantom.seed": _SEED,
  "augment.flip": _SHARE, "augment.turn": _SHARE, "augment.intensity": _SHARE,
  "augment.gamma": _SHARE, "augment.noise": _SHARE, "augment.elastic": _SHARE,
  "augment.intensity_scale": _FROM_0, "augment.gamma_scale": _FROM_0,
  "augment.noise_scale": _FROM_0, "augment.elastic_scale": _FROM_0,
  "augment.elastic_smoothing": _FROM_0, "augment.affine": _SHARE,
  "augment.affine_degrees": Range(0, 180), "augment.affine_zoom": Range(0, 3),
  "strong.intensity": _SHARE, "strong.gamma": _SHARE, "strong.noise": _SHARE,
  "strong.intensity_scale": _FROM_0, "strong.gamma_scale": _FROM_0, "strong.noise_scale": _FROM_0,
  "model.width": _WIDTH, "model.depth": Range(1, 16), "model.max_width": _WIDTH,
  "model.dropout": _RATE, "model.lanes": Range(0, 4096),
  "mesh.fsdp": Range(1, 2**16), "mesh.space": Range(1, 2**16), "mesh.fsdp_min_size": Range(1),
  "base.num_members": Range(1, 100), "base.member_labels": Range(0, 1, above=True),
  "base.num_steps": _STEPS, "base.batch_size": _BATCH,
  "base.accumulate_steps": _BATCH, "base.learning_rate": _ABOVE_0,
  "base.warmup_steps": Range(0, 10**7), "base.weight_decay": _FROM_0, "base.clip_norm": _FROM_0,
  "base.dice_weight": _FROM_0, "base.log_every_steps": _STEPS, "base.eval_every_steps": _STEPS,
  "base.keep_checkpoints": _KEPT, "base.checkpoint_minutes": _FROM_0,
  "proposals.noise_scale": _FROM_0, "proposals.noise_smoothing": _FROM_0,
  "proposals.temperature_low": _ABOVE_0, "proposals.temperature_high": _ABOVE_0,
  "proposals.threshold_shift": _FROM_0, "proposals.zoom": Range(1, 4, above=True),
  "judge.flip_rate": _SHARE, "judge.noise_level": _FROM_0, "judge.border": Range(0, 256),
  "judge.num_bootstrap": Range(1, 10**5), "judge.gate.min_accuracy": _SHARE,
  "judge.learned.width": _WIDTH, "judge.learned.num_steps": _STEPS,
  "judge.learned.batch_size": _BATCH, "judge.learned.masks_per_image": Range(1, 1024),
  "judge.learned.learning_rate": _ABOVE_0,
  "mine.pairs_per_image": Range(1), "mine.min_score_gap": _FROM_0,
  "mine.min_region_size": Range(1, 2**31 - 1), "mine.max_region_size": _PIXELS,
  "mine.batch_size": _BATCH, "mine.num_shards": Range(1, 10**5 - 1),
  "finetune.beta": _ABOVE_0, "finetune.power_exponent": _FROM_0, "finetune.power_floor": _ABOVE_0,
  "finetune.label_smoothing": _FROM_0, "finetune.discopop_temperature": _ABOVE_0,
  "finetune.num_steps": _STEPS, "finetune.batch_size": _BATCH,
  "finetune.labelled_batch_size": _BATCH, "finetune.unlabelled_batch_size": _BATCH,
  "finetune.ramp_steps": Range(0, 10**7), "finetune.rounds": Range(1, 100),
  "finetune.min_pair_probability": _RATE, "finetune.reliable_share": Range(0, 1, above=True),
  **{f"finetune.terms.{name}.weight": _FROM_0 for name in config_lib.base_config().finetune.terms},
  "finetune.terms.consensus.temperature": _FROM_0,
  "finetune.terms.consensus.image_temperature": _FROM_0,
  "finetune.terms.chosen.image_temperature": _FROM_0,
  "finetune.terms.pseudo.threshold": _RATE, "finetune.terms.weak_to_strong.threshold": _RATE,
  "finetune.terms.weak_to_strong.cutmix": _SHARE, "finetune.terms.consistency.max_entropy": _SHARE,
  "finetune.terms.consistency.passes": Range(1, 64),
  "finetune.terms.copy_paste.unlabelled_weight": _FROM_0,
  "finetune.terms.online.num_proposals": Range(2, 64),
  "finetune.terms.online.noise_scale": _FROM_0, "finetune.terms.online.noise_smoothing": _FROM_0,
  "finetune.terms.online.threshold_shift": _FROM_0,
  "finetune.accumulate_steps": _BATCH, "finetune.learning_rate": _ABOVE_0,
  "finetune.weight_decay": _FROM_0, "finetune.clip_norm": _FROM_0, "finetune.ema_decay": _RATE,
  "finetune.log_every_steps": _STEPS, "finetune.eval_every_steps": _STEPS,
  "finetune.keep_checkpoints": _KEPT, "finetune.checkpoint_minutes": _FROM_0,
  "evaluate.batch_size": _BATCH, "evaluate.delivered_min_probability": _SHARE,
  "evaluate.delivered_max_kl": _FROM_0,
  "evaluate.nsd_tolerance_mm": _FROM_0,
}  # fmt: skip
# What the entries of a tuple are.
ITEMS = {
  "data.size": int, "data.crop": int, "data.phantom.size": int, "data.patch_size": int,
  "data.spacing": float, "data.schemes": str,
  "finetune.region_classes": int, "finetune.objective_weights": float,
  "judge.compare": str, "evaluate.metrics": str, "phases": dict,
}  # fmt: skip
_KINDS = {
  int: ("whole numbers", {int}), float: ("numbers", {int, float}), str: ("names", {str}),
  dict: ("dictionaries of keys and values", {dict}),
}  # fmt: skip


def check_types(config) -> None:
  """Checks what ml_collections lets pass: None, and the entries of tuples.

  Raises:
    ConfigError: naming the key, its value and the type.
  """
  defaults = config_lib.leaves(config_lib.base_config())
  for key, value in config_lib.leaves(config).items():
    if key not in defaults:
      raise ConfigError(f"config.{key}: unknown key; see rndpo_jax/config.py")
    wanted = type(defaults[key])
    if wanted is tuple:
      kind, types = _KINDS[ITEMS[key]]
      if not isinstance(value, (tuple, list)) or any(type(entry) not in types for entry in value):
        raise ConfigError(f"config.{key}: found {value!r}, expected {kind}, as in {_example(key)}")
    elif type(value) is not wanted:
      raise ConfigError(
        f"config.{key}: found {value!r}, expected {wanted.__name__}, as in {defaults[key]!r}"
      )


def _example(key: str) -> str:
  return repr(config_lib.leaves(config_lib.base_config())[key] or (1, 2))


def check_ranges(config) -> None:
  """Checks every number.

  Raises:
    ConfigError: naming the key, its value and the range.
  """
  values = config_lib.leaves(config)
  for key, allowed in RANGES.items():
    if not allowed.holds(values[key]):
      raise ConfigError(f"config.{key}: found {values[key]}, expected {allowed}")
