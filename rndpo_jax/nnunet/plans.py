"""Reads nnU-Net's `plans.json` and `dataset.json`, of version 2, old plans (before 2.3.1) too.

What would need another network, or another use of its logits, raises FileError naming the key.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rndpo_jax import errors
from rndpo_jax.data import records
from rndpo_jax.models import nnunet
from rndpo_jax.models.nnunet_architecture import Architecture
from rndpo_jax.nnunet import preprocessing
from rndpo_jax.nnunet.preprocessing import Preprocessing

_NETWORKS = {"PlainConvUNet": False, "ResidualEncoderUNet": True}  # name -> is_residual
_NORM = {"eps": nnunet.EPSILON, "affine": True}
_IGNORE = "ignore"  # nnU-Net's name for pixels of unknown class
_PICTURES = "NaturalImage2DIO"  # nnU-Net's reader of them
# Others of its own that turn no image.
_READERS = (_PICTURES, "SimpleITKIO", "NibabelIO", "Tiff3DIO")
_REMEDY = "expected what nnU-Net v2 wrote beside its folds"


class Plans(NamedTuple):
  """What plans say of the network of a configuration.

  Attributes:
    architecture: axes in nnU-Net's order.
    num_channels: I.
    num_classes: C, background among them.
    axes: axis n of our images (x, y, z), slices (x, y) or pictures (H, W) is nnU-Net's axis
      axes[n].
    class_names: one a class, background first.
    of_pictures: whether it was trained on PNG and the like, whose axes are (H, W).
    preprocessing: how images come to the network, in our order of axes.
  """

  architecture: Architecture
  num_channels: int
  num_classes: int
  axes: tuple[int, ...]
  class_names: tuple[str, ...]
  of_pictures: bool
  preprocessing: Preprocessing


def read(folder: os.PathLike | str, configuration: str) -> Plans:
  """Reads `plans.json` and `dataset.json` of a model folder.

  Args:
    folder: as in .../nnUNetTrainer__nnUNetPlans__2d.
    configuration: a name of the plans, as in 2d.

  Raises:
    errors.FileError: naming file and key: it is missing or of another type, or asks for what is not
      supported: another network, norm or nonlinearity, dropout, a cascade, regions, 2D slices along
      another axis than z, another preprocessing.
    errors.DataError: if a file is missing or is no JSON.
  """
  folder = pathlib.Path(folder)
  plans = records.read_json(folder / "plans.json", _REMEDY)
  dataset = records.read_json(folder / "dataset.json", _REMEDY)
  try:
    channels, names = _num_channels(dataset), _class_names(dataset)
  except ValueError as error:
    raise errors.FileError(f"{folder / 'dataset.json'}: {error}") from error
  try:
    own = resolve(_get(plans, "configurations", dict), configuration)
    if own.get("previous_stage"):
      raise ValueError("'previous_stage' is set: a cascade is not supported; take 3d_fullres")
    architecture = architecture_of(own)
    axes = _axes(plans, len(architecture.kernels[0]))
    images = preprocessing.read(plans, own, num_channels=channels, axes=axes)
  except (ValueError, TypeError) as error:
    raise errors.FileError(f"{folder / 'plans.json'}: {configuration}: {error}") from error
  of_pictures = plans.get("image_reader_writer") == _PICTURES
  return Plans(architecture, channels, len(names), axes, names, of_pictures, images)


def resolve(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A configuration with what it inherits.

  Raises:
    ValueError: if it, or one that it inherits from, is not there, or inherits from itself.
  """
  seen, chain = [], []
  while name is not None:
    if name in seen or not isinstance(configurations.get(name), dict):
      found = "inherits from itself" if name in seen else "is not there"
      raise ValueError(f"configuration {name!r} {found}; known: {', '.join(configurations)}")
    seen.append(name)
    chain.append(configurations[name])
    name = chain[-1].get("inherits_from")
  own: dict[str, Any] = {}
  for entry in reversed(chain):
    own = _merged(own, entry)
  return own


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
  both = {
    key: _merged(below[key], value)
    for key, value in above.items()
    if isinstance(value, dict) and isinstance(below.get(key), dict)
  }
  return {**below, **above, **both}


def architecture_of(own: Mapping[str, Any]) -> Architecture:
  """The network of a configuration, of `architecture` or of the keys of old plans.

  Raises:
    ValueError: naming the key.
  """
  if "architecture" not in own:
    return _of_old_plans(own)
  described = _get(own, "architecture", dict)
  is_residual = _is_residual(_get(described, "network_class_name", str))
  options = dict(_get(described, "arch_kwargs", dict))
  _check_layers(options)
  made = _make(
    is_residual,
    features=options.pop("features_per_stage", None),
    kernels=options.pop("kernel_sizes", None),
    strides=options.pop("strides", None),
    encoder_counts=options.pop(f"n_{'blocks' if is_residual else 'conv'}_per_stage", None),
    decoder_counts=options.pop("n_conv_per_stage_decoder", None),
    has_bias=options.pop("conv_bias", False),
  )
  if options.pop("n_stages", len(made.features)) != len(made.features):
    raise ValueError("'n_stages' is not the number of 'features_per_stage'")
  unknown = [key for key, value in options.items() if value]
  if unknown:
    raise ValueError(f"'arch_kwargs' has {unknown[0]!r}: {options[unknown[0]]!r}, not supported")
  return made


