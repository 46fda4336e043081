"""Every test runs on eight simulated CPU devices and refuses silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def workdir_root(tmp_path_factory):
  """A folder that the tests of a session share."""
  return tmp_path_factory.mktemp("runs")
