"""Every test runs on eight simulated CPU devices and refuses silent rank promotion."""

import fcntl
import os
import tempfile

import quick_xla

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {quick_xla.FLAGS}"
# Compiling is most of the tests' time. Machine code is made sooner (XLA's passes on arrays run all
# the same), and every worker and program that a test starts takes from one folder what another has
# compiled.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:
  _cache = tempfile.TemporaryDirectory(prefix="rndpo_jax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name

import jax
import native_jobs
import pytest
from absl import flags
from tiny_config import get_config

from launch import xla_flags
from rndpo_jax import pipeline

flags.FLAGS(["tests"])  # Grain and the programs' main read flags, which a program has parsed
xla_flags.tune()  # as the programs do that some tests start, so that equal results are equal
jax.config.update("jax_numpy_rank_promotion", "raise")


# The longest files, which start first: beside one that came last, the other worker would be idle.
LONGEST = (
  "multiprocess_test", "pipeline_test", "gpu_report_test", "run_test", "whole_jobs_test",
  "study_test", "native_pairs_test", "mesh_test", "fault_campaign_test", "mine_test", "unet_test",
  "never_worse_test", "native_whole_images_test", "native_job_test", "dry_run_test",
  "own_pairs_test", "phases_test", "finetune_test", "benchmark_network_test", "population_test",
  "augment_test", "sweep_test", "proposals_test", "mesh_config_test", "user_judges_test",
  "surroundings_test",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  places = {name: place for place, name in enumerate(LONGEST)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module")
def optimised():
  """Machine code as in use, for files whose subject is rounding."""
  jax.config.update("jax_disable_most_optimizations", False)
  with quick_xla.emitters_in_use():
    yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def emitters_in_use():
  """For a test whose bounds are near the rounding of what XLA's emitters in use make."""
  with quick_xla.emitters_in_use():
    yield


@pytest.fixture
def tiny_config():
  return get_config


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
  """Of all workers: what the first to need something has made there is there for the others."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny_run(shared_folder):
  """(config, work directory) of one undisturbed tiny run; tests must not change it."""
  config, workdir = get_config(), shared_folder / "tiny" / "run"
  with (shared_folder / "tiny.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    pipeline.run(config, workdir)
  return config, workdir


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def native_job(request, shared_folder):
  """(config, work directory, source) of a finished job in the native mode; not to be changed."""
  return native_jobs.make(shared_folder / f"native_{request.param}d", request.param)
