"""Masks as bit planes: class ids in ceil(log2 C) bits a pixel, eight pixels a byte."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def num_bits(num_classes: int) -> int:
  """Bit planes that class ids 0..C-1 need, at least 1."""
  return max(1, (num_classes - 1).bit_length())


def pack(masks: jax.Array, num_classes: int, spatial_dims: int) -> jax.Array:
  """Packs masks into bit planes, the lowest bit first.

  Args:
    masks: u8[..., *S] class ids below `num_classes`; `unpack` returns them exactly.
    num_classes: C, 2..256.
    spatial_dims: number of axes in S.

  Returns:
    u8[..., bits, ceil(n / 8)], n the number of pixels; the last byte is padded with zeros.
  """
  lead = masks.shape[: masks.ndim - spatial_dims]
  flat = masks.reshape(*lead, math.prod(masks.shape[masks.ndim - spatial_dims :]))
  planes = [(flat >> bit) & 1 for bit in range(num_bits(num_classes))]
  return jnp.packbits(jnp.stack(planes, axis=-2), axis=-1)


def unpack(packed: jax.Array, shape: tuple[int, ...], num_classes: int) -> jax.Array:
  """Undoes `pack`.

  Args:
    packed: u8[..., bits, ceil(n / 8)].
    shape: S, of n pixels.
    num_classes: C, as it was packed.

  Returns:
    u8[..., *S].

  Raises:
    ValueError: `packed` does not have the shape that S and C give.
  """
  count, bits = math.prod(shape), num_bits(num_classes)
  if packed.shape[-2:] != (bits, -(-count // 8)):
    raise ValueError(
      f"packed masks end in {tuple(packed.shape[-2:])}, but {num_classes} classes on {shape} need "
      f"{(bits, -(-count // 8))}: they were packed for another grid or number of classes"
    )
  planes = jax.lax.platform_dependent(packed, tpu=bits_in_lanes, default=_bits)[..., :count]
  values = sum(planes[..., bit, :] << bit for bit in range(bits))
  return values.reshape(*packed.shape[:-2], *shape)


def _bits(packed):
  """u8[..., n] -> u8[..., 8 n], the highest bit first."""
  return jnp.unpackbits(packed, axis=-1)


def bits_in_lanes(packed):
  """`_bits` for TPU, where an array [..., n, 8] fills 8 of 128 lanes.

  A product with zeros and ones, exact in bfloat16 up to 256, repeats the bytes along the lanes.
  """
  lanes = np.arange(128)
  repeat = jnp.asarray(lanes // 8 == np.arange(16)[:, None], jnp.bfloat16)
  *lead, count = packed.shape
  rows = jnp.pad(packed, [(0, 0)] * len(lead) + [(0, -count % 16)])
  rows = rows.reshape(*lead, -1, 16).astype(jnp.bfloat16)
  repeated = jnp.matmul(rows, repeat, preferred_element_type=jnp.float32).astype(jnp.int32)
  bits = (repeated >> (7 - lanes % 8).astype(np.int32)[(None,) * (repeated.ndim - 1)]) & 1
  return bits.astype(jnp.uint8).reshape(*lead, -1)[..., : 8 * count]
