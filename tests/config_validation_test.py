"""config_validation: what goes by how often a judge is right needs validation cases."""

import pytest

from rndpo_jax import config as config_lib
from rndpo_jax.checks import config_checks, config_validation
from rndpo_jax.errors import ConfigError

NEEDY = [
  ({"judge.name": "auto"}, "judge.name: found 'auto'"),
  ({"judge.name": "fused"}, "judge.name: found 'fused'"),
  ({"judge.compare": ("agreement", "entropy", "fused")}, "judge.compare: found 'fused'"),
  ({"finetune.pair_weight": "reliability"}, "finetune.pair_weight: found 'reliability'"),
  ({"finetune.min_pair_probability": 0.7}, "finetune.min_pair_probability: found 0.7"),
  (
    {"finetune.objective": "cdpo", "finetune.pair_smoothing": "reliability"},
    "finetune.pair_smoothing: found 'reliability'",
  ),
  ({"phases": ({"finetune.pair_weight": "reliability"}, {})}, "finetune.pair_weight"),
]


def _config(**changes):
  config = config_lib.base_config()
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("changes,message", NEEDY)
def test_what_needs_validation_cases_is_an_error_without(changes, message):
  config_checks.validate(_config(**changes))
  with pytest.raises(ConfigError, match=f"{message}.*no validation cases.*config.data.num_val"):
    config_checks.validate(_config(**changes, **{"data.num_val": 0}))
  # What a split file holds is looked at when it is read.
  config_checks.validate(_config(**changes, **{"data.split_file": "/splits.json"}))
  with pytest.raises(ConfigError, match=message):
    config_validation.check_without_cases(_config(**changes))


def test_no_judge_is_asked_for_where_no_term_reads_pairs():
  terms = {"finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0}
  config_checks.validate(_config(**terms, **{"judge.name": "auto", "data.num_val": 0}))


W2S = {
  "finetune.terms.preference.weight": 0.0, "finetune.terms.weak_to_strong.weight": 1.0,
  "finetune.ema_decay": 0.9,
}  # fmt: skip
CHOSEN = {"finetune.terms.chosen.weight": 1.0}
ONLINE = {"finetune.terms.online.weight": 1.0, "finetune.ema_decay": 0.9}


@pytest.mark.parametrize(
  "changes,bad,message",
  [
    (W2S, {"finetune.unlabelled_batch_size": 1}, "cutmix: a box comes from another image"),
    (CHOSEN, {"mine.rule": "random_pair"}, "mine.rule: found 'random_pair', .* takes it for a la"),
    (
      {**W2S, "finetune.teacher_views": "flips"},
      {"augment.flip": 0.0},
      "teacher_views: found 'flips', but config.augment.flip is 0",
    ),
    (ONLINE, {"finetune.terms.online.num_proposals": 2}, "num_proposals: found 2, .* smaller mask"),
  ],
)
def test_terms_that_would_not_do_what_they_say_raise(changes, bad, message):
  config_checks.validate(_config(**changes))
  with pytest.raises(ConfigError, match=message):
    config_checks.validate(_config(**changes, **bad))
