"""Options that nothing would read: `check` raises ConfigError naming the key and its reader.

Every key of the config is in one of two lists, which a test checks: `ALWAYS`, or the table that
`readers` makes, where a key is read only if another key has a certain value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rndpo_jax import config as config_lib
from rndpo_jax import models
from rndpo_jax.checks import config_validation
from rndpo_jax.data import sources
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import metrics
from rndpo_jax.losses import objectives
from rndpo_jax.mining import judges, proposals
from rndpo_jax.runtime import progress
from rndpo_jax.training import image_terms

# Keys, and sections with all their keys, that every run reads.
ALWAYS = (
  "seed", "mesh", "mine.pairs_per_image", "mine.batch_size", "mine.num_shards",
  "base.workdir", "base.nnunet_folder", "base.num_members",
  "model.name", "model.depth", "model.dtype", "model.remat",
  "data.source", "data.name", "data.spatial_dims", "data.num_classes", "data.spacing",
  "data.group_pattern", "data.split_file", "data.num_workers", "data.prefetch",
  "phases", "finetune.rounds", "finetune.region_classes", "finetune.num_steps",
  "finetune.accumulate_steps",
  "finetune.learning_rate", "finetune.schedule", "finetune.weight_decay", "finetune.clip_norm",
  "finetune.ema_decay", "finetune.log_every_steps", "finetune.eval_every_steps",
  "finetune.keep_checkpoints", "finetune.checkpoint_minutes",
  "evaluate.batch_size", "evaluate.mirror", "evaluate.metrics", "evaluate.delivered_max_kl",
)  # fmt: skip
# The files in `configs/` set these, so that a split file beside them is no error: it is said.
SAID = (
  "data.num_labelled", "data.num_val", "data.num_test", "data.num_unlabelled", "data.split_seed",
)  # fmt: skip
_WITH_DROPOUT = "with a config.model.name that has dropout and config.model.dropout above 0"

Readers = dict[str, tuple[bool, str]]


def check(phases: Sequence) -> None:
  """Looks for keys that differ from their default and that nothing reads.

  Args:
    phases: the configs of a job's phases, see `config.of_phase`; a value is read if a phase that
      has it reads it.

  Raises:
    ConfigError: naming the first such key, its value, what would read it, and its default.
  """
  tables = [(config_lib.leaves(config), readers(config)) for config in phases]
  for key, default in config_lib.leaves(config_lib.base_config()).items():
    entries = [
      (values[key], *(find(table, key) or (True, "")))
      for values, table in tables
      if values[key] != default
    ]
    read = [value for value, is_read, _ in entries if is_read]
    unread = next(((value, reader) for value, _, reader in entries if value not in read), None)
    if unread is None:
      continue
    found = f"config.{key}: found {unread[0]!r}, which nothing reads; {unread[1]} would"
    if key not in SAID:
      raise ConfigError(f"{found}: choose that, or leave the key at {default!r}")
    progress.say(found)


def find(table: Readers, key: str) -> tuple[bool, str] | None:
  """The entry of a key: its own, or that of a section it is in."""
  parts = key.split(".")
  names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
  return next((table[name] for name in names if name in table), None)


def is_read(table: Readers, key: str) -> bool:
  """Whether a key is read; one that is in no table is."""
  return (find(table, key) or (True, ""))[0]


def readers(config) -> Readers:
  """Key or section -> (whether this config's run reads it, what would read it)."""
  used_judges = {config.judge.name, *config.judge.compare}
  used_samplers = {name for names, _ in proposals.parse_mix(config.proposals.mix) for name in names}
  return {
    **_of_rows("data", sources.SOURCES, {config.data.source}, "config.data.source"),
    **_of_splits(config.data),
    **_of_geometry(bool(config.data.spacing)),
    **_of_base(config),
    **_of_model(config, used_judges),
    **_of_rows("proposals", proposals.SAMPLERS, used_samplers, "in config.proposals.mix the"),
    **_of_rows("judge", judges.JUDGES, used_judges, "config.judge.name or config.judge.compare"),
    **_of_rows(
      "evaluate", metrics.METRICS, set(config.evaluate.metrics), "in config.evaluate.metrics"
    ),
    **_of_mining(config, used_samplers),
    **_of_augmentation(config, used_judges),
    **_of_terms(config),
    **_of_finetuning(config.finetune),
    **_of_delivered(config),
  }


# Keys of mining that pairs of `data.preferences` do without.
_OF_MINING = (
  "proposals.mix", "judge.name", "judge.compare", "judge.num_bootstrap", "judge.gate.action",
  "mine.rule", "mine.min_score_gap", "mine.min_region_size", "mine.max_region_size",
)  # fmt: skip


def _of_mining(config, used_samplers: set[str]) -> Readers:
  mines = not config.data.preferences
  where = "an empty config.data.preferences"
  gated = mines and config.judge.gate.action != "off"
  reads_pairs = "pairs" in image_terms.reads_of(config)
  return {
    **{key: (mines, where) for key in _OF_MINING},
    "mine.whole_images": (
      mines and bool(config.data.spacing),
      f"config.data.spacing with {where} of config.data.preferences" if mines else where,
    ),
    "judge.gate.min_accuracy": (gated, "config.judge.gate.action 'refuse' or 'warn'"),
    "data.proposals": (mines and "file" in used_samplers, "'file' in config.proposals.mix"),
    "data.preferences": (reads_pairs, f"config.finetune.terms {_terms_that_read('pairs')}"),
  }


def _of_splits(data) -> Readers:
  """A split file says all, but of a fold, which only says what is held out."""
  drawn, of_fold = not data.split_file, data.split_file != "" and data.split_fold >= 0
  said = dict.fromkeys(SAID, (drawn or of_fold, "an empty config.data.split_file"))
  said["data.num_val"] = (drawn, "an empty config.data.split_file")
  return {**said, "data.split_fold": (not drawn, "config.data.split_file")}


def _of_delivered(config) -> Readers:
  """Validation cases choose the delivered model, or if there are none a label-free stop."""
  return {
    "evaluate.delivered_min_probability": (
      config_validation.may_have_cases(config),
      "config.data.num_val above 0",
    ),
  }


def _of_geometry(is_native: bool) -> Readers:
  """The simple mode and that of patches have each their own keys."""
  simple = (not is_native, "an empty config.data.spacing")
  native = (is_native, "config.data.spacing")
  return {
    **{f"data.{name}": simple for name in ("size", "crop", "normalization")},
    **{f"data.{name}": native for name in ("patch_size", "schemes", "statistics")},
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


# Terms of fine-tuning on classes, whose loss has the Dice part of the base's.
_WITH_DICE = ("labelled", "chosen", "pseudo", "weak_to_strong", "cross_pseudo", "copy_paste")


def _of_base(config) -> Readers:
  """A base that nnU-Net has trained is not trained here; fine-tuning reads two of its keys too."""
  options, terms = config.base, config_lib.active_terms(config)
  others = ("workdir", "nnunet_folder", "num_members")
  trained = (not options.nnunet_folder, "an empty config.base.nnunet_folder")
  table = {f"base.{name}": trained for name in options if name not in others}
  several = (trained[0] and options.num_members > 1, "config.base.num_members above 1")
  table["base.member_labels"] = several
  for name, known, is_read in (
    ("dice_weight", " or ".join(_WITH_DICE), not terms.keys().isdisjoint(_WITH_DICE)),
    ("augment", _terms_that_read("labelled"), "labelled" in image_terms.reads(terms)),
  ):
    where = f"{trained[1]} or config.finetune.terms {known}"
    table[f"base.{name}"] = (trained[0] or is_read, where)
  return {**table, "base.fold": (bool(options.nnunet_folder), "config.base.nnunet_folder")}


def _of_model(config, used_judges: set[str]) -> Readers:
  """The learned judge, a U-Net of its own, reads two of the keys as well."""
  used = {name for name in models.ARCHITECTURES if name == config.model.name}
  used = used or set(models.ARCHITECTURES)  # a function of one's own may read them all
  table = _of_rows("model", models.ARCHITECTURES, used, "config.model.name")
  for key in ("model.dropout", "model.lanes"):
    is_read, where = table[key]
    table[key] = (is_read or "learned" in used_judges, f"{where} or the judge 'learned'")
  derived = (not models.has_architecture(config.model), "an empty config.model.architecture")
  return {**table, "model.width": derived, "model.max_width": derived}


def _of_augmentation(config, used_judges: set[str]) -> Readers:
  options = config.augment
  read = image_terms.reads_of(config)
  on = config.base.augment and (not config.base.nnunet_folder or "labelled" in read)
  on = on or config.finetune.augment or "learned" in used_judges
  on = on or "unlabelled" in read
  where = (
    "config.base.augment, config.finetune.augment, the judge 'learned' or a term of fine-tuning on "
    "unlabelled images"
  )
  scales = {"intensity": ["scale"], "gamma": ["scale"], "noise": ["scale"]}
  scales |= {"elastic": ["scale", "smoothing"], "affine": ["degrees", "zoom"]}
  table = {f"augment.{name}": (on, where) for name in ("flip", "turn", *scales)}
  for name, ends in scales.items():
    for end in ends:
      reader = f"config.augment.{name} above 0 with {where}"
      table[f"augment.{name}_{end}"] = (on and options[name] > 0, reader)
  return table


def _of_terms(config) -> Readers:
  """Keys that the terms of fine-tuning read, and those of the terms themselves."""
  terms = config_lib.active_terms(config)
  read = image_terms.reads(terms)
  pairs = ("pairs" in read, f"config.finetune.terms {_terms_that_read('pairs')}")
  preference = ("preference" in terms, "config.finetune.terms.preference")
  objective = (
    not {"preference", "online"}.isdisjoint(terms),
    "config.finetune.terms preference or online",
  )
  strong = "strong" in read or config.finetune.strong
  where = f"config.finetune.strong, or config.finetune.terms {_terms_that_read('strong')}"
  has_dropout = models.reads(config.model.name, "dropout") and config.model.dropout > 0
  table = {f"finetune.{name}": pairs for name in ("augment", "strong", "batch_size")}
  table["finetune.dropout"] = (pairs[0] and has_dropout, f"{pairs[1]} {_WITH_DROPOUT}")
  table |= {f"finetune.{name}": preference for name in ("region_unit", "reference")}
  table |= {f"finetune.{name}": objective for name in ("objective", "beta")}
  table["finetune.pair_weight"] = table["finetune.min_pair_probability"] = pairs
  for name in ("labelled", "unlabelled"):
    reader = f"config.finetune.terms {_terms_that_read(name)}"
    table[f"finetune.{name}_batch_size"] = (name in read, reader)
  # A teacher under dropout (UA-MT) looks at an image as often as it has passes, never flipped.
  once = {n: o for n, o in terms.items() if not o.get("max_entropy")}
  table["finetune.teacher_views"] = (
    bool({"base", "teacher"} & image_terms.reads(once)),
    f"config.finetune.terms pseudo or {_terms_that_read('teacher')} (consistency without "
    "max_entropy)",
  )
  table["finetune.reliable_share"] = table["finetune.unlabelled_batch_size"]
  table["finetune.ramp_steps"] = (
    any(image_terms.TERMS[name].rises for name in terms),
    f"config.finetune.terms {' or '.join(n for n, row in image_terms.TERMS.items() if row.rises)}",
  )
  for name in config.strong:
    amount = config.strong[name.removesuffix("_scale")]
    on = strong and (amount > 0 or not name.endswith("_scale"))
    table[f"strong.{name}"] = (on, where)
  for name, options in config.finetune.terms.items():
    for option in options:
      on = option == "weight" or name in terms
      table[f"finetune.terms.{name}.{option}"] = (
        on,
        f"config.finetune.terms.{name}.weight above 0",
      )
  for key in ("weak_to_strong.dropout_view", "consistency.max_entropy"):
    is_read, where = table[f"finetune.terms.{key}"]
    table[f"finetune.terms.{key}"] = (is_read and has_dropout, f"{where} {_WITH_DROPOUT}")
  consistency = config.finetune.terms.consistency
  table["finetune.terms.consistency.passes"] = (
    "consistency" in terms and consistency.max_entropy > 0,
    "config.finetune.terms.consistency.max_entropy above 0",
  )
  return table


def _terms_that_read(what: str) -> str:
  return " or ".join(name for name, row in image_terms.TERMS.items() if what in row.reads)


def _of_finetuning(options) -> Readers:
  several = "," in options.objective

  def of_objective(what):
    known = f"config.finetune.objective {objectives.known_readers(what)}"
    return bool(objectives.readers(options.objective, what)), known

  smoothed = of_objective("label_smoothing")
  power = (options.normalization == "power", "config.finetune.normalization 'power'")
  return {
    "finetune.normalization": (
      not several and options.objective != "rn_dpo",
      "any single config.finetune.objective but 'rn_dpo'",
    ),
    "finetune.objective_weights": (several, "several objectives in config.finetune.objective"),
    "finetune.power_exponent": power,
    "finetune.power_floor": power,
    "finetune.label_smoothing": (
      smoothed[0] and options.pair_smoothing == "none",
      f"{smoothed[1]}, with config.finetune.pair_smoothing 'none'",
    ),
    "finetune.pair_smoothing": (
      not several and of_objective("pair_smoothing")[0],
      "config.finetune.objective 'cdpo' alone",
    ),
    "finetune.discopop_temperature": of_objective("temperature"),
  }
