"""How nnU-Net brings images to its networks, of a configuration of `plans.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rndpo_jax.data import intensity, resample

# Class names of nnU-Net's and those of `data.intensity.SCHEMES`.
SCHEMES = {
  "ZScoreNormalization": "zscore",
  "CTNormalization": "ct",
  "NoNormalization": "none",
  "RescaleTo01Normalization": "zero_to_one",
  "RGBTo01Normalization": "rgb",
}
RESAMPLING = "resample_data_or_seg_to_shape"
ORDERS = {"data": 3, "seg": 1, "probabilities": 1}


class Preprocessing(NamedTuple):
  """What comes between an image and the network.

  Attributes:
    spacing: mm a pixel of the network's input, one an axis of OUR order.
    patch_size: pixels of the network's input, likewise.
    schemes: a name of `data.intensity.SCHEMES` for each channel.
    statistics: of each channel, {"mean", "std", "percentile_00_5", "percentile_99_5", ...} of the
      foreground of all training cases; only the scheme 'ct' reads them.
  """

  spacing: tuple[float, ...]
  patch_size: tuple[int, ...]
  schemes: tuple[str, ...]
  statistics: tuple[Mapping[str, float] | None, ...]


def read(
  plans: Mapping[str, Any], own: Mapping[str, Any], *, num_channels: int, axes: tuple[int, ...]
) -> Preprocessing:
  """The preprocessing of a configuration.

  Args:
    plans: what `plans.json` holds.
    own: the configuration, with what it inherits.
    num_channels: I.
    axes: axis n of our images is nnU-Net's axis axes[n].

  Raises:
    ValueError: naming the key: it is missing, or another preprocessing than nnU-Net's own.
  """
  name = own.get("preprocessor_name", "DefaultPreprocessor")
  if name != "DefaultPreprocessor":
    raise ValueError(f"'preprocessor_name' is {name!r}, expected 'DefaultPreprocessor'")
  for what, order in ORDERS.items():
    _check_resampling(own, what, order)
  statistics = plans.get("foreground_intensity_properties_per_channel")
  statistics = statistics or plans.get("foreground_intensity_properties_by_modality") or {}
  schemes = _schemes(own, num_channels)
  known = tuple(statistics.get(str(n)) for n in range(num_channels))
  for n, scheme in enumerate(schemes):
    missing = [name for name in intensity.STATISTICS if name not in (known[n] or {})]
    if scheme == "ct" and missing:
      raise ValueError(
        f"'foreground_intensity_properties_per_channel' lacks {missing[0]!r} of channel {n}, which "
        "CTNormalization reads"
      )
  return Preprocessing(
    spacing=_by_axis(own, "spacing", axes, float),
    patch_size=_by_axis(own, "patch_size", axes, int),
    schemes=schemes,
    statistics=known,
  )


def _check_resampling(own: Mapping[str, Any], what: str, order: int) -> None:
  """Old plans lack the keys: then it is the same resampling."""
  name = own.get(f"resampling_fn_{what}", RESAMPLING)
  options = own.get(f"resampling_fn_{what}_kwargs") or {}
  wanted = {
    "order": order, "order_z": 0, "force_separate_z": None,
    "separate_z_anisotropy_threshold": resample.ANISOTROPY,
  }  # fmt: skip
  found = {key: options.get(key, value) for key, value in wanted.items()}
  if name != RESAMPLING or found != wanted:
    raise ValueError(
      f"'resampling_fn_{what}' is {name!r} with {dict(options)!r}, expected {RESAMPLING!r} with "
      f"{wanted}, as nnU-Net plans it"
    )


def _schemes(own: Mapping[str, Any], num_channels: int) -> tuple[str, ...]:
  names, in_mask = own.get("normalization_schemes"), own.get("use_mask_for_norm")
  if not isinstance(names, list) or not isinstance(in_mask, list):
    raise ValueError("'normalization_schemes' and 'use_mask_for_norm' are no lists")
  if not len(names) == len(in_mask) == num_channels:
    raise ValueError(
      f"'normalization_schemes' has {len(names)} entries and 'use_mask_for_norm' {len(in_mask)}, "
      f"expected {num_channels}, one a channel"
    )
  unknown = [name for name in names if name not in SCHEMES]
  if unknown:
    raise ValueError(
      f"'normalization_schemes' has {unknown[0]!r}, expected one of {', '.join(SCHEMES)}"
    )
  found = (SCHEMES[name] for name in names)
  return tuple(
    "zscore_in_mask" if scheme == "zscore" and masked else scheme
    for scheme, masked in zip(found, in_mask, strict=True)
  )


def _by_axis(own: Mapping[str, Any], key: str, axes: tuple[int, ...], kind: type) -> tuple:
  values = own.get(key)
  if not isinstance(values, list) or len(values) != len(axes):
    raise ValueError(f"{key!r} is {values!r}, expected {len(axes)} numbers")
  if not all(type(value) in (int, float) and value > 0 for value in values):
    raise ValueError(f"{key!r} is {values!r}, expected numbers above 0")
  return tuple(kind(values[axis]) for axis in axes)
