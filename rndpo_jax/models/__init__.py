"""Segmenters: `build` turns a model config into a `types.Segmenter` of pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import errors, types, user_code
from rndpo_jax.models import nnunet, nnunet_architecture, unet, user_models

# Channels in a tile of a TPU's memory, and multipliers along a side of v5e's matrix units.
# Source: the page "System architecture" (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
TPU_LANES = 128


def _unet(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  return unet.build(
    num_classes=num_classes,
    spatial_dims=spatial_dims,
    width=model_config.width,
    depth=model_config.depth,
    max_width=model_config.max_width,
    norm=model_config.norm,
    dropout=model_config.dropout,
    dtype=jnp.dtype(model_config.dtype),
    remat=model_config.remat,
    lanes=lanes(model_config),
  )


def _nnunet(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  return nnunet.build(
    architecture(model_config, spatial_dims=spatial_dims),
    num_classes=num_classes,
    dtype=jnp.dtype(model_config.dtype),
    remat=model_config.remat,
  )


def architecture(model_config, *, spatial_dims: int) -> nnunet_architecture.Architecture:
  """The network of nnU-Net that `model.architecture`, or without it width and depth, describe.

  Raises:
    ConfigError: if `model.architecture` is none, or of another network than `model.name`.
  """
  is_residual = model_config.name == "nnunet_residual"
  if not model_config.architecture:
    return nnunet_architecture.derive(
      is_residual=is_residual,
      spatial_dims=spatial_dims,
      width=model_config.width,
      depth=model_config.depth,
      max_width=model_config.max_width,
    )
  try:
    made = nnunet_architecture.from_json(model_config.architecture)
  except ValueError as error:
    raise errors.ConfigError(
      f"config.model.architecture: found {model_config.architecture!r}: {error}"
    ) from error
  if made.is_residual != is_residual or len(made.kernels[0]) != spatial_dims:
    raise errors.ConfigError(
      f"config.model.architecture: it has {len(made.kernels[0])} axes and is_residual="
      f"{made.is_residual}, but config.model.name={model_config.name!r} and "
      f"config.data.spatial_dims={spatial_dims}"
    )
  return made


def has_architecture(model_config) -> bool:
  """Whether `model.architecture` says what network it is, and not width and depth."""
  is_ours = model_config.name in ARCHITECTURES
  return is_ours and reads(model_config.name, "architecture") and bool(model_config.architecture)


def divisors(model_config, *, spatial_dims: int) -> tuple[int, ...]:
  """What the size of an image must be a multiple of, an entry an axis."""
  if has_architecture(model_config):
    return architecture(model_config, spatial_dims=spatial_dims).divisors
  return (2 ** (model_config.depth - 1),) * spatial_dims


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    make: its builder, called as `build` calls it.
    options: the keys of `config.model` that it reads and other rows may not.
  """

  make: Callable[..., types.Segmenter]
  options: tuple[str, ...] = ()


# By `config.model.name`: a new one is one file and a line.
ARCHITECTURES = {
  "unet": Row(_unet, options=("norm", "dropout", "lanes")),
  "nnunet_plain": Row(_nnunet, options=("architecture",)),
  "nnunet_residual": Row(_nnunet, options=("architecture",)),
}


def build(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  """Builds the segmenter that `config.model` describes; `config.model.name` chooses which.

  Args:
    model_config: `config.model`.
    num_classes: C, background among them.
    spatial_dims: 2 or 3.

  Returns:
    A Segmenter; its logits are f32[B, *S, C] whatever the compute dtype.

  Raises:
    ConfigError: as `user_models.load`, or if the user's function raises or returns something else.
  """
  name = model_config.name
  if name in ARCHITECTURES:
    make = ARCHITECTURES[name].make
    return make(model_config, num_classes=num_classes, spatial_dims=spatial_dims)
  return user_models.build(model_config, num_classes=num_classes, spatial_dims=spatial_dims)


def check_name(name: str) -> None:
  """Checks that a name is of ARCHITECTURES, or reads as `package.module:function`.

  Raises:
    ConfigError: otherwise.
  """
  if name not in ARCHITECTURES and not user_code.is_name(name):
    raise errors.ConfigError(
      f"config.model.name: found {name!r}, expected one of {', '.join(ARCHITECTURES)}, or a "
      "function of your own as package.module:function"
    )


def reads(name: str, option: str) -> bool:
  """Whether a network reads a key of `config.model`; a function of one's own may read all."""
  return name not in ARCHITECTURES or option in ARCHITECTURES[name].options


def lanes(model_config, platform: str | None = None) -> int:
  """`config.model.lanes`; 0 is the number of a platform, by default that of this process."""
  platform = platform or jax.default_backend()
  return model_config.lanes or (TPU_LANES if platform == "tpu" else 1)
