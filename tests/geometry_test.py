import numpy as np
import pytest

from rndpo_jax.data import geometry


def _axis(values, length):
  return geometry.resize_linear(np.array(values, np.float32)[:, None], (length,))[:, 0]


def test_resize_by_hand():
  # Twice as many: middles at -0.25, 0.25, 0.75, 1.25 of the input.
  np.testing.assert_allclose(_axis([0, 4], 4), [0, 1, 3, 4])
  # Half as many: a triangle of half-width 2 about 0.5 and 2.5, its ends cut off by the border:
  # weights .75 .75 .25 (over 1.75) and .25 .75 .75.
  np.testing.assert_allclose(_axis([7, 0, 7, 14], 2), [4, 9], rtol=1e-6)
  np.testing.assert_array_equal(_axis([3, 1, 2], 3), [3, 1, 2])


@pytest.mark.parametrize(("count", "length"), [(7, 12), (12, 7), (1, 5), (9, 1), (30, 11)])
def test_resize_keeps_constants_and_ramps(count, length):
  np.testing.assert_allclose(_axis(np.full(count, 3.5), length), 3.5, rtol=1e-6)
  middle = (np.arange(length) + 0.5) * count / length - 0.5  # where a ramp's value is its place
  inner = (middle > max(1, count / length)) & (middle < count - 1 - max(1, count / length))
  # A filter sampled at whole pixels keeps a ramp to a fraction of a pixel.
  tolerance = 1e-4 if length > count else 0.1 * count / length
  np.testing.assert_allclose(_axis(np.arange(count), length)[inner], middle[inner], atol=tolerance)


def test_axes_are_resized_apart():
  rng = np.random.default_rng(0)
  image = rng.standard_normal((6, 5, 4, 2)).astype(np.float32)
  expected = image
  for axis, length in enumerate((3, 9, 4)):
    line = np.moveaxis(expected, axis, 0)
    line = geometry.resize_linear(line.reshape(len(line), -1), (length,)).reshape(
      length, *line.shape[1:]
    )
    expected = np.moveaxis(line, 0, axis)
  np.testing.assert_allclose(geometry.resize_linear(image, (3, 9, 4)), expected, atol=1e-5)


def test_classes_by_hand():
  mask = np.array([[1, 2, 3]], np.uint8)
  np.testing.assert_array_equal(geometry.resize_classes(mask, (2, 6)), [[1, 1, 2, 2, 3, 3]] * 2)
  np.testing.assert_array_equal(geometry.resize_classes(mask, (1, 1)), [[2]])
  np.testing.assert_array_equal(geometry.resize_classes(mask, (1, 3)), mask)
  np.testing.assert_array_equal(geometry.resize_classes(mask * 0 + 5, (2, 2)), [[5, 5]] * 2)
  # Halved, the second pixel covers 5, 5, 7, 9 by 1, 3, 3, 1: 4 of 8 are 5.
  line = np.array([[5, 5, 5, 5, 7, 9]], np.uint8)
  np.testing.assert_array_equal(geometry.resize_classes(line, (1, 3)), [[5, 5, 7]])
  # Ignored pixels are as a class.
  line = np.array([[255, 255, 255, 255, 7, 9]], np.uint8)
  np.testing.assert_array_equal(geometry.resize_classes(line, (1, 3)), [[255, 255, 7]])


def test_crop_and_padding_by_hand():
  array = np.arange(5, dtype=np.uint8)
  np.testing.assert_array_equal(geometry.center_crop(array, (3,), 9), [1, 2, 3])
  np.testing.assert_array_equal(geometry.center_crop(array, (2,), 9), [1, 2])
  np.testing.assert_array_equal(geometry.center_crop(array, (7,), 9), [9, 0, 1, 2, 3, 4, 9])
  np.testing.assert_array_equal(geometry.center_crop(array, (), 9), array)
  both = geometry.center_crop(np.ones((1, 4), np.uint8), (2, 2), 7)
  np.testing.assert_array_equal(both, [[7, 7], [1, 1]])


def test_padding_takes_the_minimum_of_the_channel_and_background():
  image = np.stack([np.full((2, 2), -3.0), np.full((2, 2), 5.0)], -1).astype(np.float32)
  np.testing.assert_array_equal(geometry.image_to_model(image, (4, 4), (4, 4))[0, 0], [-3, 5])
  assert geometry.mask_to_model(np.ones((2, 2), np.uint8), (4, 4), (4, 4)).sum() == 4


