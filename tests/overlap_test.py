"""Counts by matrix products against counts by hand and by elementwise numpy."""

import jax
import numpy as np
import pytest

from rndpo_jax import losses
from rndpo_jax.evaluation import metrics
from rndpo_jax.mining import overlap

pytestmark = pytest.mark.usefixtures("optimised")


def test_by_hand():
  masks = np.array([[[[1, 1], [0, 2]], [[1, 0], [0, 2]], [[0, 0], [0, 0]]]], np.uint8)
  dice = overlap.pairwise_dice(masks, masks, 3)[0]
  # Masks 0 and 1: class 1 shares 1 of 2 + 1, class 2 is the same. Mask 2 is empty.
  np.testing.assert_allclose(dice[0, 1], (2 / 3 + 1) / 2, rtol=1e-6)
  np.testing.assert_array_equal(dice[2], [0, 0, 1])
  size = overlap.pairwise_region_size(masks, 3)[0]
  np.testing.assert_array_equal(size, [[0, 1, 3], [1, 0, 2], [3, 2, 0]])
  assert size.dtype == np.int32


@pytest.mark.parametrize("num_classes,shape", [(2, (6, 5)), (4, (3, 4, 5)), (255, (9, 9))])
def test_equals_elementwise_counts(num_classes, shape):
  rng = np.random.default_rng(0)
  first = rng.integers(0, num_classes, (2, 3, *shape)).astype(np.uint8)
  second = rng.integers(0, num_classes, (2, 4, *shape)).astype(np.uint8)
  dice = jax.jit(overlap.pairwise_dice, static_argnums=2)(first, second, num_classes)
  size = jax.jit(overlap.pairwise_region_size, static_argnums=1)(first, num_classes)
  for i in range(2):
    for k in range(3):
      for m in range(4):
        counts = metrics.pixel_counts(first[i, k], second[i, m], num_classes)
        expected = metrics.overlap(counts)["dice"].mean()
        np.testing.assert_allclose(dice[i, k, m], expected, rtol=1e-5)
      differ = [(first[i, k] != first[i, m]).sum() for m in range(3)]
      np.testing.assert_array_equal(size[i, k], differ)


@pytest.mark.parametrize("classes", [(1,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_region_size_of_some_classes_is_that_of_the_margins(classes):
  masks = np.random.default_rng(0).integers(0, 4, (2, 3, 6, 5)).astype(np.uint8)
  size = overlap.pairwise_region_size(masks, 4, classes)
  for k, m in np.ndindex(3, 3):
    expected = losses.region_size(masks[:, k], masks[:, m], classes=classes)
    np.testing.assert_array_equal(size[:, k, m], expected)


def test_counts_stay_exact_where_lower_precision_would_round():
  # 2^17 + 1 pixels is no bfloat16 or float16 number.
  mask = np.zeros((1, 2, 2**18), np.uint8)
  mask[0, 0, : 2**17 + 1] = 1
  assert overlap.pairwise_region_size(mask, 2)[0, 0, 1] == 2**17 + 1


def test_too_many_pixels_are_refused():
  masks = jax.ShapeDtypeStruct((1, 2, 2**12 + 1, 2**12), np.uint8)
  with pytest.raises(ValueError, match="config.data.size"):
    jax.eval_shape(lambda m: overlap.pairwise_region_size(m, 2), masks)
