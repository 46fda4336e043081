"""Devices, meshes and shardings: the only place that makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rndpo_jax.errors import ConfigError

AXES = ("data", "fsdp", "space")
_BATCH = ("data", "fsdp")
# Arrays [B, *S, ...] of a batch, by their names; all others have no spatial axes.
_ON_GRID = ("image", "label", "images", "labels")


def make_mesh(
  devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1, space: int = 1
) -> Mesh:
  """The mesh of every training step and validation, with the axes of `AXES`.

  Args:
    devices: of the mesh; every device of every process by default.
    fsdp: devices that share large parameters; each has its own part of the batch, too.
    space: devices that share each image, along its first spatial axis. Those of an image belong
      to one process, which reads it. `data` takes the rest.

  Raises:
    ConfigError: if the devices do not divide so.
  """
  devices = list(jax.devices() if devices is None else devices)
  check_mesh(len(devices), fsdp, space, len(devices) // len({d.process_index for d in devices}))
  shape = (len(devices) // (fsdp * space), fsdp, space)
  placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  owners = [device.process_index for device in placed.flat]
  if owners != sorted(owners):
    # Process i reads the i-th rows of a batch: elsewhere they would be other rows of the whole.
    devices.sort(key=lambda d: (d.process_index, d.id))
    placed = np.array(devices).reshape(shape)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(num_devices: int, fsdp: int, space: int, num_local: int) -> None:
  """Refuses axes that the devices cannot make.

  Raises:
    ConfigError: naming the key and what works.
  """
  if num_devices % (fsdp * space):
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    raise ConfigError(
      f"config.mesh: found fsdp={fsdp} and space={space}, but {num_devices} devices cannot be "
      f"grouped by {fsdp * space}; use a product of {', '.join(map(str, divisors))}"
    )
  if num_local % space:
    divisors = [n for n in range(1, num_local + 1) if num_local % n == 0]
    raise ConfigError(
      f"config.mesh.space: found {space}, but the devices that share an image belong to one "
      f"process, and each has {num_local}; use {', '.join(map(str, divisors))}"
    )


def num_batch_parts(mesh: Mesh) -> int:
  """How many parts a batch is split into, each with rows of its own."""
  return math.prod(mesh.shape[axis] for axis in _BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of what a batch holds an image: the leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(_BATCH))


def over_grid(mesh: Mesh) -> NamedSharding:
  """The sharding of images [B, *S, I] and labels [B, *S]: also the first of S over `space`."""
  return NamedSharding(mesh, PartitionSpec(_BATCH, "space"))


def over_all(mesh: Mesh) -> NamedSharding:
  """The leading axis over every device, where each works alone."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
  """The sharding of each array of a batch: `over_grid` for those named in `_ON_GRID`."""
  grid, rows = over_grid(mesh), batch_sharding(mesh)

  def sharding(path, _):
    name = getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None
    return grid if name in _ON_GRID else rows

  return jax.tree.map_with_path(sharding, tree)


def param_shardings(tree: Any, mesh: Mesh, fsdp_min_size: int) -> Any:
  """The sharding of each array of parameters, their averages or the optimiser's state.

  An array of `fsdp_min_size` elements or more is split over `fsdp` along its largest axis that
  divides (the last of equals), others are whole on each device. Shapes alone decide, so that Adam's
  moments lie where their parameters do.
  """
  count = mesh.shape["fsdp"]

  def sharding(x):
    axes = [axis for axis, size in enumerate(x.shape) if size % count == 0]
    if count == 1 or math.prod(x.shape) < fsdp_min_size or not axes:
      return replicated(mesh)
    axis = max(axes, key=lambda axis: (x.shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

  return jax.tree.map(sharding, tree)


def data_parallel(apply: Callable, mesh: Mesh) -> Callable:
  """`apply(params, images, ...)` with whole parameters, and images placed by `over_grid`.

  Where each image is on one device and nothing is drawn, the devices run it apart, and gradients
  are added up for the parameters as they are. Left to itself XLA adds them up as soon as a sum over
  the batch is formed, for kernels that `models.folding` has made many times wider; it may also
  split a convolution's channels and move activations for it, and it runs the network on whole
  images where an augmentation had to gather them.
  """
  rows = batch_sharding(mesh).spec
  apart = jax.shard_map(
    apply, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
  )

  def on_mesh(params, images, *arguments):
    params = jax.lax.with_sharding_constraint(params, replicated(mesh))
    images = jax.lax.with_sharding_constraint(images, over_grid(mesh))
    if arguments or mesh.shape["space"] > 1 or num_batch_parts(mesh) == 1:
      return apply(params, images, *arguments)
    return apart(params, images)

  return on_mesh


def check_batch_size(key: str, batch_size: int, num_devices: int, space: int = 1) -> None:
  """Refuses a batch that the devices, or groups of `space` of them, cannot share evenly.

  Raises:
    ConfigError: naming `key` and the nearest sizes that work.
  """
  parts = num_devices // space
  if batch_size % parts:
    lower = batch_size // parts * parts
    raise ConfigError(
      f"{key}: found {batch_size}, which {sharers(num_devices, space)} cannot share evenly; use "
      f"{f'{lower} or ' if lower else ''}{lower + parts}"
    )


def sharers(num_devices: int, space: int) -> str:
  """What shares a batch, in words."""
  if space == 1:
    return f"{num_devices} devices"
  return f"{num_devices // space} groups of {space} devices (config.mesh.space)"


def put_batch(tree: Any, mesh: Mesh) -> Any:
  """Places this process's rows of a global batch on its devices.

  Args:
    tree: pytree of numpy arrays, leading axis batch_size // process_count.
    mesh: from `make_mesh`.

  Returns:
    The pytree of global arrays, placed by `batch_shardings`: no device gets more than its part.
  """
  return jax.tree.map(
    lambda sharding, x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch_shardings(tree, mesh),
    tree,
  )


def put_params(tree: Any, mesh: Mesh, fsdp_min_size: int) -> Any:
  """Places parameters that every process has, by `param_shardings`."""
  return jax.device_put(tree, param_shardings(tree, mesh, fsdp_min_size))


def fetch(tree: Any) -> Any:
  """Whole numpy arrays on every process, of arrays that the processes may share."""
  return multihost_utils.process_allgather(tree, tiled=True)


def split_over_local_devices(tree: Any) -> Any:
  """[D * b, ...] -> [D, b, ...], the layout that `jax.pmap` takes."""
  devices = jax.local_device_count()
  return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), tree)


