"""Runs the main job.

  python -m launch.run --config=configs/quickstart.py --workdir=DIR [--stages=prepare,base]

Options of the config are set as --config.SECTION.KEY=VALUE. Several processes, each started with
the same command, share one work directory: --coordinator_address=HOST:PORT --num_processes=N
--process_id=I, or --distributed on a TPU pod, under Slurm or in a JobSet.
"""

from absl import app, flags
from ml_collections import config_flags

from launch import cache_flag, common, process_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made if it is missing.")
_STAGES = flags.DEFINE_list("stages", None, "Stages to run; all by default.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Says what the run would need here (memory, time, storage); writes nothing."
)
_NUM_UNLABELLED = flags.DEFINE_integer(
  "num_unlabelled", 0, "--dry_run: for so many unlabelled images; 0 for those of the data set.",
  lower_bound=0,
)  # fmt: skip


def main(argv):
  common.start(argv)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax import config, errors, pipeline
  from rndpo_jax.planning import dry_run
  from rndpo_jax.report import summary
  from rndpo_jax.runtime import lock, multihost, progress

  stages = config.STAGES if _STAGES.value is None else _STAGES.value
  with common.one_line_errors():
    end = process_flags.meet()
  with common.one_line_errors(end):
    if _DRY_RUN.value:
      dry_run.run(_CONFIG.value, _WORKDIR.value, _NUM_UNLABELLED.value)
      return
    if _NUM_UNLABELLED.value:
      raise errors.ConfigError("--num_unlabelled: is read by --dry_run alone; leave it out")
    with lock.hold(_WORKDIR.value):
      common.take_signals()
      cache_flag.use()
      pipeline.run(_CONFIG.value, _WORKDIR.value, stages)
    if "report" in stages and multihost.is_first():
      progress.say(f"\n{summary.text(_WORKDIR.value)}\nreport: {_WORKDIR.value}/report.html")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=common.parse)
