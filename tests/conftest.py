"""Every test runs on eight simulated CPU devices and refuses silent rank promotion."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import tempfile

import jax
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import pipeline

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests that run the same program again take it from here instead of compiling it.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="rndpo_jax_tests_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def make_tiny_config(**changes):
  """The whole job in seconds; `changes` are flattened keys with '__' for the dots."""
  config = config_lib.base_config()
  config.update_from_flattened_dict(
    {
      "data.size": (16, 16),
      "data.num_labelled": 4,
      "data.num_val": 3,
      "data.num_test": 3,
      "data.phantom.num_cases": 30,
      "data.phantom.size": (20, 18),
      "model.width": 4,
      "model.depth": 2,
      "base.num_steps": 20,
      "base.batch_size": 8,
      "base.warmup_steps": 2,
      "base.log_every_steps": 5,
      "base.eval_every_steps": 10,
      "proposals.mix": "base:1,mc_dropout+logit_noise:3",
      "mine.batch_size": 8,
      "mine.num_shards": 2,
      "mine.pairs_per_image": 2,
      "finetune.num_steps": 8,
      "finetune.batch_size": 8,
      "finetune.log_every_steps": 1,
      "finetune.eval_every_steps": 4,
      "evaluate.batch_size": 8,
      "judge.num_bootstrap": 20,
      **{key.replace("__", "."): value for key, value in changes.items()},
    }
  )
  return config.lock()


@pytest.fixture
def tiny_config():
  return make_tiny_config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """(config, work directory) of one undisturbed tiny run; tests must not change it."""
  config, workdir = make_tiny_config(), tmp_path_factory.mktemp("tiny") / "run"
  pipeline.run(config, workdir)
  return config, workdir
