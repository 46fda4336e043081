"""A network with its weights as one program, `model.stablehlo`, which JAX alone can load.

import jax
logits = jax.export.deserialize(open("model.stablehlo", "rb").read()).call(images)
"""

from __future__ import annotations

import pathlib

import jax
import jax.export
import jax.numpy as jnp

from rndpo_jax import errors, models
from rndpo_jax.export import description
from rndpo_jax.predict.trained import Trained

PLATFORMS = ("cpu", "cuda", "tpu")


def make(trained: Trained, workdir: pathlib.Path) -> dict[str, bytes]:
  """The files of the folder."""
  del workdir
  return {"model.json": description.text(trained), "model.stablehlo": serialize(trained)}


def serialize(trained: Trained) -> bytes:
  """images f32[B, *size, I] -> logits f32[B, *size, C] for every B, on any of PLATFORMS.

  Raises:
    errors.ConfigError: without the package that JAX writes and reads programs with.
  """
  try:
    import flatbuffers  # noqa: F401  JAX itself imports it when it writes, late and with a traceback
  except ImportError as error:
    raise errors.ConfigError(
      "--format=stablehlo: needs the package flatbuffers, which is not installed; install the "
      "extra 'run' again (source launch/setup.sh)"
    ) from error
  segmenter = models.build(
    trained.config.model, num_classes=trained.num_classes, spatial_dims=trained.spatial_dims
  )
  params = jax.tree.map(jnp.asarray, trained.params)
  (batch,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, *trained.size, trained.num_channels), jnp.float32)
  program = jax.jit(lambda images: segmenter.apply(params, images))
  return jax.export.export(program, platforms=PLATFORMS)(images).serialize()
