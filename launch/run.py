"""Runs the main job.

  python -m launch.run --config=configs/quickstart.py --workdir=DIR [--stages=prepare,base]

Options of the config are set as --config.SECTION.KEY=VALUE.
"""

import errno
import os
import sys

# Resizing multiplies small matrices in loader threads: threads of BLAS beside them only compete
# for the cores that compute. Read once, when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made where it is missing.")
_STAGES = flags.DEFINE_list("stages", None, "Stages to run; all by default.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  logging.set_verbosity(logging.ERROR)
  logging.get_absl_logger().addFilter(is_no_full_disk)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax import checkpoint, config, files, judges, pipeline, preemption, progress, training
  from rndpo_jax.data import records
  from rndpo_jax.stages import mine, pairs

  refusals = (
    config.ConfigError, records.DataError, training.TrainingError, checkpoint.CheckpointError,
    pairs.PairsError, mine.MiningError, files.FileError, judges.JudgeError,
  )  # fmt: skip
  try:
    stages = config.STAGES if _STAGES.value is None else _STAGES.value
    preemption.install()
    pipeline.run(_CONFIG.value, _WORKDIR.value, stages)
  except preemption.Preempted as error:
    progress.say(f"stopped by {error}")
    sys.exit(error.exit_code)
  except refusals as error:
    sys.exit(f"error: {error}")
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    sys.exit(
      f"error: the disk is full ({error}); free some space, or name another --workdir, and run "
      "the same command again: finished work is kept"
    )
  if "report" in stages:
    progress.say(f"\n{pipeline.summary(_WORKDIR.value)}\nreport: {_WORKDIR.value}/report.html")


def is_no_full_disk(record) -> bool:
  """False for Orbax's log of a full disk in its thread: the same error is raised in `main`."""
  return not record.exc_info or "No space left" not in str(record.exc_info[1])


def parse(argv):
  """Parses flags; a config key that is unknown or of another type ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    sys.exit(f"error: {error}; see --config and the keys of rndpo_jax/config.py")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=parse)
