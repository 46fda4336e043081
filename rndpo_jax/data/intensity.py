"""Normalisation of intensities, case by case and channel by channel, by nnU-Net's schemes.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, and its default_normalization_schemes.py.
It comes after the crop to what is not zero (`data.nonzero`) and before resampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import chex
import numpy as np

_SMALLEST = 1e-8  # divisor
# What CT needs, of the foreground of all training cases; the names are those of plans.json.
STATISTICS = ("mean", "std", "percentile_00_5", "percentile_99_5")


def zscore(values: np.ndarray, statistics=None, mask=None) -> np.ndarray:
  """(x - mean) / standard deviation, of the whole image."""
  del statistics, mask
  mean = values.mean(dtype=np.float64)
  # Row by row: `values.std` would make a copy in float64.
  squares = sum(_sum_of_squares(row, mean) for row in values)
  return _scaled(values, mean, max(np.sqrt(squares / values.size), _SMALLEST))


def _sum_of_squares(values: np.ndarray, mean: np.float64) -> np.float64:
  delta = values - mean  # f64
  return np.square(delta, out=delta).sum()


def zscore_in_mask(values: np.ndarray, statistics, mask: np.ndarray) -> np.ndarray:
  """`zscore` of the pixels in `mask`; the others stay as they are."""
  del statistics
  out = values.astype(np.float32)
  if mask.any():
    out[mask] = zscore(values[mask][None])[0]
  return out


def ct(values: np.ndarray, statistics: Mapping[str, float], mask=None) -> np.ndarray:
  """Clipped to [percentile_00_5, percentile_99_5], minus mean, over std, all of `statistics`."""
  del mask
  missing = [name for name in STATISTICS if name not in (statistics or {})]
  if missing:
    raise ValueError(f"scheme 'ct' needs {missing[0]!r} of the foreground of all training cases")
  mean, std, low, high = (float(statistics[name]) for name in STATISTICS)
  return _scaled(np.clip(values, low, high), mean, max(std, _SMALLEST))


def none(values: np.ndarray, statistics=None, mask=None) -> np.ndarray:
  """As they are."""
  del statistics, mask
  return values.astype(np.float32)


def zero_to_one(values: np.ndarray, statistics=None, mask=None) -> np.ndarray:
  """(x - min) / (max - min)."""
  del statistics, mask
  low = float(values.min())
  return _scaled(values, low, max(float(values.max()) - low, _SMALLEST))


def rgb(values: np.ndarray, statistics=None, mask=None) -> np.ndarray:
  """x / 255."""
  del statistics, mask
  low, high = float(values.min()), float(values.max())
  if low < 0 or high > 255:
    raise ValueError(f"scheme 'rgb' found values from {low:g} to {high:g}, expected 0 to 255")
  return _scaled(values, 0.0, 255.0)


# name -> (values [*S], statistics of the channel or None, mask bool[*S]) -> f32[*S]
SCHEMES: dict[str, Callable[..., np.ndarray]] = {
  "zscore": zscore,
  "zscore_in_mask": zscore_in_mask,
  "ct": ct,
  "none": none,
  "zero_to_one": zero_to_one,
  "rgb": rgb,
}
_OF_CHANNEL = {"ct": "ct", "nonorm": "none", "rescale_to_0_1": "zero_to_one", "rgb_to_0_1": "rgb"}


def scheme_of_channel(name: str) -> str:
  """The scheme that nnU-Net takes for a name of `channel_names`, 'zscore' for most."""
  return _OF_CHANNEL.get(name.casefold(), "zscore")


def normalize(
  image: np.ndarray,
  schemes: Sequence[str],
  statistics: Sequence[Mapping[str, float] | None],
  mask: np.ndarray | None,
) -> np.ndarray:
  """Normalises each channel by its own scheme.

  Args:
    image: [*S, I], finite values.
    schemes: a name of SCHEMES for each channel.
    statistics: of each channel; only 'ct' reads them.
    mask: bool[*S] of `nonzero.mask`, which only 'zscore_in_mask' reads; else it may be None.

  Returns:
    f32[*S, I].

  Raises:
    ValueError: naming the scheme: it is unknown, or what it needs is not there.
  """
  chex.assert_rank(image, {3, 4})
  if not len(schemes) == len(statistics) == image.shape[-1]:
    raise ValueError(
      f"{len(schemes)} schemes and {len(statistics)} statistics, expected {image.shape[-1]}, one a "
      "channel"
    )
  channels = []
  for channel, name in enumerate(schemes):
    if name not in SCHEMES:
      raise ValueError(f"scheme {name!r} is unknown; known: {', '.join(SCHEMES)}")
    if name == "zscore_in_mask" and mask is None:
      raise ValueError("scheme 'zscore_in_mask' needs the mask of what is not zero")
    channels.append(SCHEMES[name](image[..., channel], statistics[channel], mask))
  return channels[0][..., None] if len(channels) == 1 else np.stack(channels, axis=-1)


def _scaled(values: np.ndarray, shift: float, scale: float) -> np.ndarray:
  """(x - shift) / scale in float32, one copy: volumes are large."""
  out = np.subtract(values, np.float32(shift), dtype=np.float32)
  out /= np.float32(scale)
  return out
