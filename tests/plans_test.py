"""plans: plans.json of either age to the same network; what is not supported raises by key."""

import copy
import json

import pth_files
import pytest

from rndpo_jax import errors
from rndpo_jax.models.nnunet_architecture import Architecture
from rndpo_jax.nnunet import plans

WANTED = Architecture(
  is_residual=False,
  features=(4, 8, 10),
  kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
  strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
  encoder_counts=(2, 2, 1),
  decoder_counts=(2, 1),
)
NETWORK = "dynamic_network_architectures.architectures.unet"
NEW = {
  "architecture": {
    "network_class_name": f"{NETWORK}.PlainConvUNet",
    "arch_kwargs": {
      "n_stages": 3,
      "features_per_stage": [4, 8, 10],
      "conv_op": "torch.nn.modules.conv.Conv3d",
      "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
      "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
      "n_conv_per_stage": [2, 2, 1],
      "n_conv_per_stage_decoder": [2, 1],
      "conv_bias": True,
      "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
      "norm_op_kwargs": {"eps": 1e-05, "affine": True},
      "dropout_op": None,
      "dropout_op_kwargs": None,
      "nonlin": "torch.nn.LeakyReLU",
      "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
  }
}
OLD = {
  "UNet_class_name": "PlainConvUNet",
  "UNet_base_num_features": 4,
  "unet_max_num_features": 10,
  "n_conv_per_stage_encoder": [2, 2, 1],
  "n_conv_per_stage_decoder": [2, 1],
  "num_pool_per_axis": [1, 2, 2],
  "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
  "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
}
DATASET = {
  "channel_names": {"0": "T1", "1": "T2"},
  "labels": {"background": 0, "organ": 1, "ignore": 2},
}


IMAGES = {
  "spacing": [5.0, 0.7, 0.8],
  "patch_size": [4, 32, 24],
  "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
  "use_mask_for_norm": [False, True],
}
OF_CT = {"mean": 50.0, "std": 20.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0}
STATISTICS = {"foreground_intensity_properties_per_channel": {"0": OF_CT}}


def write(folder, configurations, dataset=DATASET, **top):
  folder.mkdir(exist_ok=True)
  configurations = {name: {**IMAGES, **own} for name, own in configurations.items()}
  content = {"transpose_forward": [0, 1, 2], "configurations": configurations, **STATISTICS, **top}
  (folder / "plans.json").write_text(json.dumps(content))
  (folder / "dataset.json").write_text(json.dumps(dataset))
  return folder


def changed(**kwargs):
  """The new plans with other options of the network."""
  found = copy.deepcopy(NEW)
  found["architecture"]["arch_kwargs"].update(kwargs)
  return found


def test_new_and_old_plans_describe_the_same_network(tmp_path):
  for own in (NEW, OLD):
    found = plans.read(write(tmp_path, {"3d_fullres": own}), "3d_fullres")
    assert found[:5] == (WANTED, 2, 2, (2, 1, 0), ("background", "organ"))
  old = {**DATASET, "modality": DATASET["channel_names"]}
  del old["channel_names"]
  assert plans.read(write(tmp_path, {"3d_fullres": NEW}, old), "3d_fullres").num_channels == 2


def test_residual_networks_have_blocks():
  own = changed(n_blocks_per_stage=[1, 3, 4], n_conv_per_stage_decoder=[1, 1])
  own["architecture"]["network_class_name"] = f"{NETWORK}.ResidualEncoderUNet"
  del own["architecture"]["arch_kwargs"]["n_conv_per_stage"]
  found = plans.architecture_of(own)
  assert found == WANTED._replace(is_residual=True, encoder_counts=(1, 3, 4), decoder_counts=(1, 1))


def test_a_configuration_has_what_it_inherits_key_by_key():
  known = {
    "low": {"inherits_from": "full", "a": {"x": 2}},
    "full": {"a": {"x": 1, "y": 1}, "b": 3},
  }
  found = plans.resolve(known, "low")
  assert found["a"] == {"x": 2, "y": 1} and found["b"] == 3
  with pytest.raises(ValueError, match="'3d' is not there; known: low, full"):
    plans.resolve(known, "3d")
  with pytest.raises(ValueError, match="'a' inherits from itself"):
    plans.resolve({"a": {"inherits_from": "a"}}, "a")


def in_2d():
  kernels, strides = [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]]
  own = changed(kernel_sizes=kernels, strides=strides, conv_op="torch.nn.Conv2d")
  return {**own, "spacing": [0.7, 0.8], "patch_size": [32, 24]}


@pytest.mark.parametrize(
  "own,top,axes",
  [
    (NEW, {"transpose_forward": [1, 0, 2]}, (2, 0, 1)),
    (NEW, {"transpose_forward": [2, 0, 1]}, (0, 2, 1)),
    (in_2d(), {}, (1, 0)),
    (in_2d(), {"transpose_forward": [0, 2, 1]}, (0, 1)),
    (in_2d(), {"image_reader_writer": "NaturalImage2DIO"}, (0, 1)),
  ],
)
def test_where_nnunet_has_our_axes(tmp_path, own, top, axes):
  """Readers give (z, y, x), then transpose_forward; ours are (x, y, z), or (H, W) of pictures."""
  assert plans.read(write(tmp_path, {"c": own}, **top), "c").axes == axes


