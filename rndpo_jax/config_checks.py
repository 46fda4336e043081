"""The checks on a config, before anything runs: values that cannot work are refused by key."""

from __future__ import annotations

import functools
import math
import re

from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.losses import objectives
from rndpo_jax.mining import proposals


def validate(config) -> None:
  """Refuses values that cannot work, before anything runs.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  _check_choices(config)
  _check_ranges(config)
  _check_grid(config)
  mix = config_lib.parse_mix(config.proposals.mix)
  _check_mix(config, mix)
  count = sum(n for _, n in mix)
  rule, pairs = config.mine.rule, config.mine.pairs_per_image
  if rule != "random_pair" and pairs > count - 1:
    raise ConfigError(
      f"config.mine.pairs_per_image: found {pairs}, but rule {rule!r} gives at most K - 1 = "
      f"{count - 1} pairs of K = {count} proposals"
    )
  if rule == "top_vs_rest" and pairs != count - 1:
    raise ConfigError(
      f"config.mine.pairs_per_image: rule 'top_vs_rest' gives K - 1 = {count - 1} pairs an "
      f"image, found {pairs}; set it to {count - 1}"
    )
  if pairs > count * (count - 1) // 2:
    raise ConfigError(
      f"config.mine.pairs_per_image: found {pairs}, but K = {count} proposals make only "
      f"{count * (count - 1) // 2} pairs"
    )
  _check_objective(config)
  if config.finetune.augment and config.finetune.reference == "cached":
    raise ConfigError(
      "config.finetune.reference: augmented images need an 'online' reference (cached margins "
      "belong to the image as it was mined); set it, or set config.finetune.augment=False"
    )
  noisy = config.judge.flip_rate > 0 or config.judge.noise_level > 0
  if noisy != (config.judge.name == "noisy_oracle"):
    raise ConfigError(
      f"config.judge: name is {config.judge.name!r} with flip_rate={config.judge.flip_rate} and "
      f"noise_level={config.judge.noise_level}; the two are read by 'noisy_oracle' alone, which "
      "needs one of them above 0"
    )
  for key in ("case_pattern", "group_pattern"):
    _check_pattern(key, config.data[key])


def _check_objective(config) -> None:
  """Refuses options that the objective does not read, and those it misses."""
  options, defaults = config.finetune, config_lib.base_config().finetune
  names = _objective_names(options)
  power, smoothed = (
    options.normalization == "power",
    objectives.readers(options.objective, "label_smoothing"),
  )
  unread = {
    "normalization": options.objective == "rn_dpo" or len(names) > 1,
    "objective_weights": len(names) == 1,
    "power_exponent": not power,
    "power_floor": not power,
    "label_smoothing": not smoothed,
    "discopop_temperature": not objectives.readers(options.objective, "temperature"),
    "anchor_weight": options.anchor == "none",
  }
  for key, is_unread in unread.items():
    if is_unread and options[key] != defaults[key]:
      raise ConfigError(
        f"config.finetune.{key}: found {options[key]!r}, which nothing reads with objective "
        f"{options.objective!r}, normalization {options.normalization!r} and anchor "
        f"{options.anchor!r}; leave it at {defaults[key]!r}"
      )
  if smoothed and not 0 < options.label_smoothing < 0.5:
    raise ConfigError(
      f"config.finetune.label_smoothing: found {options.label_smoothing}, but objective "
      f"{smoothed[0]!r} needs it above 0 and below 0.5"
    )
  if options.anchor != "none" and not options.anchor_weight > 0:
    raise ConfigError(
      f"config.finetune.anchor_weight: found {options.anchor_weight}, but anchor "
      f"{options.anchor!r} needs it above 0"
    )
  if options.accumulate_steps > 1:
    whole = [f"objective {name}" for name in objectives.readers(options.objective, "batch")]
    whole += ["anchor labelled"] if options.anchor == "labelled" else []
    if whole:
      raise ConfigError(
        f"config.finetune.accumulate_steps: found {options.accumulate_steps}, but {whole[0]} reads "
        "the whole batch; set it to 1"
      )
  wrong = [k for k in options.region_classes if not 0 <= k < (config.data.num_classes or 256)]
  if wrong:
    raise ConfigError(
      f"config.finetune.region_classes: found class id {wrong[0]}, expected ids from 0 to "
      f"data.num_classes - 1"
    )


def _objective_names(options) -> tuple[str, ...]:
  """The objectives of `config.finetune`, with as many weights or none."""
  try:
    names = objectives.parse(options.objective)
  except ValueError as error:
    raise ConfigError(f"config.finetune.objective: {error}") from None
  weights = options.objective_weights
  if len(names) > 1 and weights and len(weights) != len(names):
    raise ConfigError(
      f"config.finetune.objective_weights: found {tuple(weights)}, expected {len(names)} for "
      f"objective {options.objective!r}, or () for ones"
    )
  wrong = [w for w in weights if not isinstance(w, (int, float)) or not 0 < w < math.inf]
  if wrong:
    raise ConfigError(
      f"config.finetune.objective_weights: found {wrong[0]!r}, expected finite values above 0"
    )
  return names


def _check_choices(config) -> None:
  choices = {
    "data.source": config_lib.SOURCES,
    "data.spatial_dims": (2, 3),
    "data.normalization": ("zscore", "minmax"),
    "model.name": ("unet",),
    "model.norm": ("group", "instance"),
    "model.dtype": ("float32", "bfloat16"),
    "base.select": ("best", "last"),
    "mine.rule": config_lib.RULES,
    "finetune.schedule": ("cosine", "constant"),
    "finetune.reference": ("cached", "online", "none"),
    "finetune.normalization": ("", "none", "region", "power"),
    "finetune.region_unit": ("pixel", "mm"),
    "finetune.pair_weight": ("none", "score_gap", "reliability"),
    "finetune.anchor": ("none", "chosen", "labelled"),
  }
  for key, allowed in choices.items():
    section, name = key.split(".")
    if config[section][name] not in allowed:
      raise ConfigError(
        f"config.{key}: found {config[section][name]!r}, expected one of "
        f"{', '.join(map(str, allowed))}"
      )
  if "noisy_oracle" in config.judge.compare:
    raise ConfigError("config.judge.compare: 'noisy_oracle' is measured only as judge.name")
  for name in (config.judge.name, *config.judge.compare):
    if name not in config_lib.JUDGES and ":" not in name:
      raise ConfigError(
        f"config.judge: unknown judge {name!r}; known: {', '.join(config_lib.JUDGES)}, or a "
        "function of your own as package.module:function"
      )
  for name in config.evaluate.metrics:
    if name not in config_lib.METRICS:
      raise ConfigError(
        f"config.evaluate.metrics: unknown metric {name!r}; known: {', '.join(config_lib.METRICS)}"
      )
  if "dice" not in config.evaluate.metrics:
    raise ConfigError("config.evaluate.metrics: 'dice' is needed by the curve; add it")


_POSITIVE = (
  "mesh.fsdp", "mesh.space", "mesh.fsdp_min_size",
  "base.keep_checkpoints", "finetune.keep_checkpoints", "base.accumulate_steps",
  "finetune.accumulate_steps",
  "model.width", "model.depth", "model.max_width", "proposals.temperature_low",
  "proposals.temperature_high", "base.num_members", "base.num_steps", "base.batch_size",
  "base.learning_rate", "base.log_every_steps", "base.eval_every_steps", "mine.pairs_per_image",
  "mine.min_region_size", "mine.batch_size", "mine.num_shards", "finetune.beta",
  "finetune.power_floor", "finetune.discopop_temperature",
  "finetune.num_steps", "finetune.batch_size", "finetune.learning_rate",
  "finetune.log_every_steps", "finetune.eval_every_steps", "evaluate.batch_size",
  "judge.num_bootstrap", "judge.learned.width", "judge.learned.num_steps",
  "judge.learned.batch_size", "judge.learned.masks_per_image", "judge.learned.learning_rate",
  "data.num_labelled", "data.num_val", "data.num_test",
)  # fmt: skip
_NOT_NEGATIVE = (
  "model.lanes",
  "base.checkpoint_minutes", "finetune.checkpoint_minutes",
  "data.num_workers", "data.prefetch", "base.warmup_steps", "base.weight_decay", "base.clip_norm",
  "base.dice_weight", "proposals.noise_scale", "proposals.noise_smoothing",
  "proposals.threshold_shift", "judge.border", "judge.noise_level", "mine.min_score_gap",
  "mine.max_region_size", "finetune.weight_decay", "finetune.clip_norm", "finetune.power_exponent",
  "finetune.label_smoothing", "finetune.anchor_weight",
  "evaluate.nsd_tolerance_mm", "augment.intensity_scale", "augment.gamma_scale",
  "augment.noise_scale", "augment.elastic_scale", "augment.elastic_smoothing",
)  # fmt: skip
_FRACTIONS = (
  "finetune.ema_decay",
  "model.dropout", "judge.flip_rate", "augment.flip", "augment.turn", "augment.intensity",
  "augment.gamma", "augment.noise", "augment.elastic",
)  # fmt: skip
# JAX takes the last 32 bits of a seed, so that a larger one would be another seed's twin.
_SEEDS = ("seed", "data.split_seed", "data.phantom.seed")
_MAX_SEED = 2**32 - 1


def _check_ranges(config) -> None:
  for key in _POSITIVE:
    value = _value(config, key)
    if not value > 0 or not math.isfinite(value):
      raise ConfigError(f"config.{key}: found {value}, expected a finite value above 0")
  for key in _NOT_NEGATIVE:
    section, name = key.split(".")
    if not config[section][name] >= 0 or not math.isfinite(config[section][name]):
      raise ConfigError(f"config.{key}: found {config[section][name]}, expected 0 or more")
  for key in _FRACTIONS:
    section, name = key.split(".")
    if not 0 <= config[section][name] <= 1:
      raise ConfigError(f"config.{key}: found {config[section][name]}, expected 0..1")
  for key in _SEEDS:
    if not 0 <= _value(config, key) <= _MAX_SEED:
      raise ConfigError(f"config.{key}: found {_value(config, key)}, expected 0..{_MAX_SEED}")
  if config.finetune.ema_decay == 1:
    raise ConfigError("config.finetune.ema_decay: found 1, an average that never moves")
  if config.data.num_unlabelled == 0 or config.data.num_unlabelled < -1:
    raise ConfigError(
      f"config.data.num_unlabelled: found {config.data.num_unlabelled}, expected a count, or -1 "
      "for all that are left"
    )
  if 0 < config.mine.max_region_size < config.mine.min_region_size:
    raise ConfigError(
      f"config.mine.max_region_size: found {config.mine.max_region_size}, below min_region_size="
      f"{config.mine.min_region_size}; no pair could pass"
    )
  if config.data.num_classes != 0 and not 2 <= config.data.num_classes <= 256:
    raise ConfigError(f"config.data.num_classes: found {config.data.num_classes}, expected 2..256")


def _value(config, key: str):
  return functools.reduce(lambda section, name: section[name], key.split("."), config)


# What makes a sampler act, and so proposals of one view or one network differ.
_STRENGTH = {
  "mc_dropout": "model.dropout",
  "logit_noise": "proposals.noise_scale",
  "threshold": "proposals.threshold_shift",
}
_RANDOM = {"mc_dropout", "logit_noise"}


def _check_mix(config, mix) -> None:
  """Refuses a mix that is bound to give the same proposal twice."""
  num_views = len(proposals.views(tuple(config.data.size)))
  fixed = [frozenset(atoms) for atoms, _ in mix if not _RANDOM & set(atoms)]
  for atoms, count in mix:
    name = "+".join(atoms)
    for sampler in _STRENGTH.keys() & set(atoms):
      section, key = _STRENGTH[sampler].split(".")
      if config[section][key] == 0:
        raise ConfigError(
          f"config.{section}.{key}: it is 0, so {sampler!r} proposals would all be the same; set "
          f"it above 0 or take {sampler} out of config.proposals.mix"
        )
    if fixed.count(frozenset(atoms)) > 1:
      raise ConfigError(
        f"config.proposals.mix: {name!r} stands twice and draws nothing at random, so the second "
        "would repeat the first; make it one entry with the sum of the counts"
      )
    if "tta" in atoms and not _STRENGTH.keys() & set(atoms) and count > num_views:
      raise ConfigError(
        f"config.proposals.mix: found {name}:{count}, but data.size={tuple(config.data.size)} has "
        f"{num_views} flips and turns besides the image itself, and more would repeat them; use "
        f"at most tta:{num_views}, or compose it, as in 'tta+threshold:{count}'"
      )


def _check_grid(config) -> None:
  size, dims = tuple(config.data.size), config.data.spatial_dims
  if len(size) != dims:
    raise ConfigError(
      f"config.data.size: found {size}, expected {dims} entries as config.data.spatial_dims={dims}"
    )
  if config.data.crop and len(config.data.crop) != dims:
    raise ConfigError(f"config.data.crop: found {tuple(config.data.crop)}, expected {dims} entries")
  if min((*size, *config.data.crop)) < 1:
    raise ConfigError(
      f"config.data.size: found {size} with crop {tuple(config.data.crop)}, expected values above 0"
    )
  step = 2 ** (config.model.depth - 1)
  if any(s % step for s in size):
    raise ConfigError(
      f"config.data.size: found {size}, but config.model.depth={config.model.depth} needs "
      f"multiples of {step}"
    )
  deepest = size[0] // step
  if deepest % config.mesh.space:
    divisors = [n for n in range(1, deepest + 1) if deepest % n == 0]
    raise ConfigError(
      f"config.mesh.space: found {config.mesh.space}, but the deepest level of data.size={size} at "
      f"model.depth={config.model.depth} has {deepest} rows; use {', '.join(map(str, divisors))}"
    )
  if config.augment.turn > 0 and size[0] != size[1]:
    raise ConfigError(
      f"config.augment.turn: quarter turns need H equal to W, found size {size}; set it to 0"
    )


def _check_pattern(key: str, pattern: str) -> None:
  if not pattern:
    return
  try:
    groups = re.compile(pattern).groups
  except re.error as error:
    raise ConfigError(f"config.data.{key}: {pattern!r} is no regular expression: {error}") from None
  if groups != 1:
    raise ConfigError(
      f"config.data.{key}: {pattern!r} has {groups} groups, expected 1, as in '(case\\d+)_z\\d+'"
    )
