"""data.resample: values by hand, and scipy's zoom, which is the definition."""

import numpy as np
import pytest
from scipy import ndimage

from rndpo_jax.data import resample

ISO = (1.0, 1.0, 1.0)


def _zoom(values, new_shape, order):
  factors = [m / n for n, m in zip(values.shape, new_shape, strict=True)]
  out = ndimage.zoom(
    values.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True
  )
  return np.clip(out, values.min(), values.max())


def _by_slices(values, new_shape, order):
  """Slices across the last axis alone, then along it by scipy's order 0."""
  shape = (*new_shape[:2], values.shape[2])
  flat = np.stack([_zoom(values[..., z], shape[:2], order) for z in range(shape[2])], axis=-1)
  places = (np.arange(new_shape[2]) + 0.5) * shape[2] / new_shape[2] - 0.5
  grid = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), places, indexing="ij")
  return ndimage.map_coordinates(flat, grid, order=0, mode="nearest")


def test_shapes_round_halves_to_even():
  assert resample.resampled_shape((10, 274, 145), (8.0, 1.4, 1.9), (8.0, 1.5, 1.5)) == (
    10,
    256,
    184,
  )
  assert resample.resampled_shape((5, 7), (1, 1), (2, 2)) == (2, 4)
  assert resample.resampled_shape((3, 1), (1.0, 1.0), (9.0, 9.0)) == (1, 1)


@pytest.mark.parametrize(
  "spacing, new_spacing, axis",
  [
    ((1.5, 1.5, 8), (1, 1, 1), 2),
    ((1, 1, 1), (4, 1, 1), 0),
    ((1, 1, 3), (1, 1, 1), None),  # not above the ratio
    ((4, 1, 4), (9, 1, 1), None),  # two of the old are the coarsest: the new do not count
    ((1, 9), (1, 1), None),
  ],
)
def test_the_coarse_axis_is_far_coarser_than_the_others(spacing, new_spacing, axis):
  assert resample.coarse_axis(spacing, new_spacing) == axis


@pytest.mark.parametrize(
  "shape, new_shape", [((7, 9, 5), (9, 6, 8)), ((6, 8), (13, 3)), ((1, 5), (4, 5))]
)
def test_images_and_logits_are_those_of_scipy(shape, new_shape):
  values = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
  edges = {"spacing": ISO[: len(shape)], "new_spacing": ISO[: len(shape)]}
  image = resample.resample_image(values, new_shape, **edges)
  logits = resample.resample_logits(values, new_shape, **edges)
  assert image.dtype == logits.dtype == np.float32
  for channel in range(2):
    own = values[..., channel]
    np.testing.assert_allclose(image[..., channel], _zoom(own, new_shape, 3), atol=1e-6)
    np.testing.assert_allclose(logits[..., channel], _zoom(own, new_shape, 1), atol=1e-6)


@pytest.mark.parametrize("new_shape", [(9, 6, 8), (9, 6, 5), (6, 9, 2)])
def test_coarse_volumes_are_resampled_slice_by_slice(new_shape):
  values = np.random.default_rng(1).normal(size=(7, 9, 5, 1)).astype(np.float32)
  edges = {"spacing": (1, 1, 8), "new_spacing": (1, 1, 1)}
  for resized, order in ((resample.resample_image, 3), (resample.resample_logits, 1)):
    got = resized(values, new_shape, **edges)[..., 0]
    np.testing.assert_allclose(got, _by_slices(values[..., 0], new_shape, order), atol=1e-6)
  # Any axis may be the coarse one.
  turned = resample.resample_image(
    values.transpose(2, 0, 1, 3), (new_shape[2], *new_shape[:2]), spacing=(8, 1, 1), new_spacing=ISO
  )
  want = resample.resample_image(values, new_shape, **edges).transpose(2, 0, 1, 3)
  np.testing.assert_array_equal(turned, want)


@pytest.mark.parametrize(
  "shape,spacing,new_spacing",
  [
    ((9, 8, 7), ISO, (1.5, 0.7, 2.0)), ((9, 8, 7), (1.0, 1.0, 6.0), (1.5, 0.7, 3.0)),
    ((1, 8, 7), ISO, (0.4, 1.0, 1.2)), ((9, 8), ISO[:2], (1.7, 0.6)),
  ],
)  # fmt: skip
def test_volumes_are_resampled_some_lines_at_a_time(monkeypatch, shape, spacing, new_spacing):
  """Which lines go together makes no difference, to the last bit."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(*shape, 1)).astype(np.float32)
  mask = rng.integers(0, 3, shape).astype(np.uint8)
  edges = {"spacing": spacing, "new_spacing": new_spacing}
  new_shape = resample.resampled_shape(shape, **edges)
  found = []
  for values in (10**6, 150, 1):
    monkeypatch.setattr(resample, "_BLOCK_VALUES", values)
    one = resample.resample_image(image, new_shape, **edges)
    other = resample.resample_mask(mask, new_shape, **edges, ids=(1, 2))
    found.append((one.tobytes(), other.tobytes()))
  assert found[0] == found[1] == found[2]


def test_values_by_hand():
  edges = {"spacing": (1, 1), "new_spacing": (1, 1)}
  ramp = np.array([[0, 4]], np.float32)[..., None]
  np.testing.assert_array_equal(
    resample.resample_logits(ramp, (1, 4), **edges)[..., 0], [[0, 1, 3, 4]]
  )
  step = np.array([[0, 0, 0, 1, 1, 1]], np.float32)[..., None]
  spline = resample.resample_image(step, (1, 12), **edges)
  assert spline.min() == 0 and spline.max() == 1  # cut off where a spline overshoots
  mask = np.array([[0, 1, 2, 2]], np.uint8)
  got = resample.resample_mask(mask, (1, 2), **edges, ids=(0, 1, 2))
  np.testing.assert_array_equal(got, [[1, 2]])  # of 0 and 1, half each, the later
  got = resample.resample_mask(mask, (1, 8), **edges, ids=(0, 1, 2))
  np.testing.assert_array_equal(got, [[0, 0, 1, 1, 2, 2, 2, 2]])
  for resized in (resample.resample_image, resample.resample_logits):
    assert resized(ramp, (1, 2), **edges) is ramp
  with pytest.raises(ValueError, match=r"spacing is \(1, 1, 1\), expected 2 numbers"):
    resample.resample_image(ramp, (1, 2), spacing=(1, 1, 1), new_spacing=(1, 1))
