"""Patches of images that are larger than the network's input: where they are, and cutting them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rndpo_jax import types
from rndpo_jax.data import loader

# Of a batch in supervised training, rows in which foreground is sure; nnU-Net's share.
_FOREGROUND_SHARE = 1 / 3
_BLOCK_PIXELS = 2**16  # of a label that is counted


def cut(array: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
  """The patch [*size, ...] of array [*M, ...] from `start` on; zeros where it goes beyond."""
  spans = [
    (max(first, 0), min(first + count, length))
    for first, count, length in zip(start, size, array.shape, strict=False)
  ]
  inside = array[tuple(slice(*span) for span in spans)]
  if inside.shape[: len(spans)] == tuple(size):
    return inside
  out = np.zeros((*size, *array.shape[len(spans) :]), array.dtype)
  target = (
    slice(low - first, high - first) for (low, high), first in zip(spans, start, strict=True)
  )
  out[tuple(target)] = inside
  return out


def clamp(start: int, length: int, count: int) -> int:
  """The nearest place for a patch of `count` pixels on an axis of `length`.

  A shorter axis is in the middle of the patch, the odd pixel of padding behind it.
  """
  return min(max(start, 0), length - count) if length > count else -((count - length) // 2)


def random_start(rng: np.random.Generator, shape: Sequence[int], size: Sequence[int]) -> list[int]:
  """A place for a patch, all those inside the image being equally likely."""
  pairs = zip(shape, size, strict=True)
  return [clamp(int(rng.integers(max(n - m, 0) + 1)), n, m) for n, m in pairs]


def foreground_start(rng: np.random.Generator, label: np.ndarray, size: Sequence[int]) -> list[int]:
  """A place for a patch that holds a pixel of a class drawn from those in the label.

  Classes are equally likely, and so are the pixels of the class that is drawn; the patch has it in
  the middle, or is as near to that as the image lets it be.

  Args:
    rng: three numbers of it are taken, however large the label.
    label: u8[*M] with foreground.
    size: of the patch.
  """
  counts = _counts(label)
  classes = _foreground(counts)
  chosen = classes[rng.integers(len(classes))]
  reached = np.cumsum(counts[:, chosen])
  number = rng.integers(reached[-1])  # of the class's pixels, in order
  block = np.searchsorted(reached, number, side="right")
  first = block * _rows_of_block(label)
  places = np.flatnonzero(label[first : first + _rows_of_block(label)] == chosen)
  place = places[number - (reached[block - 1] if block else 0)] + first * label[0].size
  middle = np.unravel_index(place, label.shape)
  rows = zip(middle, label.shape, size, strict=True)
  return [clamp(int(place) - m // 2, n, m) for place, n, m in rows]


def foreground(label: np.ndarray) -> np.ndarray:
  """Class ids in the label but for the background and what is ignored."""
  return _foreground(_counts(label))


def _foreground(counts: np.ndarray) -> np.ndarray:
  found = np.flatnonzero(counts.any(axis=0))
  return found[(found > 0) & (found != types.IGNORED)]


def _rows_of_block(label: np.ndarray) -> int:
  return max(1, _BLOCK_PIXELS // max(label[0].size, 1))


def _counts(label: np.ndarray) -> np.ndarray:
  """Pixels of each class id in each block of rows, i64[blocks, 256]; far faster than np.unique, and
  block by block also than a count of a large label at once, which would be copied as i64."""
  rows = _rows_of_block(label)
  blocks = [label[low : low + rows].ravel() for low in range(0, len(label), rows)]
  return np.stack([np.bincount(block, minlength=256) for block in blocks])


def num_forced(batch_size: int) -> int:
  """Rows of a batch in which foreground is sure: a third, none of a batch of one."""
  return round(_FOREGROUND_SHARE * batch_size)


def drawer(
  items: Sequence[int],
  load: Callable[[int], dict],
  size: Sequence[int],
  *,
  batch_size: int,
  seed: int,
  with_foreground: Sequence[int] = (),
) -> Callable[[int], dict]:
  """Number of a row, counted over all batches -> a patch: a pure function of (seed, number).

  The last `num_forced` rows of a batch go through `with_foreground`, if there are any, and hold
  some of it; the others go through all items. Every pass has its own order.

  Args:
    items: records that are no empty slices.
    load: record -> {"image": [*M, I], maybe "label": u8[*M], "index"}, see
      `dataset.load_on_spacing`.
    size: of a patch.
    batch_size: of the global batch.
    seed: of orders and places.
    with_foreground: records whose labels have foreground.
  """
  forced = num_forced(batch_size) if len(with_foreground) else 0
  free = batch_size - forced

  def draw(number: int) -> dict:
    step, row = divmod(number, batch_size)
    rng = np.random.default_rng([seed, number, 1])
    if row < free:
      example = load(loader.shuffled(items, seed, step * free + row))
      start = random_start(rng, example["image"].shape[:-1], size)
    else:
      place = step * forced + row - free
      example = load(loader.shuffled(with_foreground, seed, place, 1))
      start = foreground_start(rng, example["label"], size)
    return cut_example(example, start, size)

  return draw


def cut_example(example: dict, start: Sequence[int], size: Sequence[int]) -> dict:
  """A patch of an example: image, and label if there is one."""
  cuts = {name: cut(example[name], start, size) for name in ("image", "label") if name in example}
  return {**example, **cuts}
