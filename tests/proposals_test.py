"""Samplers: each atom against its formula, views undone, keys per image, one encoder pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.data.noise import smooth_noise
from rndpo_jax.mining import mask_edits, overlap, proposals, views

OPTIONS = {
  "noise_scale": 1.5, "noise_smoothing": 2.0, "temperature_low": 0.5, "temperature_high": 2.0,
  "threshold_shift": 3.0, "zoom": 2.0,
}  # fmt: skip


def ramp_segmenter(calls):
  """Logits (0, image + ramp * params) pixel by pixel; dropout adds noise. Counts its calls."""

  def encode(params, images):
    calls.append("encode")
    return images[..., 0]

  def decode(params, features, key=None):
    calls.append("decode" if key is None else "dropout")
    ramp = jnp.arange(np.prod(features.shape[1:]), dtype=jnp.float32)
    x = features + params * ramp.reshape(1, *features.shape[1:])
    if key is not None:
      x = x + jax.random.normal(key, x.shape)
    return jnp.stack([jnp.zeros_like(x), x], axis=-1)

  return types.Segmenter(None, None, encode, decode)


@functools.cache
def sampler(mix, options):
  """A compiled sampler, and the calls that tracing it made."""
  calls = []
  segmenter, mix = ramp_segmenter(calls), proposals.parse_mix(mix)

  @jax.jit
  def sample(params, images, keys):
    del calls[:]
    return proposals.sample(segmenter, params, images, keys, mix=mix, **dict(options))

  return sample, calls


def draw(mix, shape=(4, 4), params=0.1, num_images=3, first=0, **options):
  """Samples of images first, first + 1, ... of a fixed set; returns (images, calls, proposals)."""
  images = np.random.default_rng(0).normal(size=(8, *shape, 1)).astype(np.float32)
  images = images[first : first + num_images]
  keys = jax.random.split(jax.random.key(3), 8)[first : first + num_images]
  sample, calls = sampler(mix, tuple((OPTIONS | options).items()))
  return images[..., 0], calls, jax.device_get(sample(jnp.float32(params), images, keys))


def test_all_entries_without_views_share_one_encoder_pass():
  _, calls, got = draw("base:1,threshold:2,temperature+logit_noise:2,mc_dropout:3")
  # vmap traces the dropout decoder once for all proposals.
  assert calls == ["encode", "decode", "dropout"]
  assert got.masks.shape == (3, 8, 4, 4) and got.masks.dtype == np.uint8
  assert got.logits.shape == (3, 8, 4, 4, 2) and got.logits.dtype == np.float32
  np.testing.assert_array_equal(got.masks, got.logits.argmax(-1))
  np.testing.assert_array_equal(got.logits[:, 0], got.base_logits)


@pytest.mark.parametrize("shape,count", [((4, 4), 7), ((4, 6), 3), ((4, 4, 2), 15), ((2, 4, 6), 7)])
def test_views_are_distinct_symmetries(shape, count):
  found = views.symmetries(shape)
  x = np.arange(np.prod(shape)).reshape(shape)
  seen = {np.flip(np.rot90(x, turn), flip).tobytes() for turn, flip, _ in found}
  assert len(found) == len(seen) == count and x.tobytes() not in seen


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (4, 4, 2)])
def test_views_are_undone(shape):
  count = len(views.symmetries(shape))
  images, _, same = draw(f"tta:{count + 2}", shape, params=0.0)
  # A network that works pixel by pixel sees through every view.
  np.testing.assert_array_equal(same.logits[..., 1], np.repeat(images[:, None], count + 2, 1))
  images, calls, got = draw(f"tta:{count + 2}", shape)
  assert calls == ["encode", "decode", "encode", "decode"]
  ramp = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) * np.float32(0.1)
  for k, (turn, flip, _) in enumerate(views.symmetries(shape)):
    expected = images + np.rot90(np.flip(ramp, flip), -turn)
    np.testing.assert_allclose(got.logits[:, k, ..., 1], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got.logits[:, count:], got.logits[:, :2])


def test_zooms_are_undone_and_what_they_do_not_see_is_the_bases():
  assert views.zooms(5, 8.0) == pytest.approx([2, 1 / 2, 4, 1 / 4, 8])
  # By linear interpolation a ramp in the image is a ramp in its zoom, and comes back as it was.
  ramp = 10.0 * np.arange(8) + np.arange(8)[:, None]
  images = np.stack([ramp, -ramp])[..., None].astype(np.float32)
  outside = np.zeros((2, 8, 8, 1), np.float32)
  for zoom in (2.0, 0.5, 7 / 5):
    view = views.View(1, (0,), zoom)
    seen = np.asarray(view.apply(images))
    back = np.asarray(view.undo(seen, outside))
    # What is seen of it; seen smaller, the edge is between two pixels.
    low = 3.5 - 3.5 / zoom if zoom > 1 else 1
    inside = (np.arange(8) >= low) & (np.arange(8) <= 7 - low)
    inside = inside[:, None] & inside
    np.testing.assert_allclose(back[:, inside], images[:, inside], atol=1e-4)
    assert inside.sum() == {2.0: 16, 0.5: 36, 7 / 5: 36}[zoom]
    if zoom > 1:
      assert (back[:, ~inside] == 0).all()
  # Turned and mirrored after the zoom, as numpy does it.
  upright = np.asarray(views.View(zoom=2.0).apply(images))
  np.testing.assert_allclose(upright[0, 1, 1, 0], ramp[2, 2] + 11 / 4, rtol=1e-6)
  turned = np.flip(np.rot90(upright, 1, (1, 2)), 1)
  np.testing.assert_array_equal(views.View(1, (0,), 2.0).apply(images), turned)


def test_an_entry_of_zooms_sees_each_through_the_network():
  images, calls, got = draw("base:1,zoom:2,tta+zoom:3", shape=(8, 8))
  assert calls == ["encode", "decode"] * 3
  segmenter = ramp_segmenter([])
  entries = [views.View(zoom=2.0), views.View(zoom=0.5)]
  entries += [
    v._replace(zoom=z)
    for v, z in zip(views.symmetries((8, 8)), (2**0.5, 2**-0.5, 2.0), strict=False)
  ]
  for k, view in enumerate(entries, 1):
    seen = segmenter.encode(0.1, view.apply(images[..., None]))
    logits = segmenter.decode(0.1, seen)
    expected = view.undo(logits, got.base_logits)
    np.testing.assert_allclose(got.logits[:, k], expected, rtol=1e-5, atol=1e-5)


def test_views_with_dropout_draw_apart():
  images, _, got = draw("tta+mc_dropout:9", params=0.0)
  noise = got.logits[..., 1] - images[:, None]
  flat = noise.reshape(27, 16)
  assert abs(np.corrcoef(flat) - np.eye(27)).max() < 0.95 and flat.std() > 0.5


def test_dropout_uses_one_key_a_proposal_and_image():
  images, _, got = draw("base:1,mc_dropout:3", params=0.0)
  keys = jax.random.split(jax.random.key(3), 8)
  for image in range(3):
    for k in range(1, 4):
      key = jax.random.split(jax.random.fold_in(keys[image], k))[0]
      expected = images[image] + np.asarray(jax.random.normal(key, (1, 4, 4))[0])
      np.testing.assert_allclose(got.logits[image, k, ..., 1], expected, rtol=1e-5, atol=1e-6)


def test_temperature_is_a_geometric_sweep_before_the_noise():
  _, _, got = draw("temperature+logit_noise:3", noise_scale=0.0)
  divisor = np.array([0.5, 1.0, 2.0]).reshape(1, 3, 1, 1, 1)
  np.testing.assert_allclose(got.logits, got.base_logits[:, None] / divisor, rtol=1e-6)
  _, _, noisy = draw("temperature+logit_noise:3")
  _, _, hot = draw("temperature+logit_noise:3", temperature_low=1.0, temperature_high=1.0)
  base = got.base_logits[:, None]
  np.testing.assert_allclose(noisy.logits - base / divisor, hot.logits - base, atol=1e-5)


def test_threshold_shifts_the_background_alone():
  _, _, got = draw("threshold:4")
  shift = np.array([-3, -1, 1, 3]).reshape(1, 4, 1, 1)
  np.testing.assert_allclose(got.logits[..., 0], got.base_logits[:, None, ..., 0] - shift)
  np.testing.assert_array_equal(
    got.logits[..., 1], np.repeat(got.base_logits[:, None, ..., 1], 4, 1)
  )
  size = got.masks.sum((2, 3), dtype=int)
  assert (np.diff(size, axis=1) >= 0).all() and (size[:, -1] > size[:, 0]).all()


def test_members_take_turns_and_are_shifted_like_the_base():
  logits = np.random.default_rng(1).normal(size=(2, 2, 4, 4, 2)).astype(np.float32)
  images = np.zeros((2, 4, 4, 1), np.float32)
  keys = jax.random.split(jax.random.key(0), 2)
  found = proposals.sample(
    ramp_segmenter([]), 0.1, images, keys, mix=proposals.parse_mix("member:2,member+threshold:3"),
    member_logits=logits, **OPTIONS,
  )  # fmt: skip
  np.testing.assert_array_equal(found.logits[:, :2], logits)
  np.testing.assert_array_equal(found.logits[:, 3], logits[:, 1])  # the middle one is not shifted
  shifted = logits[:, 0] + np.float32([3.0, 0.0])
  np.testing.assert_allclose(found.logits[:, 2], shifted, rtol=1e-6)


def test_edited_masks_are_the_argmax_of_the_same_values():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(2, 3, 6, 6, 3)).astype(np.float32)
  masks = rng.integers(0, 3, (2, 3, 6, 6)).astype(np.uint8)
  found = np.asarray(mask_edits.relabel(logits, masks))
  np.testing.assert_array_equal(np.argmax(found, -1), masks)
  np.testing.assert_array_equal(np.sort(found, -1), np.sort(logits, -1))
  same = np.argmax(logits, -1) == masks
  np.testing.assert_array_equal(found[same], logits[same])
  keys = jax.random.split(jax.random.key(0), (2, 3))
  edited = jax.jit(lambda x: mask_edits.edit(("tta", "drop_component", "corrupt"), keys, x))(logits)
  flat, own = np.argmax(logits, -1).astype(np.uint8).reshape(6, 6, 6), keys.ravel()
  for place, name in ((0, "corrupt"), (2, "drop_component")):
    folded = jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(own)
    flat = jax.jit(mask_edits.EDITS[name], static_argnums=2)(folded, flat, 3)
  np.testing.assert_array_equal(np.argmax(edited, -1), np.reshape(flat, (2, 3, 6, 6)))


def test_an_image_does_not_depend_on_its_batch():
  mix = "base:1,mc_dropout+logit_noise:2,tta+logit_noise:2"
  _, _, whole = draw(mix, num_images=4)
  for first in range(4):
    _, _, alone = draw(mix, num_images=1, first=first)
    np.testing.assert_array_equal(alone.masks[0], whole.masks[first])
    np.testing.assert_allclose(alone.logits[0], whole.logits[first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "shape,smoothing", [((9, 7, 2), 2.0), ((9, 7, 2), 0.0), ((5, 4, 3, 2), 1.0)]
)
def test_noise_has_unit_variance_at_every_pixel(shape, smoothing):
  keys = jax.random.split(jax.random.key(0), 4000)
  fields = np.asarray(jax.vmap(lambda key: smooth_noise(key, shape, smoothing))(keys))
  assert fields.shape == (4000, *shape)
  # Standard errors: 1 / sqrt(4000) = 0.016 of the mean, sqrt(2 / 4000) = 0.022 of the variance.
  assert abs(fields.mean(0)).max() < 5 * 0.016
  assert abs(fields.var(0) - 1).max() < 5 * 0.022
  assert abs(np.mean(fields[..., 0] * fields[..., 1], axis=0)).max() < 5 * 0.016


def test_noise_is_smooth_as_asked():
  keys = jax.random.split(jax.random.key(1), 4000)
  field = np.asarray(jax.vmap(lambda key: smooth_noise(key, (17, 3, 1), 4.0))(keys))
  for distance in (1, 4, 8, 16):
    got = np.mean(field[:, 0, 1, 0] * field[:, distance, 1, 0])
    # White noise spread by a Gaussian of width s has correlation exp(-d^2 / (4 s^2)).
    assert abs(got - np.exp(-(distance**2) / 64)) < 0.09


def test_masks_of_files_come_as_they_are_beside_those_of_samplers():
  masks = np.random.default_rng(1).integers(0, 2, (3, 2, 4, 4)).astype(np.uint8)
  present = np.array([[True, False], [True, True], [False, False]])
  files = types.FileProposals(masks, present, np.where(present, 0.5, np.nan).astype(np.float32))
  keys = jax.random.split(jax.random.key(3), 3)
  images = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
  segmenter = ramp_segmenter([])
  mix = proposals.parse_mix("base:1,file:2,threshold:1")
  got = proposals.sample(segmenter, jnp.float32(0.1), images, keys, mix=mix, files=files, **OPTIONS)
  np.testing.assert_array_equal(got.masks[:, 1:3], masks)
  probs = jax.nn.softmax(got.logits[:, 1:3])
  np.testing.assert_array_equal(probs, np.stack([1 - masks, masks], -1))  # certain
  np.testing.assert_array_equal(got.present, np.pad(present, ((0, 0), (1, 1)), constant_values=1))
  np.testing.assert_array_equal(got.file_scores[:, 1:3], files.scores)
  assert np.isnan(got.file_scores[:, ::3]).all()
  alone = proposals.sample(
    segmenter, jnp.float32(0.1), images, keys, mix=proposals.parse_mix("base:1,threshold:1"),
    **OPTIONS,
  )  # fmt: skip
  np.testing.assert_array_equal(got.masks[:, ::3], alone.masks)
  assert alone.present is None and alone.file_scores is None


def test_diversity_by_hand():
  masks = np.zeros((2, 3, 2, 2), np.uint8)
  masks[0, 0, 0] = 1  # two pixels
  masks[0, 1, 0, 0] = 1  # one of them
  # Pairs: 2 / 3, and 0 with the empty mask twice. All empty: all the same.
  np.testing.assert_allclose(overlap.diversity(masks, 2), [2 / 9, 1], rtol=1e-6)
  # Without the empty one the pair of 2 / 3; of one mask there is no pair.
  present = np.array([[True, True, False], [True, False, False]])
  np.testing.assert_allclose(overlap.diversity(masks, 2, present), [2 / 3, np.nan], rtol=1e-6)
