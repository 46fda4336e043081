"""figures: pixels of the tiles that a page shows."""

import base64
import io

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from rndpo_jax.report import figures


def _pixels(address):
  content = base64.b64decode(address.partition(",")[2])
  return matplotlib_image.imread(io.BytesIO(content), format="jpg").astype(int)


def test_tile_draws_outline_and_region_where_they_are():
  image = np.zeros((40, 40, 1), np.uint8)
  plain = _pixels(figures.tile(image))
  assert plain.shape == (220, 220, 3) and plain.max() < 8
  mask = np.zeros((40, 40), bool)
  mask[10:30, 10:30] = True
  red = _pixels(figures.tile(image, [(mask, "#ff0000", "solid")]))
  edge = red[110, 50:60]  # the left border of the mask, at pixel 10 of 40
  assert edge[:, 0].max() > 150 and edge[:, 1].max() < 90
  assert red[110, 110].max() < 30 and red[20, 20].max() < 30
  tinted = _pixels(figures.tile(image, fill=(mask, "#00ff00")))
  assert 80 < tinted[110, 110, 1] < 150 and tinted[20, 20].max() < 30


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_tile_draws_outlines_on_an_image_of_one_pixels_width(shape):
  mask = np.zeros(shape, bool)
  mask.flat[3:6] = True
  image = np.zeros((*shape, 1), np.uint8)
  assert figures.tile(image, [(mask, "red", "solid")]) != figures.tile(image)


def test_display_keeps_uint8_and_stretches_the_rest():
  image = np.full((4, 5, 1), 51, np.uint8)
  np.testing.assert_allclose(figures.display(image), np.full((4, 5), 0.2))
  floats = np.linspace(-3, 7, 400).reshape(20, 20, 1)
  shown = figures.display(floats)
  assert shown.shape == (20, 20) and shown.min() == 0 and shown.max() == 1
  assert figures.display(np.zeros((4, 5, 3), np.float32)).shape == (4, 5, 3)
  assert figures.display(np.zeros((4, 5, 2), np.float32)).shape == (4, 5)
