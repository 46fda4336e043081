"""The flags of a run of several processes, and the meeting of these."""

import sys

from absl import flags

_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT where process 0 listens, for several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Detect the processes: TPU pod, Slurm, Open MPI, Kubernetes JobSet."
)
_CONNECT_SECONDS = flags.DEFINE_integer(
  "connect_seconds", 45, "How long the processes wait for each other at the start."
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 30, "A process silent for so long counts as dead, and the others stop."
)


def meet():
  """Waits for the other processes, if the flags say that there are some.

  Returns:
    end(message), which ends this process by an error, and with it the others.
  """
  from rndpo_jax.runtime import processes

  several = processes.initialize(
    _COORDINATOR_ADDRESS.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    detect=_DISTRIBUTED.value,
    connect_seconds=_CONNECT_SECONDS.value,
    heartbeat_seconds=_HEARTBEAT_SECONDS.value,
  )
  return processes.stop if several else sys.exit
