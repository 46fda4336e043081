"""What describes a network of nnU-Net, from a plan or from a width and a depth."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

# Residual blocks of the encoder by level; deeper levels have as many as the last.
_RESIDUAL_BLOCKS = (1, 3, 4, 6)


class Architecture(NamedTuple):
  """What describes a network, finest level first.

  Attributes:
    is_residual: ResidualEncoderUNet, else PlainConvUNet.
    features: channels of each level.
    kernels: size of the convolutions of each level, an entry an axis.
    strides: of the first convolution of each level, an entry an axis; all 1 in the first level.
    encoder_counts: convolutions, or residual blocks, of each level of the encoder.
    decoder_counts: convolutions of each level of the decoder, COARSEST first, one entry less.
    has_bias: whether convolutions have a bias; the head always has one.
  """

  is_residual: bool
  features: tuple[int, ...]
  kernels: tuple[tuple[int, ...], ...]
  strides: tuple[tuple[int, ...], ...]
  encoder_counts: tuple[int, ...]
  decoder_counts: tuple[int, ...]
  has_bias: bool = True

  @property
  def divisors(self) -> tuple[int, ...]:
    """What the size of an image must be a multiple of, an entry an axis."""
    return tuple(math.prod(strides) for strides in zip(*self.strides, strict=True))

  def check(self) -> None:
    """Raises ValueError if the parts do not fit each other."""
    levels, dims = len(self.features), len(self.kernels[0])
    if {len(self.kernels), len(self.strides), len(self.encoder_counts)} != {levels}:
      raise ValueError(f"{self}: expected {levels} kernels, strides and encoder_counts")
    if len(self.decoder_counts) != levels - 1:
      raise ValueError(f"{self}: expected {levels - 1} decoder_counts")
    if any(len(entry) != dims for entry in (*self.kernels, *self.strides)) or dims not in (2, 3):
      raise ValueError(f"{self}: expected 2 or 3 axes, as many everywhere")

  def transposed(self, axes: tuple[int, ...]) -> Architecture:
    """The same network for images of which axis n is axis axes[n] of this one's."""

    def of_levels(levels):
      return tuple(tuple(level[axis] for axis in axes) for level in levels)

    return self._replace(kernels=of_levels(self.kernels), strides=of_levels(self.strides))

  def to_json(self) -> str:
    """The same as `config.model.architecture` has it."""
    return json.dumps(self._asdict())


def from_json(text: str) -> Architecture:
  """The inverse of `Architecture.to_json`.

  Raises:
    ValueError: if it is none.
  """
  content = json.loads(text)
  if not isinstance(content, dict) or content.keys() != set(Architecture._fields):
    raise ValueError(f"expected an object of {', '.join(Architecture._fields)}")
  levels = {key: content[key] for key in ("features", "encoder_counts", "decoder_counts")}
  axes = {key: content[key] for key in ("kernels", "strides")}
  rows = [*levels.values(), *(row for key in axes for row in axes[key])]
  if not all(isinstance(row, list) and all(type(n) is int and n > 0 for n in row) for row in rows):
    raise ValueError("expected lists of whole numbers above 0")
  made = Architecture(
    bool(content["is_residual"]),
    **{key: tuple(value) for key, value in levels.items()},
    **{key: tuple(map(tuple, value)) for key, value in axes.items()},
    has_bias=bool(content["has_bias"]),
  )
  made.check()
  return made


def derive(
  *, is_residual: bool, spatial_dims: int, width: int, depth: int, max_width: int
) -> Architecture:
  """An architecture as nnU-Net plans it for images whose pixels are as long as wide.

  Args:
    is_residual: ResidualEncoderUNet, else PlainConvUNet.
    spatial_dims: 2 or 3.
    width: channels of the first level; level l has min(width * 2**l, max_width).
    depth: levels.
    max_width: channels that no level exceeds.
  """
  blocks = tuple(_RESIDUAL_BLOCKS[min(n, len(_RESIDUAL_BLOCKS) - 1)] for n in range(depth))
  return Architecture(
    is_residual=is_residual,
    features=tuple(min(width * 2**level, max_width) for level in range(depth)),
    kernels=((3,) * spatial_dims,) * depth,
    strides=((1,) * spatial_dims, *((2,) * spatial_dims,) * (depth - 1)),
    encoder_counts=blocks if is_residual else (2,) * depth,
    decoder_counts=(1 if is_residual else 2,) * (depth - 1),
  )
