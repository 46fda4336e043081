"""What the programs share: how they start, how flags are parsed, and errors of one clear line."""

import contextlib
import logging as std_logging
import sys
import traceback

from absl import app, logging

from launch import cpu


def start(argv):
  """Before anything imports numpy or jax; refuses arguments that are no flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  cpu.tune()
  logging.set_verbosity(logging.ERROR)
  quiet_failed_writes()


def parse(argv):
  """Parses flags; a config key that is unknown or of another type ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"error: {error}; see --config and the keys of rndpo_jax/config.py")


@contextlib.contextmanager
def one_line_errors(end=sys.exit):
  """Ends the program by `end(message)` on what a user can mend, and after a signal by its code.

  One of several processes ends so by every other error too, after its traceback: an orderly exit
  would wait for processes that wait for this one.
  """
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  import jax

  from rndpo_jax import preemption, progress

  try:
    yield
  except preemption.Preempted as error:
    progress.say(f"stopped by {error}")
    sys.exit(error.exit_code)
  except Exception as error:
    message = one_line(error)
    if message is None and end is sys.exit:
      raise
    if message is None:
      traceback.print_exc()
      message = f"error: process {jax.process_index()}: it stops by the error above"
    end(message)


def one_line(error):
  """What to say of an error that a user can mend; None of any other."""
  import jax

  from rndpo_jax import checkpoint, config, files, judges, processes, training
  from rndpo_jax.data import records
  from rndpo_jax.stages import pairs, shards

  refusals = (
    config.ConfigError, records.DataError, training.TrainingError, checkpoint.CheckpointError,
    pairs.PairsError, shards.MiningError, files.FileError, judges.JudgeError,
  )  # fmt: skip
  if isinstance(error, refusals):
    return f"error: {error}"
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return (
      f"error: a device is out of memory ({str(error).splitlines()[0][:200]}); --dry_run says what "
      "each stage needs: take a smaller batch_size or a larger accumulate_steps for the stage, "
      "config.model.remat=True, or more devices"
    )
  # A barrier fails by ValueError.
  if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
    if not processes.is_loss_of_another(error):
      return None
    return processes.failed_collective(str(error).splitlines()[0][:200])
  if not isinstance(error, OSError):
    return None
  if files.is_full_disk(error):
    return (
      f"error: the disk is full ({error}); free some space, or name another --workdir, and run "
      "the same command again: finished work is kept"
    )
  if error.filename:
    return f"error: {error}; mend that and run the same command again: finished work is kept"
  return None


def quiet_failed_writes():
  """Leaves out what threads print of a failed write: the same error is raised in the program.

  Orbax logs the first, asyncio the others, which nobody waits for any more, and TensorStore has
  none to tell of their end.
  """
  for logger in (logging.get_absl_logger(), std_logging.getLogger("asyncio")):
    logger.addFilter(is_no_failed_write)
  others = sys.unraisablehook

  def show(found):
    if str(found.exc_value) != "Event loop is closed":
      others(found)

  sys.unraisablehook = show


def is_no_failed_write(record) -> bool:
  """Whether a log record is of anything but a write that failed, or that the program's end met."""
  from rndpo_jax import checkpoint

  error = record.exc_info[1] if record.exc_info else None
  return not (checkpoint.is_failed_write(error) or "cannot schedule new futures" in str(error))
