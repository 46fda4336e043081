"""Generated images that look like medical ones, with the truth known.

A body with uneven tissue holds either one organ among look-alikes (2 classes), or a heart in
short axis: a bright left ventricle in a ring of myocardium, a crescent of right ventricle
beside it, and bright vessels around (4 classes). Borders are deformed, blurred and of low
contrast; a bias field, a contrast and a noise level of the case's own lie over all. What tells
the organ from its look-alikes is its grain and its dark capsule, hardly its brightness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from rndpo_jax import errors
from rndpo_jax.data import records

CLASS_NAMES = {
  2: ["background", "organ"],
  4: ["background", "right ventricle", "myocardium", "left ventricle"],
}

_MAX_BYTES = 64 * 2**30  # more would be drawn for days
_WIDER = {2: 1.0, 3: 1.25}  # structures fill less of a volume than of an image


def open_source(config) -> records.Source:
  """The phantom of `config.data`, deterministic from its seed and the case number.

  Raises:
    records.DataError: on a size or a number of classes that it cannot draw.
  """
  data, phantom = config.data, config.data.phantom
  size = tuple(phantom.size)
  if data.num_classes not in CLASS_NAMES:
    raise errors.DataError(
      f"config.data.num_classes: found {data.num_classes}; the phantom draws 2 or 4 classes"
    )
  if len(size) != data.spatial_dims or min(size) < 8:
    raise errors.DataError(
      f"config.data.phantom.size: found {size}, expected {data.spatial_dims} entries of at "
      "least 8, as config.data.spatial_dims says"
    )
  num_bytes = phantom.num_cases * math.prod(size)
  if num_bytes > _MAX_BYTES or 8 * math.prod(size) > _MAX_BYTES:
    raise errors.DataError(
      f"config.data.phantom: {phantom.num_cases} images of {size} are {num_bytes / 2**30:,.0f} GiB "
      f"of masks alone, expected at most {_MAX_BYTES >> 30} GiB; take fewer (num_cases) or smaller "
      "ones (size)"
    )
  ids = [f"phantom_{case:04d}" for case in range(phantom.num_cases)]
  entries = [
    records.record(
      record_id=name,
      case_id=name,
      group_id=records.extract(data.group_pattern, name, "group_pattern"),
      shape=size,
      has_mask=True,
    )
    for name in ids
  ]

  def read(start: int) -> Iterator[records.Pixels]:
    for case in range(start, phantom.num_cases):
      image, mask = draw(
        [phantom.seed, case],
        size=size,
        num_classes=data.num_classes,
        contrast=phantom.contrast,
        noise=phantom.noise,
      )
      yield records.Pixels(image[..., None], mask, np.eye(4, dtype=np.float32))

  return records.Source(
    name=data.name,
    num_classes=data.num_classes,
    class_names=CLASS_NAMES[data.num_classes],
    num_channels=1,
    spatial_dims=data.spatial_dims,
    spacing_unit="voxel",
    dtype="uint8",
    records=entries,
    read=read,
    fingerprint=lambda case: f"phantom {phantom.seed} {case} {phantom.contrast} {phantom.noise}",
  )


def draw(
  seed, *, size: tuple[int, ...], num_classes: int, contrast: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one case.

  Args:
    seed: int or list of ints, for `numpy.random.default_rng`.
    size: (H, W) or (H, W, Z).
    num_classes: 2 or 4.
    contrast: of the organ against its surround, of an intensity range of about 1.
    noise: standard deviation, of the same range.

  Returns:
    (image u8[*size], mask u8[*size]).
  """
  rng = np.random.default_rng(seed)
  axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in size]
  grid = np.stack(np.meshgrid(*axes, indexing="ij"))
  # One warp for all, so that neighbours stay neighbours.
  grid = grid + 0.04 * np.stack([_field(rng, size, 0.12) for _ in size])
  body = _ellipse(rng, grid, np.zeros(len(size)), rng.uniform(0.85, 1.0, len(size)))
  tissue = 0.35 + 0.05 * _field(rng, size, 0.05) + 0.04 * _field(rng, size, 0.2)
  fat = 0.15 * _inside(np.abs(body) - 0.05, 0.02)
  paint = _organ if num_classes == 2 else _heart
  image, mask = paint(rng, grid, tissue + fat, contrast)
  mask = np.where(body < 0, mask, 0).astype(np.uint8)
  image = image * _inside(body, 0.02)
  return _acquire(rng, image, noise), mask


