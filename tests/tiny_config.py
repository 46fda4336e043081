"""The whole job in seconds: a config for the tests, also for --config."""

from rndpo_jax import config as config_lib

PHANTOM = {"data.phantom.num_cases": 30, "data.phantom.size": (20, 18)}


def get_config(**changes):
  """A locked config; `changes` are flattened keys with '__' for the dots."""
  config = config_lib.base_config()
  config.update_from_flattened_dict(
    {
      "data.size": (16, 16),
      "data.num_labelled": 4,
      "data.num_val": 3,
      "data.num_test": 3,
      **(PHANTOM if changes.get("data__source", "phantom") == "phantom" else {}),
      "model.width": 8,
      "model.depth": 1,
      "base.num_steps": 40,
      "base.learning_rate": 0.05,
      "base.augment": False,
      "base.batch_size": 8,
      "base.warmup_steps": 2,
      "base.log_every_steps": 10,
      "base.eval_every_steps": 20,
      "proposals.mix": "base:1,mc_dropout+logit_noise:3",
      "mine.batch_size": 1,
      "mine.num_shards": 2,
      "mine.pairs_per_image": 2,
      "finetune.num_steps": 8,
      "finetune.batch_size": 8,
      "finetune.log_every_steps": 1,
      "finetune.eval_every_steps": 4,
      "evaluate.batch_size": 8,
      "judge.num_bootstrap": 20,
      "judge.gate.action": "off",  # a base of 40 steps on 4 cases, measured on 3
      **{key.replace("__", "."): value for key, value in changes.items()},
    }
  )
  return config.lock()
