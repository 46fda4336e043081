"""What the native mode takes from the data set: spacing, schemes, and what 'ct' reads.

All of it is measured on the labelled cases, and stands in `records.json` from then on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import intensity, native, nonzero, records

_NUM_INTENSITIES = 10**7  # of all cases together, from which CT's percentiles are taken
# nnU-Net's: if the crop to what is not zero keeps a smaller part of a case, zeros say nothing.
_MASKED_BELOW = 0.75


class Chosen(NamedTuple):
  """Attributes: `native` of the data set, None in the simple mode; `notes` for the user."""

  native: records.Native | None
  notes: tuple[str, ...] = ()


class _Measured(NamedTuple):
  """Of each labelled case: the part kept by the crop, and a sample of foreground [N, I]."""

  kept: list[float]
  foreground: list[np.ndarray]


def choose(config, source: records.Source, labelled: Collection[str]) -> Chosen:
  """Spacing, schemes and statistics of a data set.

  Where `config.data.schemes` is empty, a channel's name chooses (see `scheme_of_channel`), and a
  channel of 'zscore' becomes 'zscore_in_mask' if the crop to what is not zero keeps less than
  0.75 of a labelled case, by the median: as nnU-Net plans it.

  Args:
    config: `data.spacing`, `data.schemes` and `data.statistics` are read.
    source: the data set.
    labelled: case ids of that split.

  Raises:
    errors.DataError: if a spacing is unknown, there are not as many schemes as channels, or a
      labelled case cannot be used.
  """
  if not config.data.spacing:
    return Chosen(None)
  spacing = spacing_of(config, source.records, labelled)
  schemes, by_name = tuple(config.data.schemes), not config.data.schemes
  if by_name:
    names = source.channel_names or ("",) * source.num_channels
    schemes = tuple(map(intensity.scheme_of_channel, names))
  if len(schemes) != source.num_channels:
    raise errors.DataError(
      f"config.data.schemes: found {schemes}, expected {source.num_channels}, one a channel of "
      f"{source.name}"
    )
  statistics, notes = _given(config.data.statistics), ()
  needs_foreground = "ct" in schemes and not statistics
  if needs_foreground or (by_name and "zscore" in schemes):
    measured = _measure(source, labelled, with_foreground=needs_foreground)
    if by_name and "zscore" in schemes:
      schemes, notes = _masked(schemes, float(np.median(measured.kept)))
    if needs_foreground:
      statistics = _statistics(source.name, schemes, measured.foreground)
  statistics = statistics or (None,) * len(schemes)
  return Chosen(records.Native(spacing, schemes, statistics), notes)


def _masked(schemes: tuple[str, ...], kept: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The schemes of a data set whose crop keeps this part of a case, and a note that says so."""
  is_masked = kept < _MASKED_BELOW
  if is_masked:
    schemes = tuple("zscore_in_mask" if one == "zscore" else one for one in schemes)
  return schemes, (
    f"the crop to what is not zero keeps {kept:.3f} of a labelled case (median), "
    f"{'less than' if is_masked else 'at least'} {_MASKED_BELOW}: z-scores are of "
    f"{'pixels that are not zero' if is_masked else 'the whole crop'}, as nnU-Net has it; "
    f"config.data.schemes is taken as {schemes}",
  )


def _given(text: str) -> tuple[dict | None, ...]:
  """What `config.data.statistics` holds; () if that is empty."""
  try:
    content = json.loads(text or "[]")
    return tuple(None if one is None else {k: float(v) for k, v in one.items()} for one in content)
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.DataError(
      f"config.data.statistics: found {text!r} ({error}), expected a JSON list, an object of "
      f"{', '.join(intensity.STATISTICS)} or null a channel"
    ) from error


def spacing_of(config, entries: Sequence[dict], labelled: Collection[str]) -> tuple[float, ...]:
  """`config.data.spacing`, with the median of the labelled cases where it says 0.

  Raises:
    records.DataError: if the spacing of a record is unknown.
  """
  wanted = tuple(config.data.spacing)
  unknown = [entry["record_id"] for entry in entries if entry["spacing"] is None]
  if unknown:
    raise errors.DataError(
      f"config.data.spacing: found {wanted}, but the spacing of {unknown[0]!r} is unknown "
      f"({len(unknown)} of {len(entries)} records); set it in the header, or leave "
      "config.data.spacing empty and give config.data.size"
    )
  of_case = {entry["case_id"]: entry["spacing"] for entry in entries}
  median = np.median([of_case[case] for case in labelled], axis=0)
  return tuple(float(mm or found) for mm, found in zip(wanted, median, strict=True))


def _measure(source, labelled: Collection[str], *, with_foreground: bool) -> _Measured:
  """Reads every labelled case once."""
  rng = np.random.default_rng(1234)
  measured = _Measured([], [])
  for pixels, entry in _cases(source, labelled):
    sliced = len(native.case_spacing(entry)) > source.spatial_dims
    image = native.joined(pixels, sliced)
    box = [part.stop - part.start for part in nonzero.box(image)]
    measured.kept.append(math.prod(box) / math.prod(image.shape[:-1]))
    if with_foreground:
      known = [(one.mask > 0) & (one.mask != types.IGNORED) for one in pixels]
      found = np.concatenate([p.image[k] for p, k in zip(pixels, known, strict=True)])
      if len(found):  # as many of each case: equal weight
        places = rng.integers(len(found), size=_NUM_INTENSITIES // len(labelled))
        measured.foreground.append(found[places])
  return measured


def _cases(source, labelled: Collection[str]) -> Iterator[tuple[list[records.Pixels], dict]]:
  """What is prepared together of the labelled cases, checked, with its first entry."""
  reader, place = iter(()), -1
  for first, end in native.units(source.records):
    if source.records[first]["case_id"] not in labelled:
      continue
    if place != first:  # else it goes on where it is: files may be read ahead
      reader = source.read(first)
    pixels, place = [next(reader) for _ in range(first, end)], end
    for one, entry in zip(pixels, source.records[first:end], strict=True):
      records.check_pixels(one, entry, source.num_classes)
    yield pixels, source.records[first]


def _statistics(name: str, schemes, pools: list[np.ndarray]) -> tuple[dict | None, ...]:
  """What 'ct' reads, of samples [N, I] of the pixels under the labelled masks."""
  if not pools:
    raise errors.DataError(
      f"{name}: every labelled mask is empty, so the scheme 'ct' has no percentiles; check "
      "the masks, or set config.data.schemes"
    )
  pool = np.concatenate(pools).astype(np.float64)
  low, high = np.percentile(pool, (0.5, 99.5), axis=0)
  columns = zip(pool.mean(0), pool.std(0), low, high, strict=True)
  named = [dict(zip(intensity.STATISTICS, map(float, values), strict=True)) for values in columns]
  return tuple(n if scheme == "ct" else None for n, scheme in zip(named, schemes, strict=True))