def _organ(rng, grid, image, contrast):
  """One organ with grain and capsule, and look-alikes without."""
  size, dims = grid.shape[1:], grid.shape[0]
  center = _direction(rng, dims) * rng.uniform(0.05, 0.42)
  radii = rng.uniform(0.26, 0.44, dims) * _WIDER[dims]
  organ = _ellipse(rng, grid, center, radii, wobble=0.16)
  if rng.random() < 0.5:  # a hilum, as in a kidney
    notch = center + _direction(rng, dims) * rng.uniform(0.35, 0.42)
    notch = 0.6 * _ellipse(rng, grid, notch, np.full(dims, 0.18))
    organ = 0.1 * np.logaddexp(organ / 0.1, -notch / 0.1)  # a rounded maximum
  level = contrast * rng.uniform(0.35, 0.8)
  for _ in range(rng.integers(2, 5)):
    place = center + _direction(rng, dims) * rng.uniform(0.5, 0.85)
    other = _ellipse(rng, grid, place, rng.uniform(0.12, 0.32, dims), wobble=0.1)
    other = np.maximum(other, 0.1 - organ)
    image = image + level * rng.uniform(0.6, 1.2) * _inside(other, 0.08)
  grain = 0.09 * _field(rng, size, 0.014) + 0.07 * _field(rng, size, 0.08)
  image = image + (level + grain) * _inside(organ, rng.uniform(0.05, 0.14))
  capsule = np.exp(-0.5 * ((organ - 0.04) / 0.05) ** 2)
  return image - 0.1 * rng.uniform(0.3, 1.2) * capsule, organ < 0


def _heart(rng, grid, image, contrast):
  """Left ventricle (3) in myocardium (2), right ventricle (1) beside, vessels around."""
  size, dims = grid.shape[1:], grid.shape[0]
  center = rng.uniform(-0.18, 0.18, dims)
  radii = rng.uniform(0.34, 0.46, dims) * _WIDER[dims]
  outer = _ellipse(rng, grid, center, radii, wobble=0.06)
  inner = outer + rng.uniform(0.25, 0.42)
  side = np.zeros(dims)
  side[:2] = _direction(rng, 2)
  right = _ellipse(
    rng, grid, center + side * rng.uniform(0.32, 0.45), radii * rng.uniform(0.85, 1.1), wobble=0.1
  )
  right = np.maximum(right, 0.03 - outer)
  blood = contrast * rng.uniform(0.5, 0.9)
  for _ in range(rng.integers(2, 5)):
    place = center + _direction(rng, dims) * rng.uniform(0.7, 1.0)
    vessel = _ellipse(rng, grid, place, rng.uniform(0.1, 0.28, dims), wobble=0.1)
    vessel = np.maximum(vessel, 0.1 - np.minimum(outer, right))
    image = image + blood * rng.uniform(0.6, 1.1) * _inside(vessel, 0.08)
  soft = rng.uniform(0.04, 0.1)
  wall = -contrast * rng.uniform(0.05, 0.35)
  image = image + wall * (_inside(outer, soft) - _inside(inner, soft))
  image = (
    image + blood * _inside(inner, soft) + blood * rng.uniform(0.8, 1.05) * _inside(right, soft)
  )
  muscle = ndimage.gaussian_filter(_field(rng, size, 0.03) > 1.2, 0.7, output=np.float32)
  image = image - 0.6 * blood * muscle * _inside(inner, 0.05)  # papillary muscles
  mask = np.where(right < 0, 1, 0)
  mask = np.where(outer < 0, 2, mask)
  return image, np.where(inner < 0, 3, mask)


def _acquire(rng, image, noise):
  """Bias field, blur, tone curve and noise of the case's own, then 8 bits."""
  size = image.shape
  image = image * (1 + np.tanh(rng.uniform(0.05, 0.3) * _field(rng, size, 0.35)))
  image = ndimage.gaussian_filter(image, rng.uniform(0.3, 0.8))
  image = np.clip(image, 0, None) ** rng.uniform(0.75, 1.3)
  image = image * rng.uniform(0.75, 0.95) / np.percentile(image, 99)
  image = image + noise * rng.uniform(0.5, 1.2) * rng.standard_normal(size) * (0.4 + image)
  return (255 * np.clip(image, 0, 1)).astype(np.uint8)


def _direction(rng, dims):
  vector = rng.standard_normal(dims)
  return vector / np.linalg.norm(vector)


def _inside(level, width):
  """1 inside, 0 outside, over a border of about `width`."""
  return 1 / (1 + np.exp(np.clip(4 * level / width, -40, 40)))


def _field(rng, size, width):
  """Smooth Gaussian field of unit variance; `width` as a fraction of each axis."""
  noise = rng.standard_normal(size).astype(np.float32)
  field = ndimage.gaussian_filter(noise, [width * n for n in size], truncate=3)
  return (field - field.mean()) / field.std()


def _ellipse(rng, grid, center, radii, wobble=0.0):
  """Signed level of an ellipse (ellipsoid) turned in the (H, W) plane: negative inside."""
  shape = (-1, *(1,) * (grid.ndim - 1))
  offset = grid - np.asarray(center, np.float32).reshape(shape)
  angle = rng.uniform(0, np.pi)
  first = np.cos(angle) * offset[0] + np.sin(angle) * offset[1]
  second = np.cos(angle) * offset[1] - np.sin(angle) * offset[0]
  rotated = np.stack(list(itertools.chain([first, second], offset[2:])))
  distance = np.sqrt(np.sum((rotated / np.reshape(radii, shape)) ** 2, axis=0))
  level = distance - 1
  return level + wobble * _field(rng, grid.shape[1:], 0.1) if wobble else level
