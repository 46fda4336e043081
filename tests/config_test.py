"""config: defaults are valid; what cannot work raises ConfigError with key, value and remedy."""

import importlib
import math
import pathlib

import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.checks import config_checks, config_ranges
from rndpo_jax.sweep import sweep

CONFIGS = sorted(
  path.stem
  for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  if path.stem != "__init__"
)

WRONG = [
  ("proposals.mix", "mc_dropout:1", "K = 1"),
  ("proposals.mix", "magic:8", "unknown sampler 'magic'"),
  ("proposals.mix", "tta", "NAME"),
  ("proposals.mix", "temperature:8", "argmax"),
  ("proposals.mix", "base:2", "base:1"),
  ("proposals.mix", "base:1,tta:8", r"size=\(64, 64\) has 7 flips and turns .*at most tta:7"),
  ("proposals.mix", "tta:3,mc_dropout:2,tta:3", "'tta' is there twice"),
  ("proposals.mix", "tta+threshold:3,threshold+tta:4", r"'tta\+threshold' is there twice"),
  ("proposals.mix", "base:1,base:1", "'base' is there twice"),
  ("proposals.threshold_shift", 0.0, "config.proposals.threshold_shift: it is 0"),
  ("judge.name", "magic", "unknown judge 'magic'"),
  ("judge.name", "noisy_oracle", "flip_rate"),
  ("judge.flip_rate", 0.2, "noisy_oracle"),
  ("judge.gate.action", "maybe", "found 'maybe', expected one of refuse, warn, off"),
  ("judge.gate.min_accuracy", 1.5, "config.judge.gate.min_accuracy: found 1.5, expected 0..1"),
  ("mine.rule", "magic", "config.mine.rule"),
  ("mine.rule", "top_vs_rest", "set it to 7"),
  ("mine.rule", "top_vs_base", "one pair an image, found"),
  ("mine.pairs_per_image", 8, "at most K - 1 = 7"),
  ("mine.max_region_size", -1, "config.mine.max_region_size: found -1, expected 0..2147483647"),
  ("base.weight_decay", -0.1, "found -0.1, expected a finite value of 0 or more"),
  ("proposals.temperature_low", 0.0, "above 0"),
  ("proposals.zoom", 1.0, "proposals.zoom: found 1.0, expected 1..4, above 1"),
  ("data.num_unlabelled", 0, "-1 for all"),
  ("data.size", (0, 0), "above 0"),
  ("judge.compare", ("noisy_oracle",), "judge.name"),
  ("finetune.objective", "magic", "config.finetune.objective"),
  ("finetune.beta", 0.0, "config.finetune.beta"),
  ("finetune.beta", float("nan"), "config.finetune.beta"),
  ("finetune.augment", True, "online"),
  ("data.size", (64, 60), "multiples of 8"),
  ("data.size", (64, 64, 64), "expected 2 entries"),
  ("data.crop", (64,), "expected 2 entries"),
  ("data.spacing", (1.0, 1.0), r"patch_size: found \(\), expected 2 entries"),
  ("data.spacing", ("a", 1.0), "numbers"),
  ("data.size", (64, 72), "augment.turn"),
  ("data.source", "magic", "config.data.source"),
  ("data.num_classes", 1, "2..255"),
  ("data.num_classes", 256, "0..255"),
  ("data.case_pattern", "(a)(b)", "2 groups"),
  ("data.case_pattern", "(a", "no regular expression"),
  ("evaluate.metrics", ("dice", "magic"), "unknown metric 'magic'"),
  ("evaluate.metrics", ("iou",), "'dice' is needed"),
  ("augment.flip", 1.5, "0..1"),
  ("finetune.ema_decay", 1.0, "found 1.0, expected 0..1, below 1"),
  ("base.keep_checkpoints", 0, "expected 1..1000"),
  ("finetune.checkpoint_minutes", -1.0, "0 or more"),
  ("seed", -1, r"config.seed: found -1, expected 0..4294967295"),
  ("seed", 2**32, "config.seed: found 4294967296"),
  ("data.split_seed", -1, "config.data.split_seed: found -1"),
  ("data.phantom.seed", -1, "config.data.phantom.seed: found -1"),
]


