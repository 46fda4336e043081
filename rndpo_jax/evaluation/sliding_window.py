"""Logits of images that are larger than the network's input, of overlapping tiles.

Source: Isensee et al., "nnU-Net", Nature Methods 2021. A tile's logits are weighted by a Gaussian
about its middle, added up in float32, and divided by the sum of weights:

  z(p) = sum over tiles t of w(p - t) z_t(p - t) / sum over tiles t of w(p - t)

With mirroring z_t is the mean over flips of the tile, each flipped back. A 2D network sees each
slice along the last axis of a volume alone.

Tiles of many images fill the batches, which the local devices share. Tiles go along one axis, and
what no later tile reaches is handed out as a slab at once: one patch's length of logits is all that
is ever kept of an image.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from rndpo_jax import types
from rndpo_jax.data import loader
from rndpo_jax.runtime import sharding

_SIGMA = 1 / 8  # of the Gaussian, in patches
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
  """

  patch: tuple[int, ...]
  step: float
  flips: tuple[tuple[int, ...], ...]
  batch_size: int
  apply_tiles: Callable[..., jax.Array]


class Slab(NamedTuple):
  """A finished part of an image's logits.

  Attributes:
    key: of the image.
    axis: that the image is cut along.
    start: first place of this part along it.
    logits: f32[*S, C] with the part's length along `axis`.
    is_last: whether no part of the image follows.
  """

  key: Any
  axis: int
  start: int
  logits: np.ndarray
  is_last: bool


def positions(size: Sequence[int], patch: Sequence[int], step: float = 0.5) -> list[tuple]:
  """Where tiles start: evenly spread, at most `step` patches from one to the next.

  Args:
    size: of the image, no axis shorter than the patch.
    patch: of the network.
    step: above 0, at most 1.

  Returns:
    A start an axis for each tile, those of the last axis changing fastest.
  """
  return list(itertools.product(*_starts(size, patch, step)))


