"""Devices, meshes and shardings: the only place that makes them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rndpo_jax.config import ConfigError


def make_mesh() -> Mesh:
  """A mesh with every device of every process on one axis, `data`."""
  return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of parameters and optimiser state: a whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: the leading axis over `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(key: str, batch_size: int, num_devices: int) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Raises:
    ConfigError: naming `key` and the nearest sizes that work.
  """
  if batch_size % num_devices:
    lower = batch_size // num_devices * num_devices
    raise ConfigError(
      f"{key}: found {batch_size}, which {num_devices} devices cannot share evenly; use "
      f"{f'{lower} or ' if lower else ''}{lower + num_devices}"
    )


def put_batch(tree: Any, mesh: Mesh) -> Any:
  """Places this process's rows of a global batch on its devices.

  Args:
    tree: pytree of numpy arrays, leading axis batch_size // process_count.
    mesh: from `make_mesh`.

  Returns:
    The pytree of global arrays, sharded over the leading axis.
  """
  sharding = over_batch(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
  )


def split_over_local_devices(tree: Any) -> Any:
  """[D * b, ...] -> [D, b, ...], the layout that `jax.pmap` takes."""
  devices = jax.local_device_count()
  return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), tree)


def join_local_devices(tree: Any) -> Any:
  """[D, b, ...] -> numpy [D * b, ...]."""
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)