# Types: key, value, and what the message expects.
WRONG_TYPES = [
  ("data.size", ("64", 64), "whole numbers"),
  ("data.size", (64.0, 64.0), "whole numbers"),
  ("data.size", (None, 64), "whole numbers"),
  ("data.size", ((64, 64), 64), "whole numbers"),
  ("data.size", None, "whole numbers"),
  ("data.crop", ("a", "b"), "whole numbers"),
  ("data.crop", (True, True), "whole numbers"),
  ("data.phantom.size", (72.5, 80.0), "whole numbers"),
  ("finetune.region_classes", ("organ",), "whole numbers"),
  ("finetune.region_classes", (1.0,), "whole numbers"),
  ("judge.compare", (1,), "names"),
  ("evaluate.metrics", ("dice", None), "names"),
  ("judge.name", None, "str"),
  ("finetune.beta", None, "float"),
  ("base.num_steps", None, "int"),
]
FLOATS = [
  k for k, value in config_lib.leaves(config_lib.base_config()).items() if type(value) is float
]
ABSURD = [
  ("model.depth", 10**6, "1..16"),
  ("model.depth", 10**12, "1..16"),
  ("model.width", 10**9, "1..16384"),
  ("model.dropout", 1.0, "0..1, below 1"),
  ("proposals.mix", "base:1,tta+threshold:1000000", "COUNT from 1 to 1024"),
  ("proposals.mix", "threshold:2000", "K = 2000"),
  ("proposals.mix", "threshold:" + 5000 * "9", "COUNT from 1 to 1024"),
  ("proposals.mix", "threshold:\u00b2", "COUNT from 1 to 1024"),
  ("proposals.mix", "threshold:\u0664", "COUNT from 1 to 1024"),
  ("judge.border", 10**6, "0..256"),
  ("judge.num_bootstrap", 10**9, "1..100000"),
  ("mine.batch_size", 10**9, "1..65536"),
  ("finetune.batch_size", 10**9, "1..65536"),
  ("mine.num_shards", 10**9, "1..99999"),
  ("data.prefetch", 10**9, "0..1024"),
  ("data.size", (2**15, 2**15), "at most 268,435,456 pixels"),
  ("data.phantom.size", (10**5, 10**5), "at most 268,435,456 pixels"),
  ("data.phantom.num_cases", 10**12, "1..10000000"),
  ("base.num_steps", 10**18, "1..10000000"),
]


@pytest.mark.parametrize("key,value,kind", WRONG_TYPES)
def test_a_value_of_the_wrong_type_raises(key, value, kind):
  config = config_lib.base_config()
  section, name = key.rsplit(".", 1)
  parent = config
  for part in section.split("."):
    parent = parent[part]
  with parent.ignore_type():
    parent[name] = value
  with pytest.raises(errors.ConfigError, match=f"config.{key}: found .*, expected {kind}"):
    config_checks.validate(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", FLOATS)
def test_no_number_may_be_nan_or_infinite(key, value):
  config = config_lib.base_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.ConfigError, match=f"config.{key}: found {value}, expected"):
    config_checks.validate(config)


@pytest.mark.parametrize("key,value,message", ABSURD)
def test_an_absurd_size_raises_before_memory_is_taken(key, value, message):
  config = config_lib.base_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.ConfigError, match=f"config.{key}: .*{message}"):
    config_checks.validate(config)


def test_whole_numbers_serve_as_floats():
  config = config_lib.base_config().lock()
  config.finetune.beta = 3
  config_checks.validate(config)


@pytest.mark.parametrize("section", ["base", "finetune"])
def test_parts_of_a_batch_that_the_devices_cannot_share_raise(section):
  config = config_lib.base_config()
  config[section].accumulate_steps = 2
  pipeline.check_here(config)
  config[section].accumulate_steps = 4
  message = f"config.{section}.accumulate_steps: found 4, .* on 8 devices is no multiple of 32"
  with pytest.raises(errors.ConfigError, match=message):
    pipeline.check_here(config)


def test_parts_are_of_the_batches_that_fine_tuning_reads():
  config = config_lib.base_config()
  config.finetune.terms.preference.weight = 0.0
  config.finetune.terms.labelled.weight = 1.0
  config.finetune.batch_size = 3  # images with pairs, which nothing reads
  config.finetune.labelled_batch_size = 16
  config.finetune.accumulate_steps = 2
  pipeline.check_here(config, ["finetune"])
  sweep.check(config, {"betas": [1.0], "learning_rates": [1.0], "seeds": [0]})
  config.finetune.labelled_batch_size = 8
  message = "accumulate_steps: found 2, but labelled_batch_size=8 on 8 devices is no multiple of 16"
  with pytest.raises(errors.ConfigError, match=message):
    pipeline.check_here(config, ["finetune"])
  config.finetune.labelled_batch_size = 7
  with pytest.raises(errors.ConfigError, match="found 2, but labelled_batch_size=7, which a"):
    sweep.check(config, {"betas": [1.0], "learning_rates": [1.0], "seeds": [0]})


