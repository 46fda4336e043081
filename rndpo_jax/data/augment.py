"""Random changes of normalised images and, where they move pixels, of their masks; on the device.

Each image draws alone, from its own key. All masks of an image move as the image does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from rndpo_jax.data.noise import smooth_noise

# Of a z-score, less than which is nothing: around a region splines leave that much of a 0.
_NEAR_ZERO = 1e-4
# Options that move pixels; a view without them keeps every pixel in its place.
MOVING = (
  "flip", "turn", "elastic", "elastic_scale", "elastic_smoothing", "affine", "affine_degrees",
  "affine_zoom",
)  # fmt: skip


def augment(
  key: jax.Array, images: jax.Array, masks: jax.Array, *, flip: float, turn: float,
  intensity: float, intensity_scale: float, gamma: float, gamma_scale: float, noise: float,
  noise_scale: float, elastic: float, elastic_scale: float, elastic_smoothing: float,
  affine: float, affine_degrees: float, affine_zoom: float, in_mask: tuple[bool, ...] = (),
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Augments a batch; all options are Python numbers, and a probability of 0 costs nothing.

  Order: affine map and elastic deformation as one, quarter turns, flips; then gamma, intensity,
  noise; then channels of `in_mask` are 0 again where they were before gamma, as in nnU-Net.

  Args:
    key: one key; position n of the batch draws from fold_in(key, n).
    images: f32[B, *S, I], normalised.
    masks: u8[B, M, *S], M masks an image; moved by nearest neighbour.
    flip: probability that an axis is mirrored, for each spatial axis alone.
    turn: probability of a turn by 90, 180 or 270 degrees, equally likely, in the (H, W) plane.
    intensity: probability of x -> x (1 + u s) + v s, s = intensity_scale, u and v uniform in
      -1..1 for each channel.
    gamma: probability of r -> r ** exp(u s), s = gamma_scale, u uniform in -1..1; r is x
      brought to 0..1 by its channel's minimum and maximum, and brought back after.
    noise: probability of adding Gaussian noise with standard deviation `noise_scale`.
    elastic: probability of a smooth deformation, by a Gaussian displacement field with standard
      deviation `elastic_scale` pixels, smoothed by a Gaussian of width `elastic_smoothing` pixels.
    affine: probability of a rotation about the centre in the (H, W) plane, by an angle uniform in
      -affine_degrees..affine_degrees, with a zoom of every axis by one factor exp(u affine_zoom),
      u uniform in -1..1.
    in_mask: whether a channel was normalised inside the part that is not zero, and is 0 outside
      it; outside is where all such channels are 0. Empty if none was.

  Returns:
    (images f32[B, *S, I], masks u8[B, M, *S]).

  Raises:
    ValueError: if quarter turns are asked of images whose H and W differ.
  """
  if turn > 0 and images.shape[1] != images.shape[2]:
    raise ValueError(
      f"augment: quarter turns need equal H and W, found {images.shape[1:3]}; set "
      "config.augment.turn=0"
    )

  def one(position, image, mask):
    keys = jax.random.split(jax.random.fold_in(key, position), 7)
    places = grid = _grid(image.shape[:-1])
    if affine > 0:
      places = _affine(keys[6], places, affine, affine_degrees, affine_zoom)
    if elastic > 0:
      places = _elastic(keys[0], places, elastic, elastic_scale, elastic_smoothing)
    if places is not grid:
      image, mask = _sample(image, mask, places)
    if turn > 0:
      image, mask = _turn(keys[1], image, mask, turn)
    if flip > 0:
      image, mask = _flip(keys[2], image, mask, flip)
    moved = image
    if gamma > 0:
      image = _gamma(keys[3], image, gamma, gamma_scale)
    if intensity > 0:
      image = _intensity(keys[4], image, intensity, intensity_scale)
    if noise > 0:
      image = _noise(keys[5], image, noise, noise_scale)
    if any(in_mask):
      image = _zero_outside(image, moved, np.array(in_mask))
    return image, mask

  positions = jnp.arange(images.shape[0], dtype=jnp.uint32)
  return jax.vmap(one)(positions, images, masks)


