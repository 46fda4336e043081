"""Sums of the logits of an image's tiles, on a device or on the host.

Both forms add the same float32 numbers in the same order, tile after tile, and what follows is done
on the host in both: their logits are equal bit for bit, whatever the number of devices.

On a device the sums are of the whole image. Its sides are rounded up, so that images of nearly one
size share a program; only finished logits come to the host, in parts of `_PART_VALUES`. On the host
one patch's length of logits is all that is ever kept of an image: each length that no later tile
reaches is handed out, and the rest moves up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax.evaluation import tile_places

_PART_VALUES = 2**24  # logits that come from a device at once
_DEVICE_SHARE = 4  # an image's sums take at most one part in so many of a device's memory


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


class Row(NamedTuple):
  """A tile of a batch.

  Attributes:
    image: that it is cut from.
    start: of the tile, the axis of the slabs first.
    flip: its number among the sets of axes.
    is_last: of the image.
  """

  image: TiledImage
  start: tuple[int, ...]
  flip: int
  is_last: bool


class BatchLogits:
  """Logits f32[B, *patch, C] of a batch, weighted and still flipped, brought where they are asked
  for: once, however many images the tiles are of."""

  def __init__(self, logits: jax.Array):
    self._logits = logits

  @property
  def num_logits(self) -> int:
    return self._logits.shape[-1]

  @functools.cached_property
  def on_device(self) -> jax.Array:
    return jax.device_put(self._logits, jax.local_devices()[0])

  @functools.cached_property
  def on_host(self) -> np.ndarray:
    return np.asarray(self._logits)


class TiledImage:
  """An image, padded to the patch, the axis of the slabs moved to the front.

  Args:
    key: what its slabs are called.
    image: f32[*S, I].
    axis: of the slabs.
    patch: of the network; one axis fewer than S where slices are seen alone.
    step: from tile to tile at most, in patches.
    flips: sets of axes of the patch.
  """

  def __init__(self, key: Any, image: np.ndarray, axis: int, patch, step: float, flips):
    self.key, self.axis, self.flips = key, axis, flips
    self.has_slices = image.ndim - 1 > len(patch)
    patch = (*patch, 1) if self.has_slices else patch
    pads = [max(p - n, 0) for p, n in zip(patch, image.shape, strict=False)]
    pads = [(pad // 2, pad - pad // 2) for pad in pads]
    if any(map(any, pads)):
      image = np.pad(image, [*pads, (0, 0)])
    self._image = np.moveaxis(image, axis, 0)
    if self.has_slices:  # else each tile would be gathered from all over the memory
      self._image = np.ascontiguousarray(self._image)
    self.pads, self.patch = _to_front(pads, axis), _to_front(patch, axis)
    self.size = self._image.shape[:-1]
    self.starts = tile_places.starts(self.size, self.patch, step)
    self._totals = [
      tile_places.total_weights(*arguments)
      for arguments in zip(self.starts, self.size, self.patch, strict=True)
    ]

  def cut(self, start: Sequence[int], flip: int) -> np.ndarray:
    """[*patch, I], the axes in the network's order."""
    tile = self._image[tuple(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))]
    tile = tile[0] if self.has_slices else np.moveaxis(tile, 0, self.axis)
    return self.flip(tile, flip)

  def flip(self, tile: np.ndarray, number: int) -> np.ndarray:
    """Along a set of axes; most often along none, which is to cost nothing."""
    axes = self.flips[number]
    return np.flip(tile, axes) if axes else tile

  def slab(self, start: int, sums: np.ndarray, is_last: bool) -> Slab:
    """What sums f32[n, *others, C] from place `start` on come to, the padding taken away."""
    first, *rest = self._totals
    logits = sums / _along(0, first[start : start + len(sums)], sums.shape)
    for axis, total in enumerate(rest, 1):
      logits /= _along(axis, total, logits.shape)
    if len(self.flips) > 1:
      logits /= len(self.flips)
    inside = [slice(low, n - high) for n, (low, high) in zip(self.size, self.pads, strict=True)]
    if any(map(any, self.pads)):
      low, high = inside[0].start, inside[0].stop
      own = slice(max(low - start, 0), max(high - start, 0))
      start, logits = max(start - low, 0), logits[(own, *inside[1:])]
    return Slab(self.key, self.axis, start, np.moveaxis(logits, 0, self.axis), is_last)


class HostSums:
  """One patch's length of sums in the host's memory."""

  def __init__(self, image: TiledImage, num_logits: int):
    self.image = image
    self._done = 0  # places of the first axis that were handed out
    self._sums = np.zeros((image.patch[0], *image.size[1:], num_logits), np.float32)

  def add(self, batch: BatchLogits, rows: Sequence[Row], first: int) -> Callable:
    """As `DeviceSums.add`; the tiles are added when the slabs are asked for."""
    return lambda: self._slabs(batch.on_host[first : first + len(rows)], rows)

  def _slabs(self, logits: np.ndarray, rows: Sequence[Row]) -> Iterator[Slab]:
    image = self.image
    for row, own in zip(rows, logits, strict=True):
      if row.start[0] > self._done:
        yield self._slab(row.start[0] - self._done, is_last=False)
      own = image.flip(own, row.flip)
      own = own[None] if image.has_slices else np.moveaxis(own, image.axis, 0)
      place = [slice(s, s + p) for s, p in zip(row.start[1:], image.patch[1:], strict=True)]
      self._sums[(slice(None), *place)] += own
      if row.is_last:
        yield self._slab(image.patch[0], is_last=True)

  def _slab(self, count: int, is_last: bool) -> Slab:
    found = self.image.slab(self._done, self._sums[:count], is_last)
    self._done += count
    if not is_last:
      sums = self._sums
      for low in range(0, len(sums) - count, count):  # blocks that do not overlap: no copies
        part = sums[low + count : low + 2 * count]
        sums[low : low + len(part)] = part
      sums[-count:] = 0
    return found


