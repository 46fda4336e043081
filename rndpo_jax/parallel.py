"""Processes, devices, meshes and shardings: the only place that makes them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rndpo_jax.config import ConfigError


def initialize(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  detect: bool,
  connect_seconds: int,
  heartbeat_seconds: int,
) -> bool:
  """Joins this process to a run of several; before any use of a device.

  Does nothing where no process is named and `detect` is off. Ends the program with one line where
  the processes have not met after `connect_seconds`: JAX itself would end in a core dump.

  Args:
    coordinator_address: HOST:PORT of process 0, which listens there.
    num_processes: N.
    process_id: 0..N-1.
    detect: take what is not given from the TPU pod, Slurm, Open MPI or Kubernetes JobSet.
    connect_seconds: how long to wait for the others.
    heartbeat_seconds: a process silent for so long counts as dead, and JAX stops the others.

  Returns:
    Whether this process is now one of several.

  Raises:
    ConfigError: naming the flag that is missing or wrong.
  """
  if not detect and not _is_named(coordinator_address, num_processes, process_id):
    return False
  where = coordinator_address or "the detected coordinator"
  timer = threading.Timer(
    connect_seconds,
    _exit,
    [
      f"error: process {_or_detected(process_id)}: the {_or_detected(num_processes)} processes "
      f"have not met at {where} within {connect_seconds} s; is it the host and an open port of "
      "process 0, and were all processes started?"
    ],
  )
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      cluster_detection_method=None if detect else "deactivate",
      initialization_timeout=connect_seconds + 60,  # the timer comes first
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=heartbeat_seconds,  # so long an error of one keeps the others
    )
    jax.devices()  # here the processes tell each other of their devices
  except (ValueError, RuntimeError) as error:
    first = str(error).strip().splitlines()[0]
    if detect:
      raise ConfigError(
        f"--distributed: {first} Was this started on a TPU pod, by srun or in a JobSet? Elsewhere "
        "give --coordinator_address, --num_processes and --process_id"
      ) from error
    raise ConfigError(
      f"--coordinator_address: process {process_id} cannot use {coordinator_address} ({first}); "
      "process 0 needs a free port of its own host"
    ) from error
  finally:
    timer.cancel()
  return True


def _is_named(coordinator_address, num_processes, process_id) -> bool:
  """Whether the processes are given by flags; refuses flags that do not fit together."""
  given = {
    "--coordinator_address": coordinator_address,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return False
  if missing:
    raise ConfigError(
      f"{missing[0]}: missing; give {', '.join(given)} together, or --distributed to detect them"
    )
  host, _, port = coordinator_address.rpartition(":")
  if not host or not port.isdigit():
    raise ConfigError(
      f"--coordinator_address: found {coordinator_address!r}, expected HOST:PORT of process 0"
    )
  if not 0 <= process_id < num_processes:
    raise ConfigError(
      f"--process_id: found {process_id}, expected 0..{num_processes - 1} as --num_processes="
      f"{num_processes}"
    )
  return True


def _or_detected(value: int | None) -> str:
  return "detected" if value is None else str(value)


def stop(message: str) -> None:
  """Ends this process of several at once with `message`; the others lose it and stop too.

  An orderly exit would wait for processes that wait for this one.
  """
  if is_first():
    time.sleep(2)  # those that end by the same error can say so before their coordinator is gone
  _exit(message)


def _exit(message: str) -> None:
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(1)


def is_loss_of_another(error: Exception) -> bool:
  """Whether a failed collective says that a process at its other end is gone."""
  return jax.process_count() > 1 and any(name in str(error) for name in ("Gloo", "NCCL"))


def is_first() -> bool:
  """Whether this is process 0, the one that writes the files which the processes share."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is here, so that what process 0 wrote can be read."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
  """Process 0's `value` on every process, so that all of them take the same branch."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with `devices`, else every device of every process, on one axis, `data`."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


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
