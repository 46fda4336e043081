"""config_unread: a key that nothing reads raises, naming the key and what would read it."""

import pathlib
import re

import pytest

from configs import quickstart
from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.checks import config_checks, config_unread

PACKAGE = pathlib.Path(config_checks.__file__).parent.parent
KEYS = config_lib.leaves(config_lib.base_config())
NATIVE = {"data.spacing": (1.0, 1.0), "data.patch_size": (64, 64)}
SIMPLE = {"data.spacing": (), "data.patch_size": ()}
# Key, a value that is not the default, and what makes something read it.
CONDITIONAL = [
  ("data.phantom.seed", 3, {"data.source": "phantom"}),
  ("data.phantom.size", (20, 20), {"data.source": "phantom"}),
  ("data.root", "/data", {"data.source": "folder"}),
  ("data.size", (32, 32), SIMPLE),
  ("data.crop", (48, 48), SIMPLE),
  ("data.normalization", "minmax", SIMPLE),
  ("data.schemes", ("none",), NATIVE),
  ("data.statistics", "[null]", NATIVE),
  ("data.patch_size", (32, 32), {"data.spacing": (1.0, 1.0)}),
  ("data.case_pattern", r"(case\d+)_z", {"data.source": "folder"}),
  ("data.split_fold", 0, {"data.split_file": "splits_final.json"}),
  ("model.norm", "instance", {"model.name": "unet"}),
  ("model.dropout", 0.1, {"model.name": "unet"}),
  ("model.dropout", 0.1, {"judge.name": "learned"}),
  ("model.lanes", 8, {"model.name": "my_networks:build"}),
  ("augment.flip", 0.1, {"base.augment": True}),
  ("augment.noise_scale", 0.5, {"base.augment": True}),
  ("augment.elastic_smoothing", 2.0, {"base.augment": True, "augment.elastic": 0.5}),
  ("augment.affine_zoom", 0.5, {"base.augment": True, "augment.affine": 0.5}),
  ("proposals.temperature_high", 3.0, {"proposals.mix": "temperature+threshold:7"}),
  ("proposals.noise_scale", 2.0, {"proposals.mix": "logit_noise:8"}),
  ("proposals.noise_smoothing", 2.0, {"proposals.mix": "logit_noise:8"}),
  ("proposals.threshold_shift", 2.0, {"proposals.mix": "threshold:8"}),
  ("proposals.zoom", 2.0, {"proposals.mix": "tta+zoom:8"}),
  ("base.member_labels", 0.5, {"base.num_members": 2}),
  ("judge.border", 5, {"judge.name": "entropy"}),
  ("judge.learned.num_steps", 5, {"judge.name": "learned"}),
  ("judge.flip_rate", 0.1, {"judge.name": "noisy_oracle"}),
  ("judge.noise_level", 0.1, {"judge.name": "noisy_oracle"}),
  ("mine.whole_images", True, NATIVE),
  ("mine.rule", "adjacent", {"data.preferences": ""}),
  ("mine.min_score_gap", 0.1, {"data.preferences": ""}),
  ("mine.min_region_size", 2, {"data.preferences": ""}),
  ("mine.max_region_size", 99, {"data.preferences": ""}),
  ("proposals.mix", "base:1,tta:6", {"data.preferences": ""}),
  ("judge.name", "confidence", {"data.preferences": ""}),
  ("judge.compare", ("confidence",), {"data.preferences": ""}),
  ("judge.num_bootstrap", 9, {"data.preferences": ""}),
  ("judge.gate.action", "off", {"data.preferences": ""}),
  ("data.proposals", "/masks", {"proposals.mix": "file:5"}),
  (
    "data.preferences",
    "/p.csv",
    {"finetune.terms.preference.weight": 1.0, "finetune.terms.labelled.weight": 0.0},
  ),
  ("judge.gate.min_accuracy", 0.6, {"judge.gate.action": "warn"}),
  ("evaluate.delivered_min_probability", 0.5, {"data.num_val": 16}),
  ("finetune.power_floor", 2.0, {"finetune.objective": "dpo", "finetune.normalization": "power"}),
  (
    "finetune.power_exponent",
    1.0,
    {"finetune.objective": "dpo", "finetune.normalization": "power"},
  ),
  ("finetune.normalization", "region", {"finetune.objective": "dpo"}),
  ("finetune.label_smoothing", 0.1, {"finetune.objective": "cdpo"}),
  ("finetune.pair_smoothing", "reliability", {"finetune.objective": "cdpo"}),
  ("finetune.discopop_temperature", 0.1, {"finetune.objective": "discopop"}),
  ("finetune.labelled_batch_size", 16, {"finetune.terms.labelled.weight": 1.0}),
  ("finetune.unlabelled_batch_size", 16, {"finetune.terms.entropy.weight": 1.0}),
  ("finetune.dropout", True, {"model.name": "unet"}),
  (
    "finetune.terms.consistency.max_entropy",
    0.5,
    {"finetune.terms.consistency.weight": 1.0, "finetune.ema_decay": 0.9, "model.name": "unet"},
  ),
  (
    "finetune.terms.weak_to_strong.dropout_view",
    True,
    {"finetune.terms.weak_to_strong.weight": 1.0, "finetune.ema_decay": 0.9, "model.name": "unet"},
  ),
  ("finetune.ramp_steps", 9, {"finetune.terms.entropy.weight": 1.0}),
  ("finetune.teacher_views", "flips", {"finetune.terms.pseudo.weight": 1.0}),
  ("strong.gamma_scale", 0.1, {"finetune.terms.entropy.weight": 1.0}),
  ("finetune.terms.pseudo.threshold", 0.5, {"finetune.terms.pseudo.weight": 1.0}),
  (
    "finetune.terms.consistency.passes",
    2,
    {
      "finetune.terms.consistency.weight": 1.0,
      "finetune.terms.consistency.max_entropy": 0.5,
      "finetune.ema_decay": 0.9,
      "model.name": "unet",
    },
  ),
  ("evaluate.nsd_tolerance_mm", 1.0, {"evaluate.metrics": ("dice", "nsd")}),
]
# A config in which as little as possible is read.
BARE = {
  "data.source": "nnunet",
  "base.augment": False,
  "judge.compare": (),
  "proposals.mix": "tta:7",
  "model.name": "nnunet_plain",
}


