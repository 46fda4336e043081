"""Every test runs on eight simulated CPU devices and refuses silent rank promotion."""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import tempfile

import jax
import pytest
from absl import flags
from tiny_config import get_config

from launch import cpu
from rndpo_jax import pipeline

flags.FLAGS(["tests"])  # Grain and the programs' main read flags, which a program has parsed
cpu.tune()  # as the programs do that some tests start, so that equal results are equal
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests that run the same program again take it from here instead of compiling it.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="rndpo_jax_tests_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def tiny_config():
  return get_config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """(config, work directory) of one undisturbed tiny run; tests must not change it."""
  config, workdir = get_config(), tmp_path_factory.mktemp("tiny") / "run"
  pipeline.run(config, workdir)
  return config, workdir
