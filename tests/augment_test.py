import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import types
from rndpo_jax.data import augment

OFF = {
  **config_lib.base_config().augment.to_dict(),
  **dict.fromkeys(("flip", "turn", "intensity", "gamma", "noise", "elastic", "affine"), 0.0),
}


@functools.lru_cache
def _jitted(options):
  return jax.jit(functools.partial(augment.augment, **dict(options)))


def _run(images, masks, seed=0, **changes):
  function = _jitted(tuple({**OFF, **changes}.items()))
  images, masks = function(jax.random.key(seed), jnp.asarray(images), jnp.asarray(masks))
  assert images.dtype == jnp.float32 and masks.dtype == jnp.uint8
  return np.asarray(images), np.asarray(masks)


def _batch(count=16, size=(8, 8)):
  """Two masks an image, the first the image itself, rounded."""
  rng = np.random.default_rng(0)
  values = rng.integers(0, 200, (count, *size)).astype(np.uint8)
  masks = np.stack([values, 200 - values], 1)
  return np.repeat(values[..., None], 2, -1).astype(np.float32), masks


def test_off_changes_nothing():
  images, masks = _batch()
  out_images, out_masks = _run(images, masks)
  np.testing.assert_array_equal(out_images, images)
  np.testing.assert_array_equal(out_masks, masks)


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 4)])
def test_turns_and_flips_move_image_and_masks_alike(size):
  images, masks = _batch(size=size)
  images_out, masks_out = _run(images, masks, flip=0.5, turn=0.5)
  np.testing.assert_array_equal(images_out[..., 0], masks_out[:, 0])
  np.testing.assert_array_equal(200 - masks_out[:, 0], masks_out[:, 1])
  moved = [not np.array_equal(a, b) for a, b in zip(images, images_out, strict=True)]
  assert sum(moved) > 8
  np.testing.assert_array_equal(np.sort(images_out.ravel()), np.sort(images.ravel()))


def test_turns_are_the_three_quarter_turns_and_flips_all_axes():
  images, masks = _batch(count=64)
  turned, _ = _run(images, masks, turn=1.0)
  kinds = [
    [k for k in range(4) if np.array_equal(np.rot90(a, k), b)]
    for a, b in zip(images, turned, strict=True)
  ]
  assert {k for (k,) in kinds} == {1, 2, 3}
  flipped, _ = _run(images, masks, flip=1.0)
  np.testing.assert_array_equal(flipped, images[:, ::-1, ::-1])
  flipped, _ = _run(*_batch(size=(8, 6, 4)), flip=1.0)
  np.testing.assert_array_equal(flipped, _batch(size=(8, 6, 4))[0][:, ::-1, ::-1, ::-1])


def test_probability_is_the_share_of_images():
  images, masks = _batch(count=400, size=(4, 4))
  for name in ("turn", "intensity", "gamma", "noise"):
    out, _ = _run(images, masks, **{name: 0.25})
    share = np.mean([not np.array_equal(a, b) for a, b in zip(images, out, strict=True)])
    assert 0.15 < share < 0.35, name


def test_intensity_is_scale_and_shift():
  images, masks = _batch()
  out, out_masks = _run(images, masks, intensity=1.0, intensity_scale=0.2)
  np.testing.assert_array_equal(out_masks, masks)
  factors = []
  for before, after in zip(images[..., 1], out[..., 1], strict=True):
    factor, shift = np.polyfit(before.ravel(), after.ravel(), 1)
    np.testing.assert_allclose(after, factor * before + shift, atol=1e-3)
    assert abs(factor - 1) <= 0.2 and abs(shift) <= 0.21
    factors.append(factor)
  assert np.std(factors) > 0.05


def test_gamma_keeps_range_and_order_and_constants():
  images, masks = _batch()
  images = images / 50 - 2
  images[0] = 3.0
  out, _ = _run(images, masks, gamma=1.0, gamma_scale=0.5)
  np.testing.assert_array_equal(out[0], images[0])
  np.testing.assert_allclose(out.min((1, 2)), images.min((1, 2)), atol=1e-5)
  np.testing.assert_allclose(out.max((1, 2)), images.max((1, 2)), atol=1e-5)
  for before, after in zip(images[1:], out[1:], strict=True):
    order = np.argsort(before[..., 0].ravel())
    assert (np.diff(after[..., 0].ravel()[order]) >= 0).all()
    low, extent = before.min(), np.ptp(before)
    ratio = (before - low) / extent
    inner = (ratio > 0.05) & (ratio < 0.95)
    exponents = np.log(((after - low) / extent)[inner]) / np.log(ratio[inner])
    assert np.ptp(exponents) < 1e-2 and np.exp(-0.5) <= exponents.mean() <= np.exp(0.5)


def test_noise_has_its_scale():
  images, masks = _batch(count=8, size=(32, 32))
  out, _ = _run(images, masks, noise=1.0, noise_scale=0.3)
  difference = out - images
  assert abs(difference.std() - 0.3) < 0.01 and abs(difference.mean()) < 0.01