def make(**changes):
  config = config_lib.base_config()
  config.update_from_flattened_dict({**BARE, **changes})
  return config


@pytest.mark.parametrize("key,value,reader", CONDITIONAL)
def test_a_key_that_nothing_reads_raises_until_its_reader_is_chosen(key, value, reader):
  if key == "data.root":
    reader, bare = {"data.source": "folder"}, {"data.source": "phantom"}
  else:
    bare = {"judge.gate.action": "off"} if key == "judge.gate.min_accuracy" else {}
    bare = NATIVE if reader is SIMPLE else bare
    bare = {"data.num_val": 0} if reader == {"data.num_val": 16} else bare
  if reader == {"data.preferences": ""}:
    bare = {name: KEYS[name] for name in ("judge.compare", "proposals.mix")}
    bare["data.preferences"] = "/p.csv"
  if key == "data.preferences":
    bare = {name: KEYS[name] for name in ("judge.compare", "proposals.mix")}
    bare |= {"finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0}
  wanted = re.escape(f"config.{key}: found {value!r}, which nothing reads")
  with pytest.raises(
    errors.ConfigError, match=f"{wanted}; .* would: choose that, or leave the key"
  ):
    config_checks.validate(make(**{**bare, key: value}))
  config_checks.validate(make(**{**bare, key: value, **reader}))
  config_checks.validate(make(**bare))


@pytest.mark.parametrize(
  "key,value",
  [
    ("finetune.dropout", True),
    ("finetune.terms.weak_to_strong.dropout_view", True),
    ("finetune.terms.consistency.max_entropy", 0.5),
  ],
)
def test_dropout_of_a_network_without_it_raises(key, value):
  on = {f"finetune.terms.{name}.weight": 1.0 for name in ("weak_to_strong", "consistency")}
  on |= {"finetune.ema_decay": 0.9, "model.name": "nnunet_plain"}
  config_checks.validate(make(**on))
  with pytest.raises(errors.ConfigError, match=f"config.{key}: .* with a config.model.name that"):
    config_checks.validate(make(**on, **{key: value}))
  none = {"model.name": "unet", "model.dropout": 0.0, key: value}
  with pytest.raises(errors.ConfigError, match=f"config.{key}: .* config.model.dropout above 0"):
    config_checks.validate(make(**{**on, **none}))
  config_checks.validate(make(**{**on, **none, "model.dropout": 0.1}))


@pytest.mark.parametrize(
  "key,value,on,more",
  [
    # Copy-paste looks at the weak view; UA-MT's teacher has passes under dropout instead of flips.
    ("strong.noise", 0.1, {"copy_paste.weight": 1.0}, {"entropy.weight": 1.0}),
    (
      "finetune.teacher_views",
      "flips",
      {"consistency.weight": 1.0, "consistency.max_entropy": 0.5},
      {"consistency.max_entropy": 0.0},
    ),
    # A base of nnU-Net's is not trained here, but fine-tuning on labels reads how one would be.
    ("base.dice_weight", 0.5, {"preference.weight": 1.0}, {"chosen.weight": 1.0}),
    ("base.augment", False, {"chosen.weight": 1.0}, {"labelled.weight": 1.0}),
    ("augment.flip", 0.1, {"chosen.weight": 1.0}, {"labelled.weight": 1.0}),
  ],
)
def test_a_term_reads_what_its_loss_does_and_no_more(key, value, on, more):
  def of_terms(*parts):
    return {f"finetune.terms.{name}": x for part in parts for name, x in part.items()}

  fixed = {"finetune.terms.preference.weight": 0.0, "finetune.ema_decay": 0.9}
  fixed |= {"model.name": "unet", "base.augment": True}
  fixed |= {"base.nnunet_folder": "/model"} if "strong" not in key and "views" not in key else {}
  with pytest.raises(errors.ConfigError, match=f"config.{key}: found {value!r}, which nothing"):
    config_checks.validate(make(**{**fixed, **of_terms(on), key: value}))
  config_checks.validate(make(**{**fixed, **of_terms(on, more), key: value}))


def test_a_value_is_read_only_by_a_phase_that_has_it():
  config = quickstart.get_config()  # the second phase alone has a reference, and sets its own
  with config.unlocked():
    config.finetune.reference = "none"
  message = "config.finetune.reference: found 'none', which nothing reads"
  with pytest.raises(errors.ConfigError, match=message):
    config_checks.validate(config)


def test_every_key_is_always_read_or_in_the_table():
  table = config_unread.readers(config_lib.base_config())
  always = dict.fromkeys(config_unread.ALWAYS, (True, ""))
  for key in KEYS:
    found = [config_unread.find(those, key) is not None for those in (always, table)]
    assert sum(found) == 1, f"{key} is in {sum(found)} of ALWAYS and readers"
  for name in (*always, *table):
    assert any(key == name or key.startswith(f"{name}.") for key in KEYS), f"{name} is no key"
  tried = {key.split(".")[0] for key, _, _ in CONDITIONAL}
  sections = {name.split(".")[0] for name in table.keys() - set(config_unread.SAID)}
  assert sections <= tried, f"sections without a row in CONDITIONAL: {sections - tried}"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_named_by_code_that_is_no_check(key):
  name = key.rsplit(".", 1)[1] if "." in key else key
  files = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("config")]
  assert any(re.search(rf"\b{name}\b", path.read_text()) for path in files)


def test_counts_beside_a_split_file_are_reported(capsys):
  config_checks.validate(make(**{"data.split_file": "splits.json", "data.num_val": 5}))
  assert "config.data.num_val: found 5, which nothing reads" in capsys.readouterr().out
  fold = {"data.split_file": "splits_final.json", "data.split_fold": 1}
  config_checks.validate(make(**{**fold, "data.num_val": 5, "data.num_test": 5}))
  assert capsys.readouterr().out.count("which nothing reads") == 1
  config_checks.validate(make(**{"data.num_val": 5}))
  assert capsys.readouterr().out == ""