def _turn(key, image, mask, probability):
  """k quarter turns, as numpy.rot90: a transpose if k is odd, then mirrored axes."""
  happens, quarters = jax.random.split(key)
  k = jax.random.randint(quarters, (), 1, 4)
  k = jnp.where(jax.random.bernoulli(happens, probability), k, 0)

  def turned(x, axis):
    x = jnp.where(k % 2 == 1, jnp.swapaxes(x, axis, axis + 1), x)
    x = jnp.where((k == 1) | (k == 2), jnp.flip(x, axis), x)
    return jnp.where((k == 2) | (k == 3), jnp.flip(x, axis + 1), x)

  return turned(image, 0), turned(mask, 1)


def _flip(key, image, mask, probability):
  for axis, happens in enumerate(jax.random.bernoulli(key, probability, (image.ndim - 1,))):
    image = jnp.where(happens, jnp.flip(image, axis), image)
    mask = jnp.where(happens, jnp.flip(mask, axis + 1), mask)
  return image, mask


def _grid(size) -> list[jax.Array]:
  """Where each pixel takes its value from: its own place, f32[*S] an axis."""
  return jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in size), indexing="ij")


def _affine(key, places, probability, degrees, zoom):
  happens_key, angle_key, zoom_key = jax.random.split(key, 3)
  happens = jax.random.bernoulli(happens_key, probability)
  angle = jnp.radians(degrees) * jax.random.uniform(angle_key, minval=-1.0)
  angle = jnp.where(happens, angle, 0.0)
  factor = jnp.where(happens, jnp.exp(-zoom * jax.random.uniform(zoom_key, minval=-1.0)), 1.0)
  middle = [(n - 1) / 2 for n in places[0].shape]
  first, second, *rest = (factor * (x - m) for x, m in zip(places, middle, strict=True))
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turned = (cos * first - sin * second, sin * first + cos * second, *rest)
  return [x + m for x, m in zip(turned, middle, strict=True)]


def _elastic(key, places, probability, scale, smoothing):
  happens, field = jax.random.split(key)
  size = places[0].shape
  shift = scale * smooth_noise(field, (*size, len(size)), smoothing)
  shift = jnp.where(jax.random.bernoulli(happens, probability), shift, 0.0)
  return [axis + shift[..., d] for d, axis in enumerate(places)]


def _sample(image, mask, places):
  """Linear for the image, nearest for the masks; outside is what is at the edge."""

  def sample(channel, order):
    return ndimage.map_coordinates(channel, places, order=order, mode="nearest")

  image = jax.vmap(lambda channel: sample(channel, 1), in_axes=-1, out_axes=-1)(image)
  return image, jax.vmap(lambda one: sample(one, 0))(mask)


def _gamma(key, image, probability, scale):
  happens, draw = jax.random.split(key)
  axes = tuple(range(image.ndim - 1))
  low = jnp.min(image, axes, keepdims=True)
  extent = jnp.max(image, axes, keepdims=True) - low
  exponent = jnp.exp(jax.random.uniform(draw, (), minval=-scale, maxval=scale))
  ratio = (image - low) / jnp.where(extent > 0, extent, 1.0)
  return jnp.where(
    jax.random.bernoulli(happens, probability), ratio**exponent * extent + low, image
  )


def _intensity(key, image, probability, scale):
  happens, draw = jax.random.split(key)
  shape = (2, *(1,) * (image.ndim - 1), image.shape[-1])
  factor, shift = scale * jax.random.uniform(draw, shape, minval=-1.0)
  changed = image * (1.0 + factor) + shift
  return jnp.where(jax.random.bernoulli(happens, probability), changed, image)


def _noise(key, image, probability, scale):
  happens, draw = jax.random.split(key)
  changed = image + scale * jax.random.normal(draw, image.shape)
  return jnp.where(jax.random.bernoulli(happens, probability), changed, image)


def _zero_outside(image, before, in_mask):
  is_outside = jnp.all(jnp.abs(before[..., in_mask]) < _NEAR_ZERO, axis=-1, keepdims=True)
  return jnp.where(is_outside & in_mask.reshape((1,) * (image.ndim - 1) + (-1,)), 0.0, image)
