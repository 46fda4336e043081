"""Logits at the network's spacing -> mask and scores on a case's own grid, part by part.

Logits are resampled linearly back to the crop, the argmax is taken there, and outside of the crop
the background is certain. Each part is worked on alone, so that no more than a few of them are ever
in memory, and threads share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rndpo_jax.data import resample
from rndpo_jax.evaluation import sliding_window

if TYPE_CHECKING:  # evaluation restores records, too, and what reads cases builds upon it
  from rndpo_jax.predict.native_cases import NativeCase

_PIECE_VALUES = 2**22  # logits of a piece
# Of the background's logit, whose masks agree with that of a network which is alone: pixels of two
# classes are foreground from a probability of 0.73, or from 0.27 on.
SHIFTS = (-1.0, 1.0)


class Piece(NamedTuple):
  """Logits of a case that are worked on at once.

  Attributes:
    case: whose they are.
    axis: along which the case is cut.
    start: place of the first logits along it.
    first: place of the first logits that no earlier piece ended with.
    logits: f32[*S', members, C] with the piece's length along `axis`.
    is_last: whether no piece of the case follows.
  """

  case: NativeCase
  axis: int
  start: int
  first: int
  logits: np.ndarray
  is_last: bool


class Part(NamedTuple):
  """What came of a piece, inside the crop.

  Attributes:
    case: whose it is.
    place: where it stands in the crop, a slice an axis.
    labels: u8[*S] of the part.
    entropy: f16[*S] in nats, or None.
    probabilities: f16[*S, C], or None.
    sums: name -> f64 arrays that are added up over the parts, see `_sums`; empty without scores.
    is_last: whether no part of the case follows.
  """

  case: NativeCase
  place: tuple[slice, ...]
  labels: np.ndarray
  entropy: np.ndarray | None
  probabilities: np.ndarray | None
  sums: Mapping[str, np.ndarray]
  is_last: bool


def pieces(slabs: Iterable[sliding_window.Slab], num_classes: int) -> Iterator[Piece]:
  """Cuts slabs into pieces; each has the last logits of the one before it, which the first pixels
  of its own are interpolated with."""
  before = None
  for slab in slabs:
    length = slab.logits.shape[slab.axis]
    logits = slab.logits.reshape(*slab.logits.shape[:-1], -1, num_classes)
    rows = max(1, min(length, _PIECE_VALUES * length // slab.logits.size))
    for low in range(0, length, rows):
      own = logits[(slice(None),) * slab.axis + (slice(low, low + rows),)]
      first = start = slab.start + low
      end = start + own.shape[slab.axis]
      if start > 0 and _is_interpolated(slab.key, slab.axis):
        own, start = np.concatenate([before, own], axis=slab.axis), start - 1
      before = own[(slice(None),) * slab.axis + (slice(-1, None),)]
      yield Piece(
        slab.key, slab.axis, start, first, own, slab.is_last and end == slab.start + length
      )


def restore(piece: Piece, *, with_scores: bool, with_probabilities: bool) -> Part:
  """A piece on the case's own grid."""
  case, logits = piece.case, piece.logits
  coarse = resample.coarse_axis(case.new_spacing, case.spacing)
  place = [slice(0, n) for n in case.cropped_shape]
  axes = sorted(
    range(len(place)), key=lambda axis: case.cropped_shape[axis] / case.image_shape[axis]
  )
  for axis in axes:
    taps = _taps(case, axis, coarse)
    if axis == piece.axis:
      stop = piece.start + logits.shape[axis]
      place[axis], taps = _own_rows(taps, piece.start, piece.first, stop)
    if case.cropped_shape[axis] != case.image_shape[axis]:
      logits = resample.interpolate_axis(logits, axis, taps)
  members = np.ascontiguousarray(np.moveaxis(logits, (-2, -1), (0, 1)))  # [members, C, *S]: fast
  mean = members[0] if len(members) == 1 else members.mean(axis=0)
  labels = argmax(mean)
  entropy = probabilities = None
  sums: dict[str, np.ndarray] = {}
  if with_scores or with_probabilities:
    probs, found = _softmax(mean)
    if with_probabilities:
      probabilities = np.moveaxis(probs, 0, -1).astype(np.float16)
    if with_scores:
      entropy, sums = found.astype(np.float16), _sums(labels, probs, members)
  return Part(case, tuple(place), labels, entropy, probabilities, sums, piece.is_last)


def argmax(logits: Sequence[np.ndarray]) -> np.ndarray:
  """f[C, *S] -> u8[*S], of equals the lowest; for few classes much faster than numpy's."""
  best, labels = logits[0].copy(), np.zeros(logits[0].shape, np.uint8)
  for label in range(1, len(logits)):
    np.copyto(labels, np.uint8(label), where=logits[label] > best)
    np.maximum(best, logits[label], out=best)
  return labels


def _is_interpolated(case: NativeCase, axis: int) -> bool:
  if case.cropped_shape[axis] == case.image_shape[axis]:
    return False
  return axis != resample.coarse_axis(case.new_spacing, case.spacing)


def _taps(case: NativeCase, axis: int, coarse: int | None) -> tuple[np.ndarray, np.ndarray]:
  size_in, size_out = case.image_shape[axis], case.cropped_shape[axis]
  is_nearest = axis == coarse or size_in == size_out
  return (resample.nearest_taps if is_nearest else resample.linear_taps)(size_in, size_out)


def _own_rows(taps, start: int, first: int, stop: int) -> tuple[slice, tuple]:
  """The pixels whose last tap is in [first, stop), and their taps counted from `start`."""
  index, weight = taps
  low, high = np.searchsorted(index[-1], [first, stop])
  return slice(int(low), int(high)), (index[:, low:high] - start, weight[:, low:high])


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """f32[C, *S] -> (probabilities f32[C, *S], their entropy f32[*S])."""
  shifted = logits - logits.max(axis=0)
  probs = np.exp(shifted)
  total = probs.sum(axis=0)
  probs /= total
  shifted *= probs
  return probs, np.log(total) - shifted.sum(axis=0)


def _sums(labels: np.ndarray, probs: np.ndarray, members: np.ndarray) -> dict[str, np.ndarray]:
  """What the scores of a case are made of, of each foreground class.

  Returns:
    "drawn" f64[C - 1] pixels of the mask, "expected" f64[C - 1] the sum of probabilities, "both"
    f64[C - 1] that inside the mask; "member" f64[M, C - 1] pixels of the masks of M members and
    "shared" f64[M, C - 1] those that are in the mask, too. One network has `SHIFTS` for members.
  """
  own = [labels == label for label in range(1, len(probs))]
  sums = {
    "drawn": [np.count_nonzero(mask) for mask in own],
    "expected": [p.sum(dtype=np.float64) for p in probs[1:]],
    "both": [(p * mask).sum(dtype=np.float64) for p, mask in zip(probs[1:], own, strict=True)],
  }
  if len(members) == 1:
    members = [_shifted(members[0], shift) for shift in SHIFTS]
  drawn = [[mask == label for label in range(1, len(probs))] for mask in map(argmax, members)]
  sums["member"] = [[np.count_nonzero(mask) for mask in masks] for masks in drawn]
  sums["shared"] = [
    [np.count_nonzero(mask & y) for mask, y in zip(masks, own, strict=True)] for masks in drawn
  ]
  return {name: np.array(values, np.float64) for name, values in sums.items()}


def _shifted(logits: np.ndarray, shift: float) -> list[np.ndarray]:
  """C times f32[*S], the background's lower by `shift`, as the sampler `threshold` has it."""
  return [logits[0] - np.float32(shift), *logits[1:]]


def scores(sums: Mapping[str, np.ndarray], mean_entropy: float) -> dict[str, float]:
  """Scores of a case, as `programs.make_scores` defines them but of the case as a whole.

  Args:
    sums: added up over its parts.
    mean_entropy: nats, over the mask's foreground and what is around it.

  Returns:
    "agreement" the mean foreground Dice of the mask and each member's, "confidence" the Dice that
    the probabilities expect of the mask, "entropy".
  """
  total = sums["drawn"] + sums["expected"]
  size = sums["drawn"] + sums["member"]
  dice = np.where(size > 0, 2 * sums["shared"] / np.maximum(size, 1), 1.0)
  return {
    "agreement": float(dice.mean()),
    "confidence": float(np.mean((2 * sums["both"] + 1) / (total + 1))),
    "entropy": -mean_entropy,
  }
