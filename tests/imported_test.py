"""imported: what plans decide reaches the config, and data that do not fit the model raise."""

import types

import jax
import native_data
import nnunet_models
import numpy as np
import pth_files
import pytest

from configs import nnunet_model
from rndpo_jax import errors, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.nnunet import checkpoint_pth, folder, imported
from rndpo_jax.stages import base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  nnunet_models.write(path, ("0", "3"))
  return path


def config_of(model, **changes):
  config = nnunet_model.get_config()
  with config.unlocked():
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({"base.nnunet_folder": str(model), **changes})
  return config


def test_the_plans_decide_network_and_images(model):
  config = imported.resolve(config_of(model))
  assert config.data.spacing == (1.5, 1.25) and config.data.patch_size == (12, 10)
  assert config.data.schemes == ("zscore",) and config.data.statistics == ""
  assert (config.data.num_classes, config.data.spatial_dims, config.base.num_members) == (3, 2, 1)
  assert config.model.name == "nnunet_plain"
  network = models.architecture(config.model, spatial_dims=2)
  assert network == nnunet_models.MADE.transposed((1, 0))
  assert models.divisors(config.model, spatial_dims=2) == (2, 1)
  assert imported.resolve(config) == config
  assert imported.resolve(nnunet_model.get_config()).data.spacing == ()


@pytest.mark.parametrize(
  "key,value,message",
  [
    (
      "data.patch_size",
      (16, 16),
      r"config.data.patch_size: found \(16, 16\), but .* has \(12, 10\)",
    ),
    ("data.spatial_dims", 3, "config.data.spatial_dims: found 3, but .* has 2; leave it out"),
    ("data.num_classes", 4, "config.data.num_classes: found 4, but .* has 3"),
    ("base.num_members", 2, "config.base.num_members: found 2, but .* has 1"),
    ("base.fold", "1", "fold_1/checkpoint_final.pth: .*No such file"),
    ("base.fold", "0,0", "config.base.fold: found '0,0', expected a number, several as 0,1,2"),
    ("base.fold", "best", "config.base.fold: found 'best'"),
    ("base.nnunet_folder", "/no/such/folder", "/no/such/folder/fold_0/checkpoint_final.pth"),
  ],
)
def test_what_the_model_does_not_have_raises_naming_the_key(model, key, value, message):
  with pytest.raises(errors.RndpoError, match=message):
    imported.resolve(config_of(model, **{key: value}))


@pytest.mark.parametrize("key", ["base.num_steps", "model.width", "augment.flip", "data.size"])
def test_keys_of_a_training_that_does_not_happen_raise(model, key, tmp_path):
  value = {"data.size": (32, 32), "augment.flip": 0.25}.get(key, 7)
  with pytest.raises(errors.ConfigError, match=f"config.{key}: found .*, which nothing reads"):
    pipeline.run(config_of(model, **{key: value}), tmp_path / "work")


@pytest.mark.parametrize(
  "num_channels,names,message",
  [
    (2, ["background", "a", "b"], "trained on 1 channels, the images of config.data.root have 2"),
    (1, ["background", "a"], "has the classes background, a, b, the data background, a; relabel"),
    (1, ["background", "b", "a"], "the class 'b' has the id 1 in the data and 2 in"),
    (1, None, "was trained on no pictures, and config.data.root holds pictures; their axes differ"),
  ],
)
def test_other_data_raise(model, num_channels, names, message):
  dataset = types.SimpleNamespace(
    num_channels=num_channels, class_names=names, spacing_unit="mm" if names else "voxel"
  )
  with pytest.raises(errors.DataError, match=message):
    imported.read(config_of(model), "0", dataset)


def test_other_names_of_the_same_classes_are_said(model, capsys):
  dataset = types.SimpleNamespace(
    num_channels=1, class_names=["background", "left", "right"], spacing_unit="mm"
  )
  imported.read(config_of(model), "0", dataset)
  assert "(background, left, right) are taken for those of the model" in capsys.readouterr().out


def test_folds_become_the_members_of_the_base(model, tmp_path):
  root = native_data.write(tmp_path / "raw", 6)
  changes = {"data.num_val": 2, "data.num_test": 2, "evaluate.batch_size": 8}
  config = config_of(model, **changes, **{"data.root": str(root), "base.fold": "3,0"})
  work = tmp_path / "work"
  pipeline.run(config, work, ("prepare", "base"))
  config = imported.resolve(config)
  dataset = dataset_lib.open_dataset(config, work)
  for member, fold in enumerate((3, 0)):
    wanted = folder.read(model, fold).params
    jax.tree.map(np.testing.assert_array_equal, base.load(work, dataset, member), wanted)
  for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
    assert (work / "base" / "nnunet" / name).read_bytes() == (model / name).read_bytes()
  assert imported.kept_fold(work / "base" / "nnunet") == "3"
  assert (work / "base" / "metrics.jsonl").read_text().count("val_dice") == 1


def test_a_model_that_was_trained_without_flips_is_shown_none(tmp_path):
  nnunet_models.write(tmp_path)
  path = tmp_path / "fold_0" / "checkpoint_final.pth"
  weights = checkpoint_pth.read(path).weights
  pipeline.check_here(imported.resolve(config_of(tmp_path)))
  for axes in ((1,), None):
    pth_files.write(path, weights, inference_allowed_mirroring_axes=axes)
    given = imported.resolve(config_of(tmp_path))
    with pytest.raises(errors.ConfigError, match="not trained on flips") as refusal:
      pipeline.check_here(given)
    assert str(refusal.value).endswith("set --config.proposals.mix=base:1,threshold:7")
    changes = {"finetune.augment": True, "finetune.reference": "online", "augment.turn": 0.0}
    given.update_from_flattened_dict({**changes, "proposals.mix": "base:1, tta:3"})
    with pytest.raises(errors.ConfigError, match="so config.augment.flip=0.5, ") as refusal:
      pipeline.check_here(given)
    wanted = "--config.augment.flip=0.0 --config.proposals.mix=base:1,threshold:3"
    assert str(refusal.value).endswith(wanted)
    given.update_from_flattened_dict({"augment.flip": 0.0, "proposals.mix": "base:1,threshold:3"})
    pipeline.check_here(given)