@pytest.mark.parametrize("size", [(32, 32), (16, 16, 8)])
def test_elastic_moves_image_and_masks_alike(size):
  axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij")
  images = np.repeat(np.stack(axes, -1)[None], 4, 0)  # a channel tells where its pixel came from
  places = np.stack([a.astype(np.uint8) for a in axes])
  classes = np.where(places.sum(0) % 2, types.IGNORED, 0).astype(np.uint8)
  masks = np.repeat(np.concatenate([places, classes[None]])[None], 4, 0)
  out, out_masks = _run(images, masks, elastic=1.0, elastic_scale=2.0, elastic_smoothing=4.0)
  for axis, length in enumerate(size):
    inner = (out[..., axis] > 0) & (out[..., axis] < length - 1)
    error = out_masks[:, axis].astype(np.float32) - out[..., axis]
    assert np.abs(error[inner]).max() <= 0.5 + 1e-3  # the nearest pixel of the same place
  assert set(np.unique(out_masks[:, -1])) == {0, types.IGNORED}  # nearest: no class in between
  shift = (out - images)[:, 4:-4, 4:-4]
  assert 1.0 < shift.std() < 3.0
  assert np.abs(np.diff(shift, axis=1)).mean() < 0.8  # smooth


@pytest.mark.parametrize("size", [(32, 32), (16, 16, 8)])
def test_affine_turns_and_zooms_about_the_centre(size):
  middle = [(n - 1) / 2 for n in size]
  axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij")
  images = np.repeat(np.stack(axes, -1)[None], 8, 0)  # a channel tells where its pixel came from
  masks = np.stack([a.astype(np.uint8) for a in axes])[None].repeat(8, 0)
  changes = {"affine": 1.0, "affine_degrees": 30.0, "affine_zoom": 0.2}
  out, out_masks = _run(images, masks, **changes)
  factors = []
  for image, mask in zip(out, out_masks, strict=True):
    inner = (slice(size[0] // 3, -(size[0] // 3)),) * 2 + (slice(2, -2),) * (len(size) - 2)
    error = mask.transpose(*range(1, mask.ndim), 0).astype(np.float32) - image
    assert np.abs(error[inner]).max() <= 0.5 + 1e-3
    grid = np.stack([(a - m)[inner].ravel() for a, m in zip(axes, middle, strict=True)])
    found = np.stack([(image[..., d] - m)[inner].ravel() for d, m in enumerate(middle)])
    matrix = np.linalg.lstsq(grid.T, found.T, rcond=None)[0].T
    factor = np.linalg.norm(matrix[:, 0])
    factors.append(factor)
    np.testing.assert_allclose(matrix @ matrix.T, factor**2 * np.eye(len(size)), atol=2e-3)
    assert matrix[0, 0] / factor >= np.cos(np.radians(30)) - 1e-3
    assert np.exp(-0.2) - 1e-3 <= factor <= np.exp(0.2) + 1e-3
  assert np.ptp(factors) > 0.1
  still, still_masks = _run(images, masks, **{**changes, "affine_degrees": 0.0, "affine_zoom": 0.0})
  np.testing.assert_array_equal(still, images)
  np.testing.assert_array_equal(still_masks, masks)


def test_images_draw_apart_and_by_position_alone():
  images, masks = _batch(count=4)
  images[:] = images[:1]
  masks[:] = masks[:1]
  changes = {"intensity": 1.0, "noise": 0.5, "elastic": 0.5, "affine": 0.5}
  out, out_masks = _run(images, masks, **changes)
  assert len({one.tobytes() for one in out}) == 4
  first, first_masks = _run(images[:2], masks[:2], **changes)
  np.testing.assert_allclose(first, out[:2], atol=1e-4)
  np.testing.assert_array_equal(first_masks, out_masks[:2])
  other, _ = _run(images, masks, seed=1, **changes)
  assert not np.allclose(other, out)


def test_what_was_zero_around_a_region_stays_zero():
  """In channels normalised inside a mask alone; a spline's remains of a zero count as zero."""
  images, masks = _batch(count=4)
  images = images / 100 + 0.01
  images[:, :3] = 0.0
  images[:, 2] = [[[9e-5, 0.0]]]
  changes = {"intensity": 1.0, "noise": 1.0, "gamma": 1.0}
  free, _ = _run(images, masks, **changes)
  both, out_masks = _run(images, masks, **changes, in_mask=(True, True))
  np.testing.assert_array_equal(both[:, :3], 0.0)
  np.testing.assert_allclose(both[:, 3:], free[:, 3:], atol=1e-6)
  np.testing.assert_array_equal(out_masks, masks)
  assert np.all(free[:, :3] != 0)
  # Outside is where each such channel is zero, and the other channel stays as it came.
  images[:, 0, 0, 1] = 0.5
  free, _ = _run(images, masks, **changes)
  one, _ = _run(images, masks, **changes, in_mask=(False, True))
  expected = free.copy()
  expected[:, :3, :, 1] = 0.0
  expected[:, 0, 0, 1] = free[:, 0, 0, 1]
  np.testing.assert_allclose(one, expected, atol=1e-6)
  np.testing.assert_array_equal(one == 0, expected == 0)
  moved, moved_masks = _run(images, masks, **changes, flip=1.0, in_mask=(False, True))
  np.testing.assert_array_equal(moved[:, 5:7, :, 1], 0.0)
  np.testing.assert_array_equal(moved_masks, masks[:, :, ::-1, ::-1])


def test_quarter_turns_need_squares():
  images, masks = _batch(size=(8, 6))
  with pytest.raises(ValueError, match=r"equal H and W, found \(8, 6\)"):
    augment.augment(jax.random.key(0), images, masks, **{**OFF, "turn": 0.5})