@pytest.mark.parametrize("key,value,message", WRONG)
def test_a_value_that_cannot_work_raises(key, value, message):
  config = config_lib.base_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.ConfigError, match=message):
    config_checks.validate(config)


def test_a_rule_on_the_own_mask_needs_it_first():
  config = config_lib.base_config()
  config.mine.rule, config.mine.pairs_per_image = "top_vs_base", 1
  config_checks.validate(config)
  config.proposals.mix = "tta+threshold:7,base:1"
  with pytest.raises(errors.ConfigError, match="found 'tta.*let it begin with base:1"):
    config_checks.validate(config)


@pytest.mark.parametrize(
  "spacing,patch_size,schemes,message",
  [
    ((1.0,), (64, 64), (), "spacing: found .*expected 2 entries"),
    ((-1.0, 1.0), (64, 64), (), "spacing: found .*expected mm a pixel, or 0 for the median"),
    ((math.inf, 1.0), (64, 64), (), "spacing: found .*expected mm a pixel"),
    ((1.0, 1.0), (64, 64, 8), (), "patch_size: found .*expected 2 entries"),
    ((1.0, 1.0), (64, 60), (), "patch_size: found .*needs multiples of 8"),
    ((1.0, 1.0), (64, 72), (), "turn: quarter turns need H equal to W"),
    ((1.0, 1.0), (64, 64), ("zscores",), "schemes: unknown scheme 'zscores'; known: zscore,"),
  ],
)
def test_a_native_mode_that_cannot_work_raises(spacing, patch_size, schemes, message):
  config = config_lib.base_config()
  config.update_from_flattened_dict(
    {"data.spacing": (0.0, 1.5), "data.patch_size": (64, 64), "data.schemes": ("none",)}
  )
  config_checks.validate(config)
  config.update_from_flattened_dict(
    {"data.spacing": spacing, "data.patch_size": patch_size, "data.schemes": schemes}
  )
  with pytest.raises(errors.ConfigError, match=rf"config.(data|augment).{message}"):
    config_checks.validate(config)


@pytest.mark.parametrize("name", ["unets", "my_networks", "my networks:build", "a:b:c", ""])
def test_a_name_of_no_network_raises(name):
  config = config_lib.base_config()
  config.model.name = name
  with pytest.raises(errors.ConfigError, match="config.model.name: found .*module:function"):
    config_checks.validate(config)


@pytest.mark.parametrize(
  "size,views", [((64, 64), 7), ((64, 32), 3), ((16, 16, 8), 15), ((16, 8, 8), 7)]
)
def test_no_more_views_than_the_grid_has(size, views):
  config = config_lib.base_config()
  config.update_from_flattened_dict(
    {
      "data.size": size,
      "data.spatial_dims": len(size),
      "augment.turn": 0.0,
      "mine.pairs_per_image": 2,
    }
  )
  # Composed with a sampler that draws or sweeps, a view that comes again gives another mask.
  for mix in ("tta:{}", "tta+threshold:40", "tta+zoom:40", "tta+mc_dropout:40,tta+mc_dropout:40"):
    config.proposals.mix = mix.format(views)
    config_checks.validate(config)
  for mix in ("tta:{}", "mc_dropout:2,tta:{}"):
    config.proposals.mix = mix.format(views + 1)
    with pytest.raises(errors.ConfigError, match=f"has {views} flips and turns besides"):
      config_checks.validate(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_but_for_the_place_of_its_data(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  config_checks.validate(config)
  assert config.is_locked
  assert not config.data.root


@pytest.mark.parametrize(
  "compare,found", [((), "none"), (("entropy", "oracle"), "'oracle', which")]
)
def test_auto_takes_one_of_some_judges_that_read_no_labels(compare, found):
  config = config_lib.base_config()
  config.judge.name = "auto"
  config_checks.validate(config)
  config.judge.compare = compare
  with pytest.raises(errors.ConfigError, match=f"config.judge.compare: found {found}"):
    config_checks.validate(config)


def test_unknown_key_and_wrong_type_raise():
  config = config_lib.base_config().lock()
  with pytest.raises((AttributeError, KeyError), match="betta"):
    config.finetune.betta = 1.0
  with pytest.raises(TypeError, match="beta|float"):
    config.finetune.beta = "strong"


def test_every_number_has_a_range_and_every_tuple_a_type():
  values = config_lib.leaves(config_lib.base_config())
  numbers = {key for key, value in values.items() if type(value) in (int, float)}
  assert set(config_ranges.RANGES) == numbers
  assert set(config_ranges.ITEMS) == {k for k, value in values.items() if type(value) is tuple}
