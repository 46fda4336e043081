"""Bit planes: exact round trips and a plane by hand."""

from functools import partial

import jax
import numpy as np
import pytest

from rndpo_jax.losses import bit_planes


@pytest.mark.parametrize(
  "num_classes,bits", [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (256, 8)]
)
@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (3, 3, 3), (1, 1)])
def test_round_trip(num_classes, bits, shape):
  masks = np.random.default_rng(0).integers(0, num_classes, (2, 3, *shape)).astype(np.uint8)
  masks.reshape(-1)[0] = num_classes - 1
  pack = jax.jit(partial(bit_planes.pack, num_classes=num_classes, spatial_dims=len(shape)))
  unpack = jax.jit(partial(bit_planes.unpack, shape=shape, num_classes=num_classes))
  packed = pack(masks)
  assert packed.shape == (2, 3, bits, -(-np.prod(shape) // 8))
  assert packed.dtype == np.uint8
  back = unpack(packed)
  assert back.dtype == np.uint8
  np.testing.assert_array_equal(back, masks)


def test_planes_by_hand():
  masks = np.array([[3, 0, 1, 2, 0]], np.uint8)
  packed = bit_planes.pack(masks, 4, 2)
  # Low bits 1 0 1 0 0, high bits 1 0 0 1 0, first pixel in the highest bit of the byte.
  np.testing.assert_array_equal(packed, [[0b10100000], [0b10010000]])


def test_another_grid_is_refused():
  packed = bit_planes.pack(np.zeros((2, 4, 4), np.uint8), 2, 2)
  with pytest.raises(ValueError, match="another grid"):
    bit_planes.unpack(packed, (5, 4), 2)
  with pytest.raises(ValueError, match="another grid"):
    bit_planes.unpack(packed, (4, 4), 3)


@pytest.mark.parametrize("count", [1, 16, 37])
def test_bits_in_lanes_are_the_bits(count):
  """The form for TPU, on whatever device is here."""
  packed = np.random.default_rng(0).integers(0, 256, (2, 3, count)).astype(np.uint8)
  np.testing.assert_array_equal(bit_planes.bits_in_lanes(packed), np.unpackbits(packed, axis=-1))
