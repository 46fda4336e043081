"""How the processes of a run meet; if one dies or hangs, the others exit and say which one."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import multihost

# In the store of the distributed runtime: who has stopped; whether that is asked; who answered.
_STOPPED, _ROLL_CALL, _HERE = "rndpo_jax/stopped", "rndpo_jax/roll_call", "rndpo_jax/here"
_LOOK_EVERY_SECONDS = 1.0
# Part of the heartbeats' time after which process 0 counts as gone: before JAX says so.
_SILENCE = 0.5
# Held for ever by the thread that ends this process: its message is the only one.
_ending = threading.Lock()


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

  Looks for devices alone if no process is named and `detect` is off. Ends the program with one
  line if the processes have not met after `connect_seconds`.

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
    _find_devices()
    return False
  address = coordinator_address, num_processes, process_id
  with _time_limit(connect_seconds, *address):
    _connect(*address, detect, connect_seconds, heartbeat_seconds)
    _find_devices()  # here the processes tell each other of their devices
  _start_watching(heartbeat_seconds)
  return True


@contextlib.contextmanager
def _time_limit(seconds: int, coordinator_address, num_processes, process_id) -> Iterator[None]:
  """Ends the program if the processes take longer to meet: JAX itself would dump core."""
  detected = lambda value: "detected" if value is None else str(value)  # noqa: E731
  message = (
    f"error: process {detected(process_id)}: the {detected(num_processes)} processes have not met "
    f"at {coordinator_address or 'the detected coordinator'} within {seconds} s; is it the host "
    "and an open port of process 0, and were all processes started?"
  )
  timer = threading.Timer(seconds, _exit, [message])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _connect(
  coordinator_address, num_processes, process_id, detect, connect_seconds, heartbeat_seconds
) -> None:
  """Meets the other processes; raises ConfigError naming the flag if that cannot be."""
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


def _find_devices() -> None:
  """Starts JAX's backend; raises ConfigError if JAX_PLATFORMS names none that is here."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.jax_platforms
    if not platforms:
      raise
    first = (str(error).strip() or "not installed, or no such device").splitlines()[0]
    raise ConfigError(
      f"JAX_PLATFORMS={platforms}: JAX cannot use it here ({first[:200]}); unset it, or name what "
      "is installed and here: cpu, cuda, tpu"
    ) from error


def _start_watching(heartbeat_seconds: int) -> None:
  """Starts the threads that end this process if another one has stopped, until it ends itself."""
  over = threading.Event()
  atexit.register(over.set)
  answered = [0]
  watched = (distributed.global_state.client, over, answered)
  threading.Thread(target=_watch, args=watched, daemon=True).start()
  if not multihost.is_first():
    silence = (over, answered, heartbeat_seconds * _SILENCE)
    threading.Thread(target=_look_out, args=silence, daemon=True).start()


def _is_named(coordinator_address, num_processes, process_id) -> bool:
  """Whether the processes are given by flags; raises ConfigError if these do not fit together."""
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


def stop(message: str) -> None:
  """Ends this process of several at once with `message`; the others are told and stop too.

  An orderly exit would wait for processes that wait for this one.
  """
  _ending.acquire()
  own = f"error: process {jax.process_index()}: "
  _say_error(message if message.startswith(own) else message.replace("error: ", own, 1))
  _tell_stopped(distributed.global_state.client, f"process {jax.process_index()}")
  _let_others_look()
  os._exit(1)


def _tell_stopped(client: Any, who: str) -> None:
  """Only the first message counts: a process that stops because of it would name another."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # told before; the coordinator may be gone
    client.key_value_set(_STOPPED, who)


def _let_others_look() -> None:
  """Keeps the coordinator, which is in process 0, until the others have read why it ends."""
  if multihost.is_first():
    time.sleep(2 * _LOOK_EVERY_SECONDS)


def _look_out(over: threading.Event, answered: list[int], silence_seconds: float) -> None:
  """Ends this process if process 0 has been silent for so long.

  A host that is gone without a word, or frozen, sends no reset: JAX would end this process by its
  own message, without a name. Looks are counted, so that a pause of this process is not taken for
  silence.
  """
  before, silent = -1, 0
  while not over.wait(_LOOK_EVERY_SECONDS):
    before, silent = answered[0], silent + 1 if answered[0] == before else 0
    if silent * _LOOK_EVERY_SECONDS > silence_seconds:
      _exit(loss_of_another(f"process 0, silent for {silence_seconds:.0f} s"))


def _watch(client: Any, over: threading.Event, answered: list[int]) -> None:
  """Ends this process when another says that one has stopped; answers a roll call.

  One that waits for it at a barrier of a checkpoint would learn that from the heartbeats alone, or
  never, if each of two waits for the other's failed write.

  Args:
    client: of the store.
    over: set when this process ends.
    answered: how often process 0, where the store is, has answered; counted here.
  """
  here = False
  while not over.wait(_LOOK_EVERY_SECONDS):
    who = _read(client, _STOPPED, answered)
    if who is not None:
      _ending.acquire()
      _say_error(loss_of_another(who))
      _let_others_look()
      os._exit(1)
    if not here and _read(client, _ROLL_CALL, answered) is not None:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_HERE}/{jax.process_index()}", "")
        here = True


def _read(client: Any, key: str, answered: list[int]) -> str | None:
  """What is in the store; None if nothing is, or process 0 does not answer."""
  try:
    value = client.key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" not in str(error):
      return None
    value = None
  answered[0] += 1
  return value


def failed_collective(how: str) -> str:
  """What to say after a collective has failed, with the names of the processes that are gone.

  Asks them all: in each that lives a thread answers, even while its main thread waits in a
  collective. Tells the others who is gone. Takes a few seconds.

  Args:
    how: the failure's own words.
  """
  client = distributed.global_state.client
  try:
    client.key_value_set(_ROLL_CALL, "", allow_overwrite=True)
    time.sleep(4 * _LOOK_EVERY_SECONDS)
    answered = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(_HERE)}
  except jax.errors.JaxRuntimeError:
    return loss_of_another(f"process 0, which the others ask, does not answer: {how}")
  gone = [index for index in range(jax.process_count()) if index not in answered]
  if not gone:
    return (
      f"error: process {jax.process_index()}: the processes cannot reach each other ({how}), "
      "though each reaches process 0; does the name of every host resolve to an address that the "
      "others can reach?"
    )
  who = f"process{'es' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
  _tell_stopped(client, who)
  return loss_of_another(f"{who}: {how}")


def _exit(message: str) -> None:
  _ending.acquire()
  _say_error(message)
  os._exit(1)


def _say_error(message: str) -> None:
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)


def loss_of_another(what: str) -> str:
  """The message of a process that cannot go on alone; `what` says who is gone."""
  return (
    f"error: process {jax.process_index()}: another process of this run has stopped, see its own "
    f"output ({what}); the same command goes on from what is finished"
  )


def is_loss_of_another(error: Exception) -> bool:
  """Whether a failed collective says that a process at its other end is gone."""
  return jax.process_count() > 1 and any(name in str(error) for name in ("Gloo", "NCCL"))