def _of_old_plans(own: Mapping[str, Any]) -> Architecture:
  is_residual = _is_residual(_get(own, "UNet_class_name", str))
  kernels = _get(own, "conv_kernel_sizes", list)
  width, most = (_get(own, f"{n}_num_features", int) for n in ("UNet_base", "unet_max"))
  return _make(
    is_residual,
    features=[min(width * 2**level, most) for level in range(len(kernels))],
    kernels=kernels,
    strides=own.get("pool_op_kernel_sizes"),
    encoder_counts=own.get("n_conv_per_stage_encoder"),
    decoder_counts=own.get("n_conv_per_stage_decoder"),
    has_bias=True,
  )


def _is_residual(name: str) -> bool:
  short = name.rsplit(".", 1)[-1]
  if short not in _NETWORKS:
    raise ValueError(f"the network {name} is not supported; known: {', '.join(_NETWORKS)}")
  return _NETWORKS[short]


def _check_layers(options: dict[str, Any]) -> None:
  """Takes out what names layers, if they are ours."""
  norm, nonlin = options.pop("norm_op", None), options.pop("nonlin", None)
  settings = options.pop("norm_op_kwargs", None) or {}
  slope = (options.pop("nonlin_kwargs", None) or {}).get("negative_slope", nnunet.SLOPE)
  conv, dropout = options.pop("conv_op", None), options.pop("dropout_op", None)
  options.pop("dropout_op_kwargs", None)
  found = {
    "norm_op": (norm, _ends(norm, ("InstanceNorm2d", "InstanceNorm3d"))),
    "norm_op_kwargs": (settings, {**{"eps": 1e-5, "affine": False}, **settings} == _NORM),
    "nonlin": (nonlin, _ends(nonlin, ("LeakyReLU",))),
    "nonlin_kwargs": (slope, slope == nnunet.SLOPE),
    "conv_op": (conv, _ends(conv, ("Conv2d", "Conv3d"))),
    "dropout_op": (dropout, dropout is None),
  }
  for key, (value, is_ours) in found.items():
    if not is_ours:
      raise ValueError(
        f"'{key}' is {value!r}, expected instance normalisation with epsilon 1e-5 and affine, "
        "leaky ReLU with slope 0.01 and no dropout, as nnU-Net plans them"
      )


def _ends(name: Any, known: tuple[str, ...]) -> bool:
  return isinstance(name, str) and name.rsplit(".", 1)[-1] in known


def _make(is_residual: bool, *, has_bias: Any, **levels: Any) -> Architecture:
  """An architecture of lists as JSON has them."""
  for key, value in levels.items():
    nested = key in ("kernels", "strides")
    rows = value if nested and isinstance(value, list) else [value]
    if not all(isinstance(row, list) and all(_is_count(n) for n in row) for row in rows):
      raise ValueError(f"the network's {key} are {value!r}, expected lists of whole numbers")
    levels[key] = tuple(map(tuple, rows)) if nested else tuple(value)
  made = Architecture(is_residual, **levels, has_bias=bool(has_bias))
  made.check()
  return made


def _is_count(value: Any) -> bool:
  return type(value) is int and value > 0


def _axes(plans: Mapping[str, Any], dims: int) -> tuple[int, ...]:
  """Of our axes, nnU-Net's; its readers give (z, y, x), or (1, H, W) of a picture."""
  forward = _get(plans, "transpose_forward", list)
  if sorted(forward) != [0, 1, 2]:
    raise ValueError(f"'transpose_forward' is {forward!r}, expected an order of 0, 1, 2")
  reader = plans.get("image_reader_writer")
  if str(reader).endswith("WithReorient"):
    raise ValueError(f"'image_reader_writer' is {reader!r}: turning images is not supported")
  if reader is not None and reader not in _READERS:
    raise ValueError(
      f"'image_reader_writer' is {reader!r}, expected one of nnU-Net's own, {', '.join(_READERS)}: "
      "what another does to images is unknown"
    )
  if dims == 3:
    return tuple(forward.index(2 - axis) for axis in range(3))
  if forward[0] != 0:
    raise ValueError(f"'transpose_forward' is {forward!r}: only slices along z are supported")
  is_picture = reader == _PICTURES
  return tuple(forward.index(1 + axis if is_picture else 2 - axis) - 1 for axis in range(2))


def _num_channels(dataset: Mapping[str, Any]) -> int:
  names = dataset.get("channel_names") or dataset.get("modality")
  if not isinstance(names, dict):
    raise ValueError(f"'channel_names' is {names!r}, expected numbers and names")
  return len(names)


def _class_names(dataset: Mapping[str, Any]) -> tuple[str, ...]:
  labels = {
    name: int(value) if isinstance(value, str) and value.isdecimal() else value
    for name, value in _get(dataset, "labels", dict).items()
  }
  if any(not isinstance(value, int) for value in labels.values()):
    raise ValueError(f"'labels' is {labels!r}; regions (lists of ids) are not supported")
  return tuple(sorted((name for name in labels if name != _IGNORE), key=labels.get))


def _get(content: Mapping[str, Any], key: str, kind: type) -> Any:
  found = content.get(key)
  if not isinstance(found, kind):
    raise ValueError(f"{key!r} is {found!r}, expected {kind.__name__}; {_REMEDY}")
  return found