class DeviceSums:
  """The sums of a whole image on the first device of this process."""

  def __init__(self, image: TiledImage, num_logits: int):
    self.image = image
    (low, high), length = image.pads[0], image.size[0]
    self._done, self._end = low, length - high
    shape = device_shape(image.size, num_logits)
    self._rows = min(shape[0], max(1, _PART_VALUES // math.prod(shape[1:])))
    self._sums = jnp.zeros(shape, jnp.float32, device=jax.local_devices()[0])

  def add(self, batch: BatchLogits, rows: Sequence[Row], first: int) -> Callable:
    """Adds tiles of this image, and waits for nothing.

    Args:
      batch: with the tiles' logits.
      rows: of the image, in order.
      first: place in the batch of the first of them.

    Returns:
      () -> the slabs that are finished by then.
    """
    image, logits = self.image, batch.on_device
    places = np.array([row.start for row in rows], np.int32)
    flips = np.array([row.flip for row in rows], np.int32)
    padding = [(first, len(logits) - first - len(rows))]
    self._sums = _add(
      self._sums, logits, np.pad(places, [*padding, (0, 0)]), np.pad(flips, padding),
      np.int32(first), np.int32(first + len(rows)),
      flips=image.flips, axis=None if image.has_slices else image.axis,
    )  # fmt: skip
    reached = self._end if rows[-1].is_last else rows[-1].start[0]
    parts = list(self._parts(reached, rows[-1].is_last))
    return lambda: (
      image.slab(start, np.asarray(part)[cut], is_last) for start, part, cut, is_last in parts
    )

  def _parts(self, reached: int, is_last: bool) -> Iterator[tuple]:
    """(start, part of the sums, what of it is new, whether it is the last) below `reached`."""
    while self._done + self._rows <= reached or (is_last and self._done < reached):
      start = min(self._done, self._sums.shape[0] - self._rows)
      stop = min(self._done + self._rows, reached)
      cut = (slice(self._done - start, stop - start), *map(slice, self.image.size[1:]))
      part = _part(self._sums, np.int32(start), rows=self._rows)
      yield self._done, part, cut, is_last and stop == reached
      self._done = stop
    if is_last:
      self._sums = None


def start(image: TiledImage, num_logits: int, device_bytes: int) -> HostSums | DeviceSums:
  """Of no tile yet; on the device if they take no more than `device_bytes` there."""
  fits = 4 * math.prod(device_shape(image.size, num_logits)) <= device_bytes
  return (DeviceSums if fits else HostSums)(image, num_logits)


def device_shape(size: Sequence[int], num_logits: int) -> tuple[int, ...]:
  """Of an image's sums on a device: each side rounded up to 4 significant bits."""
  steps = [2 ** max(n.bit_length() - 4, 0) for n in size]
  return (*(-(-n // step) * step for n, step in zip(size, steps, strict=True)), num_logits)


def device_bytes() -> int:
  """What an image's sums may take on a device: a share of its memory, and nothing on a CPU.

  There the host's memory is the device's and nothing need be moved: the form on the device took 1.2
  to 2 times the CPU seconds.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", 0) // _DEVICE_SHARE


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("flips", "axis"))
def _add(sums, logits, places, numbers, first, stop, *, flips, axis):
  """Adds rows [first, stop) of a batch where they stand.

  Nothing but sums, of logits that another program made: together the compiler might add products
  without rounding them, which the host does not.
  """

  def add_one(row, sums):
    tile = logits[row]
    if len(flips) > 1:
      branches = [functools.partial(jnp.flip, axis=flip) for flip in flips]
      tile = jax.lax.switch(numbers[row], branches, tile)
    tile = tile[None] if axis is None else jnp.moveaxis(tile, axis, 0)
    place = (*places[row], 0)
    before = jax.lax.dynamic_slice(sums, place, tile.shape)
    return jax.lax.dynamic_update_slice(sums, before + tile, place)

  return jax.lax.fori_loop(first, stop, add_one, sums)


@functools.partial(jax.jit, static_argnames="rows")
def _part(sums, start, *, rows):
  return jax.lax.dynamic_slice_in_dim(sums, start, rows)


def _along(axis: int, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Values of one axis f32[1, .., n, .., C or 1], to be broadcast to [*S, C]; those of the last of
  S are repeated for every class, for numpy is slow where the inmost loop is of C alone."""
  values = values.astype(np.float32).reshape([-1 if n == axis else 1 for n in range(len(shape))])
  return np.repeat(values, shape[-1], axis=-1) if axis == len(shape) - 2 else values


def _to_front(values: Sequence, axis: int) -> list:
  rest = list(values)
  return [rest.pop(axis), *rest]
