"""evaluation.sliding_window: positions and weights by hand, logits by loops in float64."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from rndpo_jax.evaluation import sliding_window, tile_sums
from rndpo_jax.runtime import sharding


def _apply(params, tiles):
  """Logits that depend on the place in the tile and on the values: no two tiles agree."""
  return tiles[..., :1] * params + tiles[..., 1:]


def _window(patch, **options):
  window = sliding_window.make(_apply, patch, batch_size=8, **options)
  params = np.random.default_rng(7).normal(size=(1, *patch, 3)).astype(np.float32)
  return window, params, sharding.put_on_local_devices(params)


def _both(window, placed, image):
  """Logits added up on the host; those added up on a device, part by part, are the same bits."""
  got = sliding_window.predict(window, placed, image)
  on_device = window._replace(device_bytes=2**30)
  np.testing.assert_array_equal(sliding_window.predict(on_device, placed, image), got)
  return got


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
  monkeypatch.setattr(tile_sums, "_PART_VALUES", 64)


def _by_loops(image, params, patch, mirror_axes=(), step=0.5):
  """Logits f64[*S, C] of an image no smaller than the patch."""
  total, weight = np.zeros((*image.shape[:-1], 3)), np.zeros((*image.shape[:-1], 1))
  middle = np.zeros(patch)
  middle[tuple(p // 2 for p in patch)] = 1
  own = ndimage.gaussian_filter(middle, [p / 8 for p in patch], mode="constant")[..., None]
  own /= own.max()
  sets = [itertools.combinations(mirror_axes, n) for n in range(len(mirror_axes) + 1)]
  sets = list(itertools.chain(*sets))
  for start in sliding_window.positions(image.shape[:-1], patch, step):
    place = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
    logits = [
      np.flip(_apply(np.float64(params[0]), np.flip(np.float64(image[place]), axes)), axes)
      for axes in sets
    ]
    total[place] += own * np.mean(logits, axis=0)
    weight[place] += own
  return total / weight


def _image(*shape):
  return np.random.default_rng(len(shape)).normal(size=(*shape, 2)).astype(np.float32)


def test_positions_by_hand():
  assert sliding_window.positions((110,), (64,)) == [(0,), (23,), (46,)]
  assert sliding_window.positions((64, 5), (64, 4)) == [(0, 0), (0, 1)]
  # Halves are rounded to even: 0, 2.5, 5.
  assert sliding_window.positions((13,), (8,)) == [(0,), (2,), (5,)]
  assert sliding_window.positions((16,), (8,), step=1) == [(0,), (8,)]
  with pytest.raises(ValueError, match="smaller than the patch"):
    sliding_window.positions((3, 9), (4, 4))


@pytest.mark.parametrize("patch", [(8, 8), (7, 5, 3), (2, 16)])
def test_weights_are_a_gaussian_that_is_never_zero(patch):
  middle = np.zeros(patch)
  middle[tuple(p // 2 for p in patch)] = 1
  want = ndimage.gaussian_filter(middle, [p / 8 for p in patch], mode="constant")
  got = sliding_window.weights(patch)
  assert got.dtype == np.float32 and got.min() > 0
  np.testing.assert_allclose(got, want / want.max(), rtol=1e-6)


@pytest.mark.parametrize(
  "shape, patch, mirror_axes, step",
  [
    ((13, 9), (8, 4), (), 0.5),
    ((9, 30), (6, 8), (0, 1), 0.5),
    ((8, 4), (8, 4), (1,), 0.5),
    ((11, 7, 20), (6, 6, 8), (0, 2), 0.5),
    ((20, 9, 6), (8, 6, 6), (), 0.8),
  ],
)
def test_logits_are_the_weighted_mean_over_tiles(shape, patch, mirror_axes, step):
  image = _image(*shape)
  window, params, placed = _window(patch, mirror_axes=mirror_axes, step=step)
  got = _both(window, placed, image)
  assert got.dtype == np.float32 and got.shape == (*shape, 3)
  want = _by_loops(image, params, patch, mirror_axes, step)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_2d_network_sees_each_slice_alone():
  volume = _image(9, 13, 3)
  window, params, placed = _window((6, 8), mirror_axes=(0,))
  got = _both(window, placed, volume)
  for z in range(3):
    want = _by_loops(volume[:, :, z], params, (6, 8), (0,))
    np.testing.assert_allclose(got[:, :, z], want, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (5, 3), (12, 3)])
def test_a_small_image_stands_in_the_middle_of_zeros(shape):
  image = _image(*shape)
  pads = [(max(8 - n, 0) // 2, max(8 - n, 0) - max(8 - n, 0) // 2) for n in shape]
  window, params, placed = _window((8, 8))
  padded = np.pad(image, [*pads, (0, 0)])
  inside = tuple(slice(low, low + n) for n, (low, _) in zip(shape, pads, strict=True))
  got = _both(window, placed, image)
  np.testing.assert_allclose(got, _by_loops(padded, params, (8, 8))[inside], atol=1e-5)


@pytest.mark.parametrize("device_bytes", [1500, 2**30])
def test_images_that_share_batches_come_in_order_whole_and_as_alone(device_bytes):
  images = [("a", _image(6, 30)), ("b", _image(9, 6)), ("c", _image(20, 12)), ("d", _image(3, 9))]
  window, _, placed = _window((6, 8), device_bytes=device_bytes)
  found = list(sliding_window.slabs(window, placed, images))
  assert [slab.key for slab in found if slab.is_last] == ["a", "b", "c", "d"]
  assert [key for key, _ in itertools.groupby(found, lambda slab: slab.key)] == list("abcd")
  for key, image in images:
    own = [slab for slab in found if slab.key == key]
    lengths = [slab.logits.shape[slab.axis] for slab in own]
    assert min(lengths) > 0 and [slab.start for slab in own] == [0, *np.cumsum(lengths)[:-1]]
    got = np.concatenate([slab.logits for slab in own], own[0].axis)
    alone = sliding_window.predict(window._replace(device_bytes=0), placed, image)
    np.testing.assert_array_equal(got, alone)


def test_slabs_of_several_images_come_as_soon_as_no_tile_reaches_them():
  images = [("a", _image(6, 30)), ("b", _image(9, 6)), ("c", _image(6, 8))]
  window, _, placed = _window((6, 8))
  found = list(sliding_window.slabs(window, placed, images))
  spans = [(s.key, s.axis, s.start, s.logits.shape[s.axis], s.is_last) for s in found]
  assert spans == [
    ("a", 1, 0, 4, False), ("a", 1, 4, 3, False), ("a", 1, 7, 4, False), ("a", 1, 11, 4, False),
    ("a", 1, 15, 3, False), ("a", 1, 18, 4, False), ("a", 1, 22, 8, True),
    ("b", 0, 0, 3, False), ("b", 0, 3, 6, True), ("c", 0, 0, 6, True),
  ]  # fmt: skip


def test_what_does_not_fit_the_patch_raises():
  for options in ({"mirror_axes": (2,)}, {"step": 0}):
    with pytest.raises(ValueError, match="do not fit the patch"):
      _window((8, 8), **options)
