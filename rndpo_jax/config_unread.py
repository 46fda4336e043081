"""Options that nothing would read: `check` raises ConfigError naming the key and its reader.

Every key of the config is in one of two lists, which a test checks: `ALWAYS`, or the table that
`readers` makes, where a key is read only if another key has a certain value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rndpo_jax import config as config_lib
from rndpo_jax.data import sources
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import metrics
from rndpo_jax.losses import objectives
from rndpo_jax.mining import judges, proposals
from rndpo_jax.runtime import progress

# Keys, and sections with all their keys, that every run reads.
ALWAYS = (
  "seed", "mesh", "model", "base", "mine",
  "data.source", "data.name", "data.spatial_dims", "data.size", "data.crop", "data.num_classes",
  "data.normalization", "data.group_pattern", "data.split_file", "data.num_workers",
  "data.prefetch",
  "proposals.mix",
  "judge.name", "judge.compare", "judge.num_bootstrap", "judge.gate.action",
  "finetune.objective", "finetune.beta", "finetune.region_unit", "finetune.region_classes",
  "finetune.pair_weight", "finetune.anchor", "finetune.reference", "finetune.augment",
  "finetune.num_steps", "finetune.batch_size", "finetune.accumulate_steps",
  "finetune.learning_rate", "finetune.schedule", "finetune.weight_decay", "finetune.clip_norm",
  "finetune.ema_decay", "finetune.log_every_steps", "finetune.eval_every_steps",
  "finetune.keep_checkpoints", "finetune.checkpoint_minutes",
  "evaluate.batch_size", "evaluate.metrics", "evaluate.delivered_min_probability",
)  # fmt: skip
# The files in `configs/` set these, so that a split file beside them is no error: it is said.
SAID = (
  "data.num_labelled", "data.num_val", "data.num_test", "data.num_unlabelled", "data.split_seed",
)  # fmt: skip

Readers = dict[str, tuple[bool, str]]


def check(config) -> None:
  """Looks for keys that differ from their default and that nothing reads.

  Raises:
    ConfigError: naming the first such key, its value, what would read it, and its default.
  """
  values = config_lib.leaves(config)
  defaults = config_lib.leaves(config_lib.base_config())
  table = readers(config)
  for key, default in defaults.items():
    is_read, reader = find(table, key) or (True, "")
    if is_read or values[key] == default:
      continue
    found = f"config.{key}: found {values[key]!r}, which nothing reads; {reader} would"
    if key not in SAID:
      raise ConfigError(f"{found}: choose that, or leave the key at {default!r}")
    progress.say(found)


def find(table: Readers, key: str) -> tuple[bool, str] | None:
  """The entry of a key: its own, or that of a section it is in."""
  parts = key.split(".")
  names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
  return next((table[name] for name in names if name in table), None)


def readers(config) -> Readers:
  """Key or section -> (whether this config's run reads it, what would read it)."""
  used_judges = {config.judge.name, *config.judge.compare}
  used_samplers = {name for names, _ in proposals.parse_mix(config.proposals.mix) for name in names}
  return {
    **_of_rows("data", sources.SOURCES, {config.data.source}, "config.data.source"),
    **{key: (not config.data.split_file, "an empty config.data.split_file") for key in SAID},
    **_of_rows("proposals", proposals.SAMPLERS, used_samplers, "in config.proposals.mix the"),
    **_of_rows("judge", judges.JUDGES, used_judges, "config.judge.name or config.judge.compare"),
    **_of_rows(
      "evaluate", metrics.METRICS, set(config.evaluate.metrics), "in config.evaluate.metrics"
    ),
    "judge.gate.min_accuracy": (
      config.judge.gate.action != "off",
      "config.judge.gate.action 'refuse' or 'warn'",
    ),
    **_of_augmentation(config, used_judges),
    **_of_finetuning(config.finetune),
  }


def _of_rows(section: str, table: Mapping, used: Iterable[str], where: str) -> Readers:
  """The `options` of a table's rows, each read if one of its rows is used."""
  names: dict[str, list[str]] = {}
  for name, row in table.items():
    for option in row.options:
      names.setdefault(option, []).append(name)
  return {
    f"{section}.{option}": (not set(those).isdisjoint(used), f"{where} {' or '.join(those)}")
    for option, those in names.items()
  }


def _of_augmentation(config, used_judges: set[str]) -> Readers:
  options = config.augment
  on = config.base.augment or config.finetune.augment or "learned" in used_judges
  where = "config.base.augment, config.finetune.augment or the judge 'learned'"
  scales = {"intensity": ["scale"], "gamma": ["scale"], "noise": ["scale"]}
  scales["elastic"] = ["scale", "smoothing"]
  table = {f"augment.{name}": (on, where) for name in ("flip", "turn", *scales)}
  for name, ends in scales.items():
    for end in ends:
      reader = f"config.augment.{name} above 0 with {where}"
      table[f"augment.{name}_{end}"] = (on and options[name] > 0, reader)
  return table


def _of_finetuning(options) -> Readers:
  several = "," in options.objective

  def of_objective(what):
    known = f"config.finetune.objective {objectives.known_readers(what)}"
    return bool(objectives.readers(options.objective, what)), known

  power = (options.normalization == "power", "config.finetune.normalization 'power'")
  return {
    "finetune.normalization": (
      not several and options.objective != "rn_dpo",
      "any single config.finetune.objective but 'rn_dpo'",
    ),
    "finetune.objective_weights": (several, "several objectives in config.finetune.objective"),
    "finetune.power_exponent": power,
    "finetune.power_floor": power,
    "finetune.label_smoothing": of_objective("label_smoothing"),
    "finetune.discopop_temperature": of_objective("temperature"),
    "finetune.anchor_weight": (
      options.anchor != "none",
      "config.finetune.anchor 'chosen' or 'labelled'",
    ),
  }
