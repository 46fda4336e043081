"""The checks on the grids of `config.data`: of the simple mode, and of the native one."""

from __future__ import annotations

import math

from rndpo_jax import config as config_lib
from rndpo_jax.checks import config_model
from rndpo_jax.data import intensity
from rndpo_jax.errors import ConfigError

MAX_PIXELS = 2**28  # of what a network sees at once; files may have more, see sources.volume


def check(config) -> None:
  """Checks sizes, spacing and schemes of `config.data`.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  data, size = config.data, config_lib.input_size(config)
  input_key = "patch_size" if data.spacing else "size"
  for key in (input_key, "spacing", "crop"):
    if (key == input_key or data[key]) and len(data[key]) != data.spatial_dims:
      raise ConfigError(
        f"config.data.{key}: found {tuple(data[key])}, expected {data.spatial_dims} entries as "
        f"config.data.spatial_dims={data.spatial_dims}"
      )
  if not all(0 <= mm < math.inf for mm in data.spacing):
    raise ConfigError(
      f"config.data.spacing: found {tuple(data.spacing)}, expected mm a pixel, or 0 for the "
      "median of the labelled cases"
    )
  grids = {input_key: size, "crop": data.crop, "phantom.size": data.phantom.size}
  for key, pixels in grids.items():
    if pixels and (min(pixels) < 1 or math.prod(pixels) > MAX_PIXELS):
      raise ConfigError(
        f"config.data.{key}: found {tuple(pixels)}, expected values above 0 and at most "
        f"{MAX_PIXELS:,} pixels in all"
      )
  for name in data.schemes:
    if name not in intensity.SCHEMES:
      raise ConfigError(
        f"config.data.schemes: unknown scheme {name!r}; known: {', '.join(intensity.SCHEMES)}"
      )
  config_model.check_size(config)
