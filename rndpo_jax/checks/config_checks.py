"""The checks on a config, before anything runs; each raises ConfigError naming the key."""

from __future__ import annotations

import math
import re

from rndpo_jax import config as config_lib
from rndpo_jax import workdir
from rndpo_jax.checks import (
  config_files,
  config_geometry,
  config_mix,
  config_model,
  config_ranges,
  config_terms,
  config_unread,
  config_validation,
)
from rndpo_jax.data import sources
from rndpo_jax.errors import ConfigError, JudgeError
from rndpo_jax.evaluation import metrics
from rndpo_jax.losses import objectives
from rndpo_jax.mining import fused, judge_gate, judges, pair_rules, proposals
from rndpo_jax.models import mirroring
from rndpo_jax.training import image_terms


def validate(config) -> None:
  """Checks every value, and that every key that was changed is read.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  config_ranges.check_types(config)
  config_ranges.check_ranges(config)
  phases = config_lib.every_phase(config)
  for own in phases:
    _validate_phase(own)
  _check_learned(phases)
  if not config_validation.may_have_cases(config):
    config_validation.check_without_cases(config)
  config_unread.check(phases)


def _validate_phase(config) -> None:
  config_ranges.check_types(config)
  config_ranges.check_ranges(config)
  config_model.check(config)
  _check_choices(config)
  _check_counts(config)
  config_geometry.check(config)
  mix = proposals.parse_mix(config.proposals.mix)
  config_mix.check(config, mix)
  config_files.check(config, mix)
  if not config.data.preferences:
    _check_pairs(config, mix)
  _check_objective(config)
  config_terms.check(config)
  if config.judge.name == "noisy_oracle" and not config.judge.flip_rate + config.judge.noise_level:
    raise ConfigError(
      "config.judge: 'noisy_oracle' needs flip_rate or noise_level above 0; the judge without "
      "either is 'oracle'"
    )
  workdir.check_path("config.base.workdir", config.base.workdir)
  workdir.check_path("config.data.split_file", config.data.split_file)
  config_model.check_turns(config)
  for key in ("case_pattern", "group_pattern"):
    _check_pattern(key, config.data[key])


def _check_learned(phases) -> None:
  """Checks that the phases that mine with the learned judge train the same one: they share it."""
  mining = [own for own in phases[:-1] if "pairs" in image_terms.reads_of(own)] + phases[-1:]
  users = [own for own in mining if "learned" in (own.judge.name, *own.judge.compare)]
  shared = [config_lib.leaves(own) for own in users]
  for key in shared[0] if shared else ():
    found = [values[key] for values in shared if values[key] != shared[0][key]]
    if found and key.startswith(("judge.learned.", "augment.")):
      raise ConfigError(
        f"config.phases: found {key} {shared[0][key]!r} and {found[0]!r}, but the phases share one "
        "learned judge, which reads it; give them the same value"
      )


def _check_pairs(config, mix) -> None:
  """Checks that the rule can give so many pairs of the K proposals of `mix`."""
  rule, pairs = config.mine.rule, config.mine.pairs_per_image
  count = sum(n for _, n in mix)
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
  if rule == "top_vs_base" and pairs != 1:
    raise ConfigError(
      f"config.mine.pairs_per_image: rule 'top_vs_base' gives one pair an image, found {pairs}; "
      "set it to 1"
    )
  if rule == "top_vs_base" and list(mix[0][0]) != ["base"]:
    raise ConfigError(
      f"config.proposals.mix: found {config.proposals.mix!r}, but config.mine.rule='top_vs_base' "
      "takes the first proposal for the model's own mask; let it begin with base:1"
    )
  if pairs > count * (count - 1) // 2:
    raise ConfigError(
      f"config.mine.pairs_per_image: found {pairs}, but K = {count} proposals make only "
      f"{count * (count - 1) // 2} pairs"
    )


def _check_objective(config) -> None:
  """Checks that the objective has the options it needs."""
  options = config.finetune
  _check_objective_names(options)
  smoothed = objectives.readers(options.objective, "label_smoothing")
  if smoothed and options.pair_smoothing == "none" and not 0 < options.label_smoothing < 0.5:
    raise ConfigError(
      f"config.finetune.label_smoothing: found {options.label_smoothing}, but objective "
      f"{smoothed[0]!r} needs it above 0 and below 0.5"
    )
  batch = objectives.readers(options.objective, "batch")
  if options.accumulate_steps > 1 and batch:
    raise ConfigError(
      f"config.finetune.accumulate_steps: found {options.accumulate_steps}, but objective "
      f"{batch[0]} reads the whole batch; set it to 1"
    )
  wrong = [k for k in options.region_classes if not 0 <= k < (config.data.num_classes or 256)]
  if wrong:
    raise ConfigError(
      f"config.finetune.region_classes: found class id {wrong[0]}, expected ids from 0 to "
      f"data.num_classes - 1"
    )


def _check_objective_names(options) -> None:
  """Checks that there are as many weights as objectives, or none."""
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


def _check_choices(config) -> None:
  choices = {
    "data.source": sources.SOURCES,
    "data.normalization": ("zscore", "minmax"),
    "base.select": ("best", "last"),
    "judge.gate.action": judge_gate.ACTIONS,
    "mine.rule": pair_rules.RULES,
    "finetune.schedule": ("cosine", "constant"),
    "finetune.teacher_views": tuple(mirroring.TEACHER_VIEWS),
    "finetune.reference": ("cached", "online", "none"),
    "finetune.normalization": ("", "none", "region", "power"),
    "finetune.region_unit": ("pixel", "mm"),
    "finetune.pair_weight": ("none", "score_gap", "reliability"),
    "finetune.pair_smoothing": ("none", "reliability"),
    "finetune.terms.pseudo.teacher": ("base", "average"),
  }
  values = config_lib.leaves(config)
  for key, allowed in choices.items():
    if values[key] not in allowed:
      raise ConfigError(
        f"config.{key}: found {values[key]!r}, expected one of {', '.join(map(str, allowed))}"
      )
  _check_judges(config)
  for name in config.evaluate.metrics:
    if name not in metrics.METRICS:
      raise ConfigError(
        f"config.evaluate.metrics: unknown metric {name!r}; known: {', '.join(metrics.METRICS)}"
      )
  if "dice" not in config.evaluate.metrics:
    raise ConfigError("config.evaluate.metrics: 'dice' is needed by the curve; add it")


def _check_judges(config) -> None:
  """Checks the names of judges, and that `auto` and `fused` have some to take."""
  options = config.judge
  if "noisy_oracle" in options.compare:
    raise ConfigError("config.judge.compare: 'noisy_oracle' is measured only as judge.name")
  if options.name == judges.AUTO:
    reading = [name for name in options.compare if judges.needs(name, "labels")]
    if reading or not options.compare:
      found = f"{reading[0]!r}, which reads labels" if reading else "none"
      raise ConfigError(
        f"config.judge.compare: found {found}; judge.name='auto' takes one of these judges: name "
        "some that read no labels"
      )
  if judges.FUSED in (options.name, *options.compare) and len(fused.members(config)) < 2:
    raise ConfigError(
      f"config.judge.compare: found {tuple(options.compare)}; the judge 'fused' weighs those of "
      "them that read no labels: name two or more"
    )
  for name in {options.name, *options.compare} - {judges.AUTO}:
    try:
      judges.check_name(name)
    except JudgeError as error:
      raise ConfigError(f"config.judge: {error}") from error


def _check_counts(config) -> None:
  if config.data.num_unlabelled == 0:
    raise ConfigError(
      "config.data.num_unlabelled: found 0, expected a count, or -1 for all that are left"
    )
  if 0 < config.mine.max_region_size < config.mine.min_region_size:
    raise ConfigError(
      f"config.mine.max_region_size: found {config.mine.max_region_size}, below min_region_size="
      f"{config.mine.min_region_size}; no pair could pass"
    )
  if config.data.num_classes == 1:
    raise ConfigError(
      "config.data.num_classes: found 1, expected 2..255, or 0 to take it from a dataset.json"
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
