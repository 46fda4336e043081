"""Runs the main job.

  python -m launch.run --config=configs/quickstart.py --workdir=DIR [--stages=prepare,base]

Options of the config are set as --config.SECTION.KEY=VALUE. Several processes, each started with
the same command, share one work directory: --coordinator_address=HOST:PORT --num_processes=N
--process_id=I, or --distributed where a TPU pod, Slurm or a JobSet says so itself.
"""

import errno
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from launch import cpu

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made where it is missing.")
_STAGES = flags.DEFINE_list("stages", None, "Stages to run; all by default.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Says what the run would need here (memory, time, storage); writes nothing."
)
_NUM_UNLABELLED = flags.DEFINE_integer(
  "num_unlabelled", 0, "--dry_run: for so many unlabelled images; 0 for those of the data set."
)
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


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  cpu.tune()  # before anything imports numpy or jax
  logging.set_verbosity(logging.ERROR)
  logging.get_absl_logger().addFilter(is_no_full_disk)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  import jax

  from rndpo_jax import (
    checkpoint,
    config,
    dry_run,
    files,
    judges,
    parallel,
    pipeline,
    preemption,
    progress,
    training,
  )  # fmt: skip
  from rndpo_jax.data import records
  from rndpo_jax.stages import pairs, shards

  refusals = (
    config.ConfigError, records.DataError, training.TrainingError, checkpoint.CheckpointError,
    pairs.PairsError, shards.MiningError, files.FileError, judges.JudgeError,
  )  # fmt: skip
  end = sys.exit
  try:
    stages = config.STAGES if _STAGES.value is None else _STAGES.value
    if join_others():
      end = parallel.stop
    if _DRY_RUN.value:
      progress.say("\n".join(dry_run.run(_CONFIG.value, _WORKDIR.value, _NUM_UNLABELLED.value)))
      return
    if _NUM_UNLABELLED.value:
      raise config.ConfigError("--num_unlabelled: is read by --dry_run alone; leave it out")
    preemption.install()  # after the others are met: JAX sets a handler of its own then
    pipeline.run(_CONFIG.value, _WORKDIR.value, stages)
  except preemption.Preempted as error:
    progress.say(f"stopped by {error}")
    sys.exit(error.exit_code)
  except refusals as error:
    end(f"error: {error}")
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # a barrier's failure is a ValueError
    if not parallel.is_loss_of_another(error):
      raise
    end(
      f"error: process {jax.process_index()}: another process of this run has stopped, see its own "
      f"output ({str(error).splitlines()[0]}); the same command goes on from what is finished"
    )
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    end(
      f"error: the disk is full ({error}); free some space, or name another --workdir, and run "
      "the same command again: finished work is kept"
    )
  if "report" in stages and parallel.is_first():
    progress.say(f"\n{pipeline.summary(_WORKDIR.value)}\nreport: {_WORKDIR.value}/report.html")


def is_no_full_disk(record) -> bool:
  """False for Orbax's log of a full disk in its thread: the same error is raised in `main`."""
  return not record.exc_info or "No space left" not in str(record.exc_info[1])


def join_others():
  """Whether this is one process of several; they have met when it returns."""
  from rndpo_jax import parallel

  return parallel.initialize(
    _COORDINATOR_ADDRESS.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    detect=_DISTRIBUTED.value,
    connect_seconds=_CONNECT_SECONDS.value,
    heartbeat_seconds=_HEARTBEAT_SECONDS.value,
  )


def parse(argv):
  """Parses flags; a config key that is unknown or of another type ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"error: {error}; see --config and the keys of rndpo_jax/config.py")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
