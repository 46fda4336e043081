"""What is made of data or of a base is not used with another."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline, provenance
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import files
from rndpo_jax.stages import base, evaluate, finetune
from rndpo_jax.training import checkpoint, metric_writer


@pytest.fixture
def copied(tiny_run, tmp_path):
  """(config, a copy of the tiny run that may be changed)."""
  shutil.copytree(tiny_run[1], tmp_path / "run")
  return tiny_run[0], tmp_path / "run"


def replace_base(workdir):
  """Another base in the place of the one that the pairs were mined with, as after a retraining."""
  folder = workdir / "base" / "params"
  step = files.read_json(workdir / "base" / "selected.json")["step"]
  params = checkpoint.restore_params(folder, step, stage_directory=workdir / "base")
  shutil.rmtree(folder)
  params["head"]["bias"] = params["head"]["bias"] + np.float32(1e-3)
  checkpoint.save(folder, step, params)


def forget(workdir, *stages):
  """As if the stages had not run."""
  for name in stages:
    path = workdir / pipeline.DONE[name]
    shutil.rmtree(path.parent) if path.parent != workdir else path.unlink()


def test_pairs_of_another_base_are_refused_and_the_remedy_works(copied):
  given, workdir = copied
  replace_base(workdir)
  (workdir / "results.json").unlink()
  with pytest.raises(errors.ProvenanceError, match="finetune was not made from this base.* delete"):
    pipeline.run(given, workdir, ["evaluate"])
  forget(workdir, "finetune")
  with pytest.raises(errors.ProvenanceError, match="pairs was not made from this base: .*delete"):
    pipeline.run(given, workdir, ["finetune"])
  (workdir / "pairs" / "manifest.json").unlink()  # mining was not at its end
  with pytest.raises(errors.ProvenanceError, match="pairs was not made from this base: .*delete"):
    pipeline.run(given, workdir, ["mine"])
  before = files.read_json(workdir / "pairs" / "fingerprints.json")
  shutil.rmtree(workdir / "pairs")
  pipeline.run(given, workdir, ["mine", "finetune"])
  after = files.read_json(workdir / "pairs" / "manifest.json")["fingerprints"]
  assert {name for name in before if before[name] != after[name]} == {"base"}
  first = metric_writer.read_rows(workdir / "finetune", "train")[0]
  np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-3)


def test_a_fine_tuning_on_other_pairs_is_refused(copied):
  """As after new preferences of readers, whose pairs alone were mined again."""
  given, workdir = copied
  shutil.rmtree(workdir / "pairs")
  (workdir / "results.json").unlink()
  pipeline.run(given, workdir, ["mine", "finetune"])  # the same pairs again
  path = workdir / "pairs" / "manifest.json"
  manifest = files.read_json(path)
  manifest["shards"][0]["sha256"] = 64 * "0"
  files.write_json(path, manifest)
  message = "finetune was not made from this pairs: .* delete that folder"
  for run in (finetune.run, evaluate.run):
    with pytest.raises(errors.ProvenanceError, match=message):
      run(config_lib.of_phase(given), workdir)


def test_pairs_that_do_not_say_of_what_they_are_do_not_count(copied):
  given, workdir = copied
  for name in ("fingerprints.json", "manifest.json"):
    (workdir / "pairs" / name).unlink()
  with pytest.raises(errors.PairsError, match="fingerprints.json is missing.*delete that folder"):
    pipeline.run(given, workdir, ["mine"])


def test_a_base_of_other_data_is_refused_here_and_where_it_was_copied(
  copied, tiny_config, tmp_path
):
  given, workdir = copied
  there = tiny_config(base__workdir=str(workdir))
  pipeline.run(there, tmp_path / "other", ["base"])
  shutil.rmtree(workdir / "data")
  pipeline.run(given, workdir, ["prepare"])
  for settings, place in ((given, workdir), (there, tmp_path / "other")):
    base.load(place, dataset_lib.open_dataset(settings, place))  # raises nothing
  # The source has changed, as a folder of images does.
  pipeline.run(tiny_config(data__phantom__seed=5), tmp_path / "changed", ["prepare"])
  shutil.rmtree(workdir / "data")
  shutil.copytree(tmp_path / "changed" / "data", workdir / "data")
  forget(workdir, "finetune")
  stages = ((given, workdir, "finetune"), (there, tmp_path / "other", "mine"))
  for settings, place, stage in stages:
    with pytest.raises(errors.ProvenanceError, match="base was not made from this data"):
      pipeline.run(settings, place, [stage])


def test_where_a_stage_is_lost_those_after_it_look_again(copied, capsys):
  given, workdir = copied
  before = files.read_json(workdir / "results.json")
  shutil.rmtree(workdir / "data")
  pipeline.run(given, workdir)
  assert "done before" not in capsys.readouterr().out
  assert files.read_json(workdir / "results.json") == before
  pipeline.run(given, workdir)
  assert capsys.readouterr().out.count("done before") == 6
  shutil.rmtree(workdir / "data")
  replace_base(workdir)
  with pytest.raises(errors.ProvenanceError, match="pairs was not made from this base: .*delete"):
    pipeline.run(given, workdir)
  shutil.rmtree(workdir / "pairs")
  with pytest.raises(errors.ProvenanceError, match="finetune was not made from this base.* delete"):
    pipeline.run(given, workdir, ["mine", "finetune"])


def test_other_splits_are_other_data(tiny_config, tmp_path):
  fingerprints = []
  for seed in (0, 1):
    workdir = tmp_path / str(seed)
    pipeline.run(tiny_config(data__split_seed=seed), workdir, ["prepare"])
    fingerprints.append(files.read_json(workdir / "data" / "records.json")["fingerprint"])
  assert len(set(fingerprints)) == 2


def test_members_of_two_bases_do_not_meet(copied, tiny_config, tmp_path):
  """A kill between the members that are copied, then another base."""
  _, workdir = copied
  config = tiny_config(base__workdir=str(workdir))
  pipeline.run(config, tmp_path / "other", ["base"])
  (tmp_path / "other" / "base" / "selected.json").unlink()
  with pytest.raises(ConfigError, match="config.seed: was 0, is 7"):
    pipeline.run(tiny_config(base__workdir=str(workdir), seed=7), tmp_path / "other", ["base"])


def test_a_fingerprint_sees_names_shapes_dtypes_and_values():
  trees = [
    {"a": np.float32([1, 2])},
    {"b": np.float32([1, 2])},
    {"a": np.float32([[1, 2]])},
    {"a": np.int32(np.float32([1, 2]).view(np.int32))},
    {"a": np.float32([1, 3])},
  ]
  fingerprints = [provenance.fingerprint(tree) for tree in trees]
  assert len(set(fingerprints)) == 5 and len(fingerprints[0]) == 64
  assert provenance.fingerprint({"a": jnp.float32([1, 2])}) == fingerprints[0]
