"""The largest component of each class, against scipy's labelling."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from rndpo_jax.data import components


def by_scipy(mask, num_classes):
  kept = np.zeros_like(mask)
  for label in range(1, num_classes):
    found, count = ndimage.label(mask == label)
    if count:
      sizes = np.bincount(found.ravel(), minlength=count + 1)[1:]
      largest = [n + 1 for n in np.flatnonzero(sizes == sizes.max())]
      # Of equals that which holds the last pixel in row order.
      last = max(largest, key=lambda n: np.flatnonzero(found.ravel() == n)[-1])
      kept[found == last] = label
  return kept


@pytest.mark.parametrize("size", [(9, 12), (4, 5, 6)])
def test_components_are_those_of_scipy(size):
  rng = np.random.default_rng(0)
  masks = rng.choice(3, (6, *size), p=(0.4, 0.35, 0.25)).astype(np.uint8)
  masks[0] = 0  # an empty mask stays empty
  masks[1] = 2
  found = jax.jit(lambda x: components.largest(x, 3))(masks)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, np.stack([by_scipy(mask, 3) for mask in masks]))


@pytest.mark.parametrize("size", [(9, 12), (4, 5, 6)])
def test_one_component_is_taken_out_each_in_its_turn(size):
  rng = np.random.default_rng(1)
  masks = np.repeat(rng.choice(3, (1, *size), p=(0.7, 0.2, 0.1)).astype(np.uint8), 200, axis=0)
  masks[-1] = 0
  labels = [ndimage.label(masks[0] == label) for label in (1, 2)]
  parts = {(found == n).tobytes() for found, count in labels for n in range(1, count + 1)}
  assert len(parts) > 4
  left = np.asarray(
    jax.jit(components.without_one)(jax.random.split(jax.random.key(0), 200), masks)
  )
  assert not left[-1].any()
  gone = [(new != old).tobytes() for new, old in zip(left[:-1], masks[:-1], strict=True)]
  assert set(gone) == parts and not np.any(left[:-1][left[:-1] != masks[:-1]])


def test_a_long_snake_is_one_component():
  snake = np.zeros((1, 15, 15), np.uint8)
  snake[0, ::2] = 1
  for row in range(1, 15, 2):
    snake[0, row, -1 if row % 4 == 1 else 0] = 1
  spot = snake.copy()
  spot[0, 3, 5] = 0
  np.testing.assert_array_equal(components.largest(spot, 2), spot)
  cut = snake.copy()
  cut[0, 1, -1] = 0  # the first row alone
  expected = cut.copy()
  expected[0, 0] = 0
  np.testing.assert_array_equal(components.largest(cut, 2), expected)
