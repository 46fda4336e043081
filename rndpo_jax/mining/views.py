"""Views of an image that a segmenter should answer alike: flips, quarter turns and zooms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class View(NamedTuple):
  """A zoom about the middle of the image, then quarter turns in the plane (H, W), then flips.

  Attributes:
    turns: number of quarter turns.
    flips: spatial axes that are mirrored.
    zoom: how many times as large things are seen; 1 costs nothing.
  """

  turns: int = 0
  flips: tuple[int, ...] = ()
  zoom: float = 1.0

  def apply(self, images: jax.Array) -> jax.Array:
    """Images f32[b, *S, I] as they are seen; beyond their edge is what is at it."""
    turned = jnp.rot90(_zoomed(images, self.zoom), self.turns, axes=(1, 2))
    return jnp.flip(turned, [axis + 1 for axis in self.flips])

  def undo(self, logits: jax.Array, outside: jax.Array) -> jax.Array:
    """Logits f32[b, *S, C] of the view -> of the image; `outside`, alike, where it was not seen."""
    back = jnp.flip(logits, [axis + 1 for axis in self.flips])
    back = _zoomed(jnp.rot90(back, -self.turns, axes=(1, 2)), 1 / self.zoom)
    if self.zoom <= 1:
      return back
    inside = np.ones((), bool)
    for n in logits.shape[1:-1]:
      places = _places(n, 1 / self.zoom)
      inside = inside[..., None] & (0 <= places) & (places <= n - 1)
    return jnp.where(inside[None, ..., None], back, outside)


def symmetries(shape: Sequence[int]) -> list[View]:
  """Those of the grid other than the image itself: 3 or 7 of an image, 7 or 15 of a volume.

  Flips of every set of axes; if H equals W, also those after a quarter turn.

  Args:
    shape: S.
  """
  axes = range(len(shape))
  flips = [f for n in range(len(shape) + 1) for f in itertools.combinations(axes, n)]
  turns = (0, 1) if shape[0] == shape[1] else (0,)
  return [View(turn, flip) for turn in turns for flip in flips if turn or flip]


def zooms(count: int, largest: float) -> list[float]:
  """`count` zooms z, 1 / z, z', 1 / z', ... in equal ratios, the last z being `largest`.

  Their order is not that of their sizes, so that other sweeps over the proposals do not go along.
  """
  half = (count + 1) // 2
  return [float(largest ** ((-1) ** n * (n // 2 + 1) / half)) for n in range(count)]


def of_entry(atoms: Sequence[str], shape: Sequence[int], count: int, zoom: float) -> list[View]:
  """The view of each proposal of an entry of a mix.

  Args:
    atoms: of the entry; `tta` gives the symmetries in a cycle, `zoom` the zooms.
    shape: S. count: of the entry's proposals. zoom: the largest.
  """
  seen = [View()] * count
  if "tta" in atoms:
    all_views = symmetries(shape)
    seen = [all_views[n % len(all_views)] for n in range(count)]
  if "zoom" in atoms:
    seen = [v._replace(zoom=z) for v, z in zip(seen, zooms(count, zoom), strict=True)]
  return seen


def _zoomed(x: jax.Array, zoom: float) -> jax.Array:
  """f32[b, *S, c] seen `zoom` times as large, by linear interpolation, one axis after another.

  Products with matrices: a gather of pixels is slow on accelerators.
  """
  if zoom == 1:
    return x
  for axis in range(1, x.ndim - 1):
    matrix = jnp.asarray(_matrix(x.shape[axis], zoom))
    x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision="highest"), 0, axis)
  return x


def _matrix(n: int, zoom: float) -> np.ndarray:
  """f32[n, n] that interpolates n pixels at `_places`; what is beyond the edge is what is at it."""
  places, grid = _places(n, zoom), np.arange(n)
  columns = [np.interp(places, grid, unit) for unit in np.eye(n)]
  return np.stack(columns, axis=1).astype(np.float32)


def _places(n: int, zoom: float) -> np.ndarray:
  """Where the n pixels of an axis of a zoomed image take their values from."""
  return (np.arange(n) - (n - 1) / 2) / zoom + (n - 1) / 2
