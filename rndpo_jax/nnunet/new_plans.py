"""`plans.json` and `dataset.json` of a network that nnU-Net has not trained, for its prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rndpo_jax.data import intensity
from rndpo_jax.models import nnunet
from rndpo_jax.models.nnunet_architecture import Architecture
from rndpo_jax.nnunet.preprocessing import ORDERS, RESAMPLING, SCHEMES, Preprocessing

_UNETS = "dynamic_network_architectures.architectures.unet"


class Files(NamedTuple):
  """What nnU-Net reads images with, and the ending of their names."""

  reader: str
  ending: str


NIFTI = Files("SimpleITKIO", ".nii.gz")
PICTURES = Files("NaturalImage2DIO", ".png")
_SCHEME_NAMES = {ours: theirs for theirs, ours in SCHEMES.items()}


def plans(
  name: str,
  configuration: str,
  architecture: Architecture,
  images: Preprocessing,
  files: Files = NIFTI,
) -> dict[str, Any]:
  """What `plans.json` holds.

  Args:
    name: of the data set.
    configuration: its name in the plans, as in 2d.
    architecture: axes in nnU-Net's order.
    images: spacing and patch size in nnU-Net's order, (y, x) or (z, y, x), (H, W) of pictures.
    files: that images are in.
  """
  shared = {
    "dataset_name": name,
    "plans_name": "nnUNetPlans",
    "image_reader_writer": files.reader,
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
      str(channel): {key: (of_channel or {})[key] for key in intensity.STATISTICS if of_channel}
      for channel, of_channel in enumerate(images.statistics)
    },
  }
  own = {
    "data_identifier": f"nnUNetPlans_{configuration}",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": list(images.patch_size),
    "spacing": list(images.spacing),
    "normalization_schemes": [
      _SCHEME_NAMES[scheme.removesuffix("_in_mask")] for scheme in images.schemes
    ],
    "use_mask_for_norm": [scheme.endswith("_in_mask") for scheme in images.schemes],
    **_resampling(),
    "architecture": _architecture(architecture),
    "batch_dice": False,
  }
  return {**shared, "configurations": {configuration: own}}


def dataset(
  class_names: Sequence[str], schemes: Sequence[str], has_ignored: bool, files: Files = NIFTI
) -> Mapping[str, Any]:
  """What `dataset.json` holds; class 0 is the background, whatever it is called."""
  names = ["background", *class_names[1:], *(["ignore"] if has_ignored else [])]
  return {
    "channel_names": {str(n): "CT" if name == "ct" else str(n) for n, name in enumerate(schemes)},
    "labels": {name: number for number, name in enumerate(names)},
    "file_ending": files.ending,
  }


def _resampling() -> dict[str, Any]:
  found = {}
  for what, order in ORDERS.items():
    found[f"resampling_fn_{what}"] = RESAMPLING
    found[f"resampling_fn_{what}_kwargs"] = {
      "is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None,
    }  # fmt: skip
  return found


def _architecture(made: Architecture) -> dict[str, Any]:
  dims = len(made.kernels[0])
  blocks = "n_blocks_per_stage" if made.is_residual else "n_conv_per_stage"
  return {
    "network_class_name": f"{_UNETS}.{'ResidualEncoder' if made.is_residual else 'PlainConv'}UNet",
    "arch_kwargs": {
      "n_stages": len(made.features),
      "features_per_stage": list(made.features),
      "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
      "kernel_sizes": [list(kernel) for kernel in made.kernels],
      "strides": [list(stride) for stride in made.strides],
      blocks: list(made.encoder_counts),
      "n_conv_per_stage_decoder": list(made.decoder_counts),
      "conv_bias": made.has_bias,
      "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
      "norm_op_kwargs": {"eps": nnunet.EPSILON, "affine": True},
      "dropout_op": None,
      "dropout_op_kwargs": None,
      "nonlin": "torch.nn.LeakyReLU",
      "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
  }