def batch_size(patch: Sequence[int]) -> int:
  """Tiles in a batch that the local devices share.

  Evaluation and prediction take the same, so that their masks are equal to the last bit.
  """
  pixels = _BATCH_PIXELS.get(jax.default_backend(), _BATCH_PIXELS_ELSEWHERE)
  return jax.local_device_count() * max(1, pixels // math.prod(patch))


def weights(patch: Sequence[int]) -> np.ndarray:
  """The weight of a tile's pixels, f32[*patch]: a Gaussian, 1 at patch // 2, never 0."""
  return functools.reduce(np.multiply.outer, map(_weights_of_axis, patch)).astype(np.float32)


def make(
  apply: Callable[[types.Params, jax.Array], jax.Array],
  patch: Sequence[int],
  *,
  batch_size: int,
  step: float = 0.5,
  mirror_axes: Sequence[int] = (),
) -> Window:
  """A window for a network; compiles nothing yet.

  Args:
    apply: (params, f32[B, *patch, I]) -> logits f32[B, *patch, C].
    patch: size of its input.
    batch_size: tiles in a batch, rounded up to what the local devices share.
    step: from tile to tile at most, in patches.
    mirror_axes: spatial axes of the patch; logits are averaged over flips along each set of them.

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
    own = _weights_of_axis(length).astype(np.float32)
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
  return Window(patch, step, flips, rounded, sharding.over_local_devices(weighted))


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

  def forward(rows):
    padded = rows + rows[-1:] * (window.batch_size - len(rows))
    tiles = np.stack([row.tile() for row in padded])
    numbers = np.array([row.flip for row in padded], np.int32)
    return rows, window.apply_tiles(params, (tiles, numbers))

  batches = _batched(_rows(window, images), window.batch_size)
  for rows, logits in loader.prefetch(batches, forward, 1):
    for row, own in zip(rows, np.asarray(logits), strict=False):
      yield from row.volume.add(row, own)


def slab_axis(window: Window, image: np.ndarray) -> int:
  """The axis that an image is cut along: the last one if slices are seen alone, else that which
  leaves least to be kept."""
  chex.assert_rank(image, {len(window.patch) + 1, len(window.patch) + 2})
  if image.ndim - 1 > len(window.patch):
    return image.ndim - 2
  return int(np.argmin([p / max(p, n) for p, n in zip(window.patch, image.shape, strict=False)]))


class _Row(NamedTuple):
  """A tile of a batch; `start` has the axis of the slabs first."""

  volume: _Volume
  start: tuple[int, ...]
  flip: int
  is_last: bool

  def tile(self) -> np.ndarray:
    return np.flip(self.volume.cut(self.start), self.volume.window.flips[self.flip])


class _Volume:
  """An image and the sums of its tiles' logits, the axis of the slabs moved to the front."""

  def __init__(self, window: Window, key: Any, image: np.ndarray):
    self.window, self.key = window, key
    self.axis = slab_axis(window, image)
    self.has_slices = image.ndim - 1 > len(window.patch)
    patch = (*window.patch, 1) if self.has_slices else window.patch
    pads = [max(p - n, 0) for p, n in zip(patch, image.shape, strict=False)]
    pads = [(pad // 2, pad - pad // 2) for pad in pads]
    if any(map(any, pads)):
      image = np.pad(image, [*pads, (0, 0)])
    self.image = np.moveaxis(image, self.axis, 0)
    if self.has_slices:  # else each tile would be gathered from all over the memory
      self.image = np.ascontiguousarray(self.image)
    self.pads, self.patch = _to_front(pads, self.axis), _to_front(patch, self.axis)
    size = self.image.shape[:-1]
    self.starts = _starts(size, self.patch, window.step)
    self.totals = [
      _total_weights(*arguments) for arguments in zip(self.starts, size, self.patch, strict=True)
    ]
    self.done = 0  # places of the first axis that were handed out
    self.sums: np.ndarray | None = None

  def cut(self, start: tuple[int, ...]) -> np.ndarray:
    """[*patch, I], the axes in the network's order."""
    tile = self.image[tuple(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))]
    return tile[0] if self.has_slices else np.moveaxis(tile, 0, self.axis)

  def add(self, row: _Row, logits: np.ndarray) -> Iterator[Slab]:
    """Adds a tile of weighted logits f32[*patch, C]; what it shows to be finished comes out."""
    if self.sums is None:
      others = self.image.shape[1:-1]
      self.sums = np.zeros((self.patch[0], *others, logits.shape[-1]), np.float32)
    if row.start[0] > self.done:
      yield self._slab(row.start[0] - self.done, is_last=False)
    logits = np.flip(logits, self.window.flips[row.flip])
    logits = logits[None] if self.has_slices else np.moveaxis(logits, self.axis, 0)
    place = [slice(s, s + p) for s, p in zip(row.start[1:], self.patch[1:], strict=True)]
    self.sums[(slice(None), *place)] += logits
    if row.is_last:
      yield self._slab(self.patch[0], is_last=True)

  def _slab(self, count: int, is_last: bool) -> Slab:
    first, *rest = self.totals
    logits = self.sums[:count] / _along(0, first[self.done : self.done + count], self.sums.ndim)
    for axis, total in enumerate(rest, 1):
      logits /= _along(axis, total, logits.ndim)
    if len(self.window.flips) > 1:
      logits /= len(self.window.flips)
    if not is_last:
      for low in range(0, len(self.sums) - count, count):  # blocks that do not overlap: no copies
        part = self.sums[low + count : low + 2 * count]
        self.sums[low : low + len(part)] = part
      self.sums[-count:] = 0
    start, self.done = self.done, self.done + count
    return self._without_padding(start, logits, is_last)

  def _without_padding(self, start: int, logits: np.ndarray, is_last: bool) -> Slab:
    size = self.image.shape[:-1]
    inside = [slice(low, n - high) for n, (low, high) in zip(size, self.pads, strict=True)]
    if any(map(any, self.pads)):
      low, high = inside[0].start, inside[0].stop
      own = slice(max(low - start, 0), max(high - start, 0))
      start, logits = max(start - low, 0), logits[(own, *inside[1:])]
    return Slab(self.key, self.axis, start, np.moveaxis(logits, 0, self.axis), is_last)


def _rows(window: Window, images: Iterable[tuple[Any, np.ndarray]]) -> Iterator[_Row]:
  for key, image in images:
    volume = _Volume(window, key, image)
    left = math.prod(map(len, volume.starts)) * len(window.flips)
    for start in itertools.product(*volume.starts):
      for flip in range(len(window.flips)):
        left -= 1
        yield _Row(volume, start, flip, left == 0)


def _batched(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
  while batch := list(itertools.islice(rows, size)):
    yield batch


def _starts(size: Sequence[int], patch: Sequence[int], step: float) -> list[list[int]]:
  """Of each axis; a patch of 1 sees every place."""
  starts = []
  for n, p in zip(size, patch, strict=True):
    if n < p:
      raise ValueError(f"an image of size {tuple(size)} is smaller than the patch {tuple(patch)}")
    count = n if p == 1 else math.ceil((n - p) / (p * step)) + 1
    gap = (n - p) / max(count - 1, 1)
    starts.append([round(gap * i) for i in range(count)])
  return starts


@functools.lru_cache(maxsize=64)
def _weights_of_axis(length: int) -> np.ndarray:
  """A Gaussian about length // 2, 1 there; f64[length]."""
  middle = np.zeros(length)
  middle[length // 2] = 1
  found = ndimage.gaussian_filter1d(middle, length * _SIGMA, mode="constant")
  return found / found.max()


def _total_weights(starts: list[int], size: int, patch: int) -> np.ndarray:
  """The sum of tiles' weights along one axis, f64[size]; those of all axes are multiplied."""
  total = np.zeros(size)
  for start in starts:
    total[start : start + patch] += _weights_of_axis(patch)
  return total


def _along(axis: int, values: np.ndarray, ndim: int) -> np.ndarray:
  return values.astype(np.float32).reshape([-1 if n == axis else 1 for n in range(ndim)])


def _to_front(values: Sequence, axis: int) -> list:
  rest = list(values)
  return [rest.pop(axis), *rest]
