"""What the programs share: how they start, how flags are parsed, and errors of one clear line."""

import contextlib
import errno
import sys

from absl import app, logging

from launch import cpu


def start(argv):
  """Before anything imports numpy or jax; refuses arguments that are no flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  cpu.tune()
  logging.set_verbosity(logging.ERROR)
  logging.get_absl_logger().addFilter(is_no_full_disk)


def parse(argv):
  """Parses flags; a config key that is unknown or of another type ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"error: {error}; see --config and the keys of rndpo_jax/config.py")


@contextlib.contextmanager
def one_line_errors(end=sys.exit):
  """Ends the program by `end(message)` on what a user can mend, and after a signal by its code."""
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  import jax

  from rndpo_jax import checkpoint, config, files, judges, parallel, preemption, progress, training
  from rndpo_jax.data import records
  from rndpo_jax.stages import pairs, shards

  refusals = (
    config.ConfigError, records.DataError, training.TrainingError, checkpoint.CheckpointError,
    pairs.PairsError, shards.MiningError, files.FileError, judges.JudgeError,
  )  # fmt: skip
  try:
    yield
  except preemption.Preempted as error:
    progress.say(f"stopped by {error}")
    sys.exit(error.exit_code)
  except refusals as error:
    end(f"error: {error}")
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # a barrier fails by ValueError
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


def is_no_full_disk(record) -> bool:
  """False for Orbax's log of a full disk in its thread: the same error is raised in the program."""
  return not record.exc_info or "No space left" not in str(record.exc_info[1])
