"""Slices of TPUs that are not here, and the loss alone compiled for one of their chips."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, SingleDeviceSharding

from rndpo_jax import losses
from rndpo_jax.errors import ConfigError
from rndpo_jax.planning import chips
from rndpo_jax.runtime import sharding

# Read when libtpu is loaded: it shall neither look for a TPU, nor log that there is none.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def open_topology(name: str, *, fsdp: int = 1, space: int = 1) -> tuple[chips.Chip, Mesh]:
  """The chip of a topology such as "v5e:4x4", and a mesh of it as `config.mesh` says.

  Raises:
    ConfigError: if the topology or libtpu is missing, or the chips cannot make the mesh.
  """
  generation = name.partition(":")[0]
  if generation not in chips.CHIPS:
    raise ConfigError(
      f"--topology: found {name!r}, expected CHIP:AxB[xC] with a chip of "
      f"{', '.join(chips.CHIPS)}, as in v5e:4x4"
    )
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ConfigError(
      f"--topology: {name!r} cannot be opened ({error}); it needs the extra tpu-aot "
      "(pip install -e '.[tpu-aot]') and a slice that the chip is sold in, as in v5e:4x4"
    ) from error
  return chips.CHIPS[generation], sharding.make_mesh(topology.devices, fsdp=fsdp, space=space)


def lower_loss(mesh: Mesh, shape: tuple[int, ...], dtype: str):
  """Value and gradient of RN-DPO alone, one pair an image, cached margin, on one device.

  The compiler chooses the layouts of arguments and results, as it does between a network and its
  loss.

  Returns:
    (lowered, minimum): minimum is the bytes of logits read, masks read and gradient written, once
    each.
  """

  def loss_fn(logits, chosen, rejected, reference_margin):
    margin, size = losses.margin_and_size(logits, chosen, rejected)
    return losses.preference_loss(margin, reference_margin, size, beta=10.0)[0]

  layout = Format(Layout.AUTO, SingleDeviceSharding(mesh.devices.flat[0]))
  logits = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  masks = jax.ShapeDtypeStruct(shape[:-1], jnp.uint8)
  margin = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
  program = jax.jit(jax.value_and_grad(loss_fn), in_shardings=layout, out_shardings=layout)
  minimum = 2 * logits.size * logits.dtype.itemsize + 2 * masks.size
  return program.lower(logits, masks, masks, margin), minimum
