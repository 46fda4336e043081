"""Segmenters of your own: `package.module:function` as `config.model.name`.

The function is called as function(model_config, num_classes=C, spatial_dims=2 or 3) and returns a
`types.Segmenter`, whatever library its network is written in.
"""

from __future__ import annotations

from collections.abc import Callable

from rndpo_jax import errors, types, user_code


def load(name: str) -> Callable[..., types.Segmenter]:
  """The function of that name.

  Raises:
    ConfigError: naming it, if it cannot be imported or called so.
  """
  expected = "(model_config, *, num_classes, spatial_dims)"
  try:
    return user_code.load(name, expected, None, num_classes=2, spatial_dims=2)
  except ValueError as error:
    raise errors.ConfigError(f"config.model.name: {name!r}: {error}") from error


def build(model_config, *, num_classes: int, spatial_dims: int) -> types.Segmenter:
  """What the function of `model_config.name` returns.

  Raises:
    ConfigError: as `load`, or naming the function if it raises or returns something else.
  """
  name = model_config.name
  function = load(name)
  try:
    segmenter = function(model_config, num_classes=num_classes, spatial_dims=spatial_dims)
  except Exception as error:
    raise errors.ConfigError(f"config.model.name: {name!r} {user_code.what(error)}") from error
  if not isinstance(segmenter, types.Segmenter):
    raise errors.ConfigError(
      f"config.model.name: {name!r} returned {type(segmenter).__name__}, expected "
      "rndpo_jax.types.Segmenter"
    )
  return segmenter
