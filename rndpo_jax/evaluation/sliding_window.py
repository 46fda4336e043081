"""Logits of images that are larger than the network's input, of overlapping tiles.

Source: Isensee et al., "nnU-Net", Nature Methods 2021. A tile's logits are weighted by a Gaussian
about its middle, added up in float32, and divided by the sum of weights:

  z(p) = sum over tiles t of w(p - t) z_t(p - t) / sum over tiles t of w(p - t)

With mirroring z_t is the mean over flips of the tile, each flipped back. A 2D network sees each
slice along the last axis of a volume alone.

Tiles of many images fill the batches, which the local devices share. Tiles go along one axis, and
what no later tile reaches is handed out as a slab at once. `tile_sums` adds up, on a device where
the image's sums fit, else on the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import types
from rndpo_jax.data import loader
from rndpo_jax.evaluation import tile_places, tile_sums
from rndpo_jax.evaluation.tile_places import positions as positions  # of this module's interface
from rndpo_jax.evaluation.tile_places import weights as weights
from rndpo_jax.evaluation.tile_sums import Slab as Slab
from rndpo_jax.runtime import sharding

# Pixels of a batch on a device, at most. A CPU is fastest with few: they stay in its cache.
_BATCH_PIXELS = {"cpu": 2**16}
_BATCH_PIXELS_ELSEWHERE = 2**22


class Window(NamedTuple):
  """How tiles are cut and what is computed of them; see `make`.

  Attributes:
    patch: the network's input.
    step: from tile to tile at most, in patches.
    flips: sets of spatial axes; each tile is flipped along each.
    batch_size: tiles in a batch.
    apply_tiles: (params, (tiles f32[B, *patch, I], index into `flips` i32[B])) -> the logits times
      weights, f32[B, *patch, C], still flipped.
    device_bytes: sums of an image that take more are on the host.
  """

  patch: tuple[int, ...]
  step: float
  flips: tuple[tuple[int, ...], ...]
  batch_size: int
  apply_tiles: Callable[..., jax.Array]
  device_bytes: int


def batch_size(patch: Sequence[int]) -> int:
  """Tiles in a batch that the local devices share.

  Evaluation and prediction take the same, so that their masks are equal to the last bit.
  """
  pixels = _BATCH_PIXELS.get(jax.default_backend(), _BATCH_PIXELS_ELSEWHERE)
  return jax.local_device_count() * max(1, pixels // math.prod(patch))


def make(
  apply: Callable[[types.Params, jax.Array], jax.Array],
  patch: Sequence[int],
  *,
  batch_size: int,
  step: float = 0.5,
  mirror_axes: Sequence[int] = (),
  device_bytes: int | None = None,
) -> Window:
  """A window for a network; compiles nothing yet.

  Args:
    apply: (params, f32[B, *patch, I]) -> logits f32[B, *patch, C].
    patch: size of its input.
    batch_size: tiles in a batch, rounded up to what the local devices share.
    step: from tile to tile at most, in patches.
    mirror_axes: spatial axes of the patch; logits are averaged over flips along each set of them.
    device_bytes: as in `Window`; `tile_sums.device_bytes` by default.

  Raises:
    ValueError: if an axis is not one of the patch, or the step is not in (0, 1].
  """
  patch = tuple(map(int, patch))
  if not set(mirror_axes) <= set(range(len(patch))) or not 0 < step <= 1:
    raise ValueError(f"mirror_axes {mirror_axes} or step {step} do not fit the patch {patch}")
  sets = [itertools.combinations(sorted(mirror_axes), n) for n in range(len(mirror_axes) + 1)]
  flips = tuple(itertools.chain(*sets))
  vectors = []  # of each axis f32[flips, length]: the map of weights would be large in 3D
  for axis, length in enumerate(patch):
    own = tile_places.weights_of_axis(length).astype(np.float32)
    vectors.append(np.stack([own[::-1] if axis in flip else own for flip in flips]))

  def weighted(params, rows):
    tiles, numbers = rows
    logits = apply(params, tiles)
    for axis, vector in enumerate(vectors):
      shape = [len(tiles)] + [1] * (logits.ndim - 1)
      shape[1 + axis] = patch[axis]
      logits *= jnp.asarray(vector)[numbers].reshape(shape)
    return logits

  parts = jax.local_device_count()
  rounded = parts * -(-batch_size // parts)
  if device_bytes is None:
    device_bytes = tile_sums.device_bytes()
  return Window(patch, step, flips, rounded, sharding.over_local_devices(weighted), device_bytes)


def predict(window: Window, params: types.Params, image: np.ndarray) -> np.ndarray:
  """The logits of one image.

  Args:
    window: of `make`.
    params: of the network, on the local devices (`sharding.put_on_local_devices`).
    image: f32[*S, I], normalised; smaller than the patch it is padded with zeros on both sides.

  Returns:
    f32[*S, C].
  """
  return np.concatenate(
    [slab.logits for slab in slabs(window, params, [(None, image)])], axis=slab_axis(window, image)
  )


def slabs(
  window: Window, params: types.Params, images: Iterable[tuple[Any, np.ndarray]]
) -> Iterator[Slab]:
  """The logits of images, part by part.

  Args:
    window: of `make`.
    params: as in `predict`.
    images: (key, f32[*S, I]) each; the next one is asked for when the tiles of the last are cut.

  Yields:
    The slabs of the first image in order, then those of the second, and so on.
  """
  sums: tile_sums.HostSums | tile_sums.DeviceSums | None = None

  def forward(rows):
    nonlocal sums
    padded = rows + rows[-1:] * (window.batch_size - len(rows))
    tiles = np.stack([row.image.cut(row.start, row.flip) for row in padded])
    numbers = np.array([row.flip for row in padded], np.int32)
    batch = tile_sums.BatchLogits(window.apply_tiles(params, (tiles, numbers)))
    found, first = [], 0
    for _, own in itertools.groupby(rows, key=lambda row: id(row.image)):
      own = list(own)
      if sums is None:
        sums = tile_sums.start(own[0].image, batch.num_logits, window.device_bytes)
      found.append(sums.add(batch, own, first))
      first += len(own)
      if own[-1].is_last:
        sums = None
    return found

  batches = _batched(_rows(window, images), window.batch_size)
  for found in loader.prefetch(batches, forward, 1):
    for finished in found:
      yield from finished()


def slab_axis(window: Window, image: np.ndarray) -> int:
  """The axis that an image is cut along: the last one if slices are seen alone, else that which
  leaves least to be kept."""
  chex.assert_rank(image, {len(window.patch) + 1, len(window.patch) + 2})
  if image.ndim - 1 > len(window.patch):
    return image.ndim - 2
  return int(np.argmin([p / max(p, n) for p, n in zip(window.patch, image.shape, strict=False)]))


def _rows(window: Window, images: Iterable[tuple[Any, np.ndarray]]) -> Iterator[tile_sums.Row]:
  for key, image in images:
    axis = slab_axis(window, image)
    tiled = tile_sums.TiledImage(key, image, axis, window.patch, window.step, window.flips)
    del image  # the tiled one may be a copy
    left = math.prod(map(len, tiled.starts)) * len(window.flips)
    for start in itertools.product(*tiled.starts):
      for flip in range(len(window.flips)):
        left -= 1
        yield tile_sums.Row(tiled, start, flip, left == 0)


def _batched(rows: Iterator[tile_sums.Row], size: int) -> Iterator[list[tile_sums.Row]]:
  while batch := list(itertools.islice(rows, size)):
    yield batch