@pytest.mark.parametrize("crop", [(), (5, 6), (8, 8), (9, 4)])
@pytest.mark.parametrize("native", [(7, 8), (6, 5)])
def test_to_native_undoes_the_crop(crop, native):
  """At the crop's own resolution the way back is exact, cropped or padded."""
  size = crop or native
  image = np.random.default_rng(0).standard_normal((*native, 2)).astype(np.float32)
  back = geometry.to_native(geometry.image_to_model(image, size, crop), native, crop)
  assert back.shape == image.shape and back.dtype == np.float32
  inside = geometry.to_native(np.zeros((*size, 2), np.float32), native, crop)[..., 0] == 0
  np.testing.assert_allclose(back[inside], image[inside], atol=1e-6)
  assert (back[~inside] == [geometry.OUTSIDE, 0]).all()
  expected = np.prod([min(n, c) for n, c in zip(native, crop or native, strict=True)])
  assert inside.sum() == expected


@pytest.mark.parametrize("crop", [(), (64, 60), (100, 80)])
def test_discs_survive_the_round_trip_in_place(crop):
  y, x = np.mgrid[:90, :70]
  shifts = []
  for down in range(3):
    for right in range(3):
      mask = ((y - 40 - down) ** 2 + (x - 35 - right) ** 2 < 20**2).astype(np.uint8)
      small = geometry.mask_to_model(mask, (32, 32), crop)
      logits = np.stack([1.0 - small, small], -1).astype(np.float32)
      back = geometry.to_native(logits, mask.shape, crop).argmax(-1)
      assert 2 * (back * mask).sum() / (back.sum() + mask.sum()) > 0.95
      shifts.append(np.argwhere(back).mean(0) - np.argwhere(mask).mean(0))
  assert (np.abs(np.mean(shifts, axis=0)) < 0.2).all()  # pixels; nearest neighbour is 0.5 off


def test_one_logit_a_pixel_is_background_outside():
  back = geometry.to_native(np.zeros((4, 4, 1), np.float32), (8, 4), (4, 4))
  assert back[0, 0, 0] == -geometry.OUTSIDE and back[4, 2, 0] == 0


@pytest.mark.parametrize("how", ["zscore", "minmax"])
def test_normalisation_is_by_channel_and_finite(how):
  rng = np.random.default_rng(0)
  image = np.zeros((8, 9, 4))
  image[..., 0] = rng.random((8, 9)) * 1e-9
  image[..., 1] = rng.random((8, 9)) * 6e4
  image[..., 2] = 7.1
  out = geometry.normalize(image.astype(np.float32), how)
  assert out.dtype == np.float32
  np.testing.assert_array_equal(out[..., 2:], 0)
  low, high = {"zscore": (out[..., 1].mean(), out[..., 1].std()), "minmax": (0, 1)}[how]
  if how == "minmax":
    np.testing.assert_allclose(
      [out[..., :2].min((0, 1)), out[..., :2].max((0, 1))], [[0, 0], [1, 1]]
    )
  else:
    np.testing.assert_allclose([low, high], [0, 1], atol=1e-6)
    np.testing.assert_allclose(out[..., 0].std(), 1, atol=1e-5)


def test_voxel_volume_of_the_model_grid():
  assert geometry.voxel_volume((0.5, 2.0), (64, 32), (32, 32), ()) == 2.0
  assert geometry.voxel_volume((0.5, 2.0, 3.0), (64, 32, 9), (8, 16, 4), (16, 16, 8)) == 12.0


def test_grid_shift_is_the_largest_distance_in_voxels():
  affine = np.diag([2.0, 4, 8, 1])
  moved, wider = affine.copy(), affine.copy()
  moved[1, 3] = 3
  wider[2, 2] = 8.5
  assert geometry.grid_shift(affine, affine, (9, 9, 9)) == 0
  assert geometry.grid_shift(affine, moved, (9, 9, 9)) == 1.5  # 3 mm, the shortest edge is 2 mm
  assert geometry.grid_shift(affine, wider, (9, 9, 9)) == 2.0  # 8 slices of 0.5 mm
  assert geometry.grid_shift(affine, wider, (9, 9)) == 0  # of which an image has the first
  assert geometry.grid_shift(np.zeros((4, 4)), moved, (9, 9)) == np.inf
  for nowhere in (0.0, np.nan):  # of two files that say the same nothing
    affine = np.full((4, 4), nowhere)
    assert geometry.grid_shift(affine, affine.copy(), (9, 9)) == 0