def test_how_images_go_in_is_read_in_our_order_of_axes(tmp_path):
  """Statistics are those of the plans, under either of their names."""
  old = {
    "foreground_intensity_properties_per_channel": None,
    "foreground_intensity_properties_by_modality": {"0": OF_CT},
  }
  wanted = (0.8, 0.7, 5.0), (24, 32, 4), ("ct", "zscore_in_mask"), (OF_CT, None)
  for top in ({}, old):
    assert plans.read(write(tmp_path, {"c": NEW}, **top), "c").preprocessing == wanted
  turned = write(tmp_path, {"c": NEW}, transpose_forward=[1, 0, 2])
  assert plans.read(turned, "c").preprocessing.spacing == (0.8, 5.0, 0.7)
  assert plans.read(write(tmp_path, {"c": in_2d()}), "c").preprocessing.patch_size == (24, 32)


@pytest.mark.parametrize(
  "key,value,message",
  [
    ("preprocessor_name", "MyPreprocessor", "expected 'DefaultPreprocessor'"),
    ("resampling_fn_data", "no_resampling", "expected 'resample_data_or_seg_to_shape' with"),
    ("resampling_fn_seg_kwargs", {"order": 0}, "expected 'resample_data_or_seg_to_shape' with"),
    (
      "resampling_fn_data_kwargs",
      {"separate_z_anisotropy_threshold": 2},
      "anisotropy_threshold': 3",
    ),
    ("normalization_schemes", ["CTNormalization"], "1 entries and 'use_mask_for_norm' 2, expected"),
    ("normalization_schemes", ["Mine"] * 2, "has 'Mine', expected one of ZScoreNormalization"),
    ("spacing", [1.0, 1.0], r"is \[1.0, 1.0\], expected 3 numbers"),
    ("patch_size", [4, 32, 0], "expected numbers above 0"),
  ],
)
def test_another_preprocessing_raises_naming_the_key(tmp_path, key, value, message):
  folder = write(tmp_path, {"3d": {**NEW, key: value}})
  with pytest.raises(
    errors.FileError, match=f"plans.json: 3d: '{key.replace('_kwargs', '')}'.*{message}"
  ):
    plans.read(folder, "3d")


@pytest.mark.parametrize(
  "own,message",
  [
    (changed(norm_op="torch.nn.BatchNorm3d"), "'norm_op' is 'torch.nn.BatchNorm3d', expected inst"),
    (changed(norm_op_kwargs={"eps": 1e-3, "affine": True}), "'norm_op_kwargs' is"),
    (changed(norm_op_kwargs={"eps": 1e-5}), "'norm_op_kwargs' is"),
    (changed(nonlin="torch.nn.ReLU"), "'nonlin' is"),
    (changed(nonlin_kwargs={"negative_slope": 0.1}), "'nonlin_kwargs' is 0.1"),
    (changed(dropout_op="torch.nn.Dropout3d"), "'dropout_op' is"),
    (changed(bottleneck_channels=[8]), r"'arch_kwargs' has 'bottleneck_channels': \[8\], not supp"),
    (changed(strides=[[1, 1, 1]]), "expected 3 kernels, strides and encoder_counts"),
    (changed(kernel_sizes=3), "the network's kernels are 3, expected lists of whole numbers"),
    (changed(features_per_stage=None), "the network's features are None"),
    (changed(n_stages=4), "'n_stages' is not the number"),
    ({**NEW, "previous_stage": "3d_lowres"}, "'previous_stage' is set: a cascade is not supported"),
    ({**OLD, "UNet_class_name": "Primus"}, "the network Primus is not supported; known: PlainConv"),
    ({"architecture": {}}, "'network_class_name' is None, expected str"),
    ({}, "'UNet_class_name' is None"),
  ],
)
def test_another_network_raises_naming_file_and_key(tmp_path, own, message):
  folder = write(tmp_path / pth_files.FOLDER, {"3d": own})
  with pytest.raises(errors.FileError, match=f"{pth_files.FOLDER}/plans.json: 3d: .*{message}"):
    plans.read(folder, "3d")


def test_ct_without_its_statistics_raises(tmp_path):
  folder = write(tmp_path, {"c": NEW}, foreground_intensity_properties_per_channel={"0": {}})
  with pytest.raises(errors.FileError, match="plans.json: c: .* lacks 'mean' of channel 0"):
    plans.read(folder, "c")


def test_ids_may_be_texts_as_in_nnunet(tmp_path):
  labels = {"background": "0", "b": "2", "a": "1", "ignore": "3"}
  found = plans.read(write(tmp_path, {"c": NEW}, {**DATASET, "labels": labels}), "c")
  assert found.class_names == ("background", "a", "b")


def test_regions_and_slices_along_another_axis_raise(tmp_path):
  regions = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": [2]}}
  with pytest.raises(errors.FileError, match="dataset.json: 'labels' .* regions .* not supported"):
    plans.read(write(tmp_path, {"c": NEW}, regions), "c")
  with pytest.raises(errors.FileError, match="only slices along z"):
    plans.read(write(tmp_path, {"c": in_2d()}, transpose_forward=[1, 0, 2]), "c")
  for reader in ("NibabelIOWithReorient", "SimpleITKIOWithReorient"):
    with pytest.raises(errors.FileError, match=f"'image_reader_writer' is '{reader}': turning im"):
      plans.read(write(tmp_path, {"c": NEW}, image_reader_writer=reader), "c")
  with pytest.raises(errors.FileError, match="'MyReader', expected one of nnU-Net's own, Nat"):
    plans.read(write(tmp_path, {"c": NEW}, image_reader_writer="MyReader"), "c")
  with pytest.raises(errors.DataError, match="dataset.json: no such file"):
    (tmp_path / "dataset.json").unlink()
    plans.read(tmp_path, "c")
