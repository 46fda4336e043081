"""config: the mix of proposals."""

import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.checks import config_checks
from rndpo_jax.mining import proposals


@pytest.mark.parametrize(
  "key,mix", [("model.dropout", "mc_dropout:8"), ("proposals.noise_scale", "tta+logit_noise:8")]
)
def test_a_sampler_needs_what_makes_it_act(key, mix):
  config = config_lib.base_config()
  config.proposals.mix = mix
  config_checks.validate(config)
  config.update_from_flattened_dict({key: 0.0})
  with pytest.raises(errors.ConfigError, match=f"config.{key}: it is 0"):
    config_checks.validate(config)


@pytest.mark.parametrize(
  "mix,message",
  [
    ("base:1,member:1", "base.num_members: found 1, but 'member'"),
    ("member+tta:2", r"found 'member\+tta', but 'member' is another model's own"),
    ("member+zoom:2", r"found 'member\+zoom', but 'member' is another model's own"),
    ("base:1,zoom:3,zoom:4", "'zoom' is there twice"),
    ("base:1,largest_component:2", "found largest_component:2, which makes 1 different masks"),
  ],
)
def test_a_mix_that_cannot_work_raises(mix, message):
  config = config_lib.base_config()
  config.mine.pairs_per_image = 1
  config.proposals.mix = mix
  with pytest.raises(errors.ConfigError, match=message):
    config_checks.validate(config)


def test_members_of_a_mix_are_at_most_those_there_are():
  config = config_lib.base_config()
  config.mine.pairs_per_image = 1
  config.base.num_members = 3
  config.proposals.mix = "member:2,tta+largest_component:7,member+drop_component:9"
  config_checks.validate(config)
  config.proposals.mix = "base:1,member:3"
  with pytest.raises(errors.ConfigError, match="found member:3, which makes 2 different masks"):
    config_checks.validate(config)


def test_dropout_is_not_asked_of_a_network_without_it():
  config = config_lib.base_config()
  config.model.name = "nnunet_plain"
  config_checks.validate(config)
  config.proposals.mix = "base:1,tta+mc_dropout:7"
  with pytest.raises(errors.ConfigError, match="mix: found 'mc_dropout', but .*'nnunet_plain'"):
    config_checks.validate(config)


def test_mix_is_parsed_into_entries_and_counts():
  assert proposals.parse_mix("base:1, tta:3,mc_dropout+logit_noise:4") == (
    (("base",), 1),
    (("tta",), 3),
    (("mc_dropout", "logit_noise"), 4),
  )
