"""What the programs share: how they start, how flags are parsed, and errors of one clear line."""

import contextlib
import logging as std_logging
import os
import re
import signal
import sys
import threading
import traceback

from absl import app, logging

from launch import xla_flags


def start(argv):
  """Before anything imports numpy or jax; an argument that is no flag ends the program."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  open_streams()
  end_at_sigterm()
  xla_flags.tune()
  os.environ["MPLBACKEND"] = "agg"  # matplotlib cannot be imported with one that it does not know
  set_types()
  logging.set_verbosity(logging.ERROR)
  quiet_failed_writes()


def open_streams():
  """Opens what of standard input, output and error is closed, onto nothing.

  Else the next file that is opened would take its number, and what is printed would land there.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


# What the program computes in; a user may have set another for programs of their own.
_TYPES = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard"}


def set_types():
  """Sets the number types that this program is written for, and says what it sets back."""
  import jax

  for name, needed in _TYPES.items():
    found = getattr(jax.config, name)
    if found != needed:
      jax.config.update(name, needed)
      print(f"{name.upper()}={found} is not for this program: it runs with {needed}", flush=True)


# Where Python's own handler of a signal writes its number, before `take_signals`.
_told: list[int] = []
_START_AGAIN = 75  # preemption.EXIT_CODE, whose module imports jax


def end_at_sigterm():
  """SIGTERM ends the program at once as one to start again, for nothing is half done yet.

  A thread does it: the main one may be waiting for other processes, where no handler runs.
  """
  read, write = os.pipe()
  os.set_blocking(write, False)

  def wait():
    for number in iter(lambda: os.read(read, 1), b""):
      if number[0] == signal.SIGTERM:
        os.write(2, b"SIGTERM: ended before any work; the same command starts it\n")
        os._exit(_START_AGAIN)
    os.close(read)

  signal.signal(signal.SIGTERM, lambda *_: None)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _told.append(write)
  threading.Thread(target=wait, daemon=True).start()


def take_signals():
  """From here on a signal is noted, and the work in hand finished (`preemption`).

  Call after the processes have met: JAX sets a handler of its own then.
  """
  from rndpo_jax.runtime import preemption

  preemption.install()
  signal.set_wakeup_fd(-1)
  os.close(_told.pop())


_HOME = re.compile(r"(--?[\w.]+=)(~(?:/.*)?)", re.DOTALL)


def parse(argv):
  """Parses flags; a config key that is unknown or of another type ends in one line.

  A value `~` or `~/...` is in the home folder: bash leaves it as it is in --flag=~/path.
  """
  matches = [(one, _HOME.fullmatch(one)) for one in argv]
  argv = [match[1] + os.path.expanduser(match[2]) if match else one for one, match in matches]
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"error: {error}; see --config and the keys of rndpo_jax/config.py")


@contextlib.contextmanager
def one_line_errors(end=sys.exit):
  """Ends the program by `end(message)` on what a user can fix, and after a signal by its code.

  One of several processes ends so by every other error too, after its traceback: an orderly exit
  would wait for processes that wait for this one.
  """
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  import jax

  from rndpo_jax.runtime import preemption, progress

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
    if isinstance(error, BrokenPipeError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be written has no reader
    end(message)


def one_line(error):
  """What to say of an error that a user can fix; None of any other."""
  import jax

  from rndpo_jax import errors
  from rndpo_jax.runtime import files, processes

  if isinstance(error, errors.RndpoError):
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
  if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
    return (
      f"error: a process that loads images was ended from outside ({error}); if memory ran out, "
      "take fewer of them (config.data.num_workers); the same command goes on from what is finished"
    )
  if not isinstance(error, OSError):
    return None
  if isinstance(error, BrokenPipeError) and not error.filename:
    return (
      "error: nobody reads the standard output any more (a pipe such as | head has ended): send it "
      "to a file; the same command goes on from what is finished"
    )
  if files.is_too_large(error):
    return (
      f"error: a file would be larger than this process may write ({error}); raise that limit "
      "(ulimit -f) and run the same command again: finished work is kept"
    )
  if files.is_full_disk(error):
    return (
      f"error: the disk is full ({error}); free some space, or name another --workdir, and run "
      "the same command again: finished work is kept"
    )
  if error.filename:
    return f"error: {error}; fix that and run the same command again: finished work is kept"
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
  from rndpo_jax.training import checkpoint

  error = record.exc_info[1] if record.exc_info else None
  return not (checkpoint.is_failed_write(error) or "cannot schedule new futures" in str(error))