def join_local_devices(tree: Any) -> Any:
  """[D, b, ...] -> numpy [D * b, ...]."""
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def parts_of_local_devices(array: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
  """[D, b, ...] -> numpy [b, ...] of each device, one after another."""
  if isinstance(array, np.ndarray):
    yield from array
    return
  for shard in sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0):
    yield np.asarray(shard.data)[0]


def put_on_local_devices(tree: Any) -> Any:
  """The same arrays on every device of this process, put there once."""
  return jax.device_put(tree, NamedSharding(_local_mesh(), PartitionSpec()))


def over_local_devices(function: Callable) -> Callable:
  """Compiles `function(whole, rows)` so that each device of this process works on its own rows.

  Args:
    function: pytrees of arrays -> pytree of arrays; the rows, and what it returns, have a leading
      axis that the devices share, `whole` is the same on all. Nothing is exchanged.
  """
  rows = PartitionSpec("local")
  mapped = jax.shard_map(
    function,
    mesh=_local_mesh(),
    in_specs=(PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )
  return jax.jit(mapped)


def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), ("local",))


def make_population_mesh(
  num_seeds: int, num_settings: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over the axes `seeds` and `settings` of a population, each device with as many members.

  Nothing is padded: of `devices`, else of all, the most are taken that share the members evenly,
  so 18 members keep 6 of 8 devices busy. Each process gives as many. Devices divide the seeds
  first, for a device then needs fewer batches, and a process those of fewer seeds.

  Args:
    num_seeds: N.
    num_settings: R.
    devices: to take from.

  Raises:
    ConfigError: if the processes cannot share the members evenly.
  """
  of_process: dict[int, list[jax.Device]] = {}
  for device in jax.devices() if devices is None else devices:
    of_process.setdefault(device.process_index, []).append(device)
  num_processes, most = len(of_process), min(map(len, of_process.values()))
  if num_seeds * num_settings % num_processes:
    raise ConfigError(
      f"--seeds, --betas, --learning_rates: {num_processes} processes cannot share "
      f"{num_seeds * num_settings} members evenly; make that a multiple of {num_processes}, or "
      "start fewer processes"
    )
  shares = [
    (seeds * settings, seeds)
    for seeds in range(1, num_seeds + 1)
    for settings in range(1, num_settings + 1)
    if not (num_seeds % seeds or num_settings % settings)
    and seeds * settings % num_processes == 0
    and seeds * settings <= num_processes * most
  ]
  count, seeds = max(shares)
  devices = [x for own in of_process.values() for x in own[: count // num_processes]]
  # Members exchange nothing, so that any devices will do; `jax.make_mesh` wants whole slices.
  grid = np.array(devices).reshape(seeds, count // seeds)
  return Mesh(grid, ("seeds", "settings"), axis_types=(AxisType.Auto, AxisType.Auto))


def shardings(mesh: Mesh, specs: Any) -> Any:
  """A tree of PartitionSpecs -> the same of NamedShardings."""
  is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731, it has no other name
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
