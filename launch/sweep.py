"""Fine-tunes with every beta, learning rate and seed of a grid, in one program, on one base.

  python -m launch.sweep --config=configs/ph2.py --config.data.root=DATA --workdir=DIR \
      --betas=3,10,30 --learning_rates=3e-4,1e-3 --seeds=0,1,2

Runs the stages prepare, base and mine if they are not done, then the sweep. A seed is the order
of the batches and the key of fine-tuning; base and pairs are those of config.seed. The best setting
is that of the highest validation Dice at the last step, mean over the seeds; the test split is not
touched. The command that is printed runs it as a single job, tested at its end. Of several phases
the last one is swept. Several processes share the members, as they share a job: see launch.run.
"""

import shlex

from absl import app, flags
from ml_collections import config_flags

from launch import cache_flag, common, process_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made if it is missing.")
_BETAS = flags.DEFINE_list("betas", None, "Betas; that of the config by default.")
_RATES = flags.DEFINE_list("learning_rates", None, "Peaks; that of the config by default.")
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds of fine-tuning; config.seed by default.")
_FORM = flags.DEFINE_enum(
  "form", None, ["vmap", "map"],
  "All members of a device at once, or one after another, in less memory; by default vmap, on CPU "
  "map.",
)  # fmt: skip


def main(argv):
  common.start(argv)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax import config as config_lib
  from rndpo_jax import pipeline
  from rndpo_jax.nnunet import imported
  from rndpo_jax.runtime import lock, multihost, progress
  from rndpo_jax.sweep import sweep, sweep_results

  with common.one_line_errors():
    end = process_flags.meet()
  with common.one_line_errors(end):
    config = imported.resolve(_CONFIG.value)
    last = config_lib.of_phase(config).finetune
    grid = {
      "betas": numbers(_BETAS, float, last.beta),
      "learning_rates": numbers(_RATES, float, last.learning_rate),
      "seeds": numbers(_SEEDS, int, config.seed),
    }
    sweep.check(config, grid)
    with lock.hold(_WORKDIR.value):
      common.take_signals()
      cache_flag.use()
      pipeline.run(config, _WORKDIR.value, ("prepare", "base", "mine"))
      content = sweep.run(config, _WORKDIR.value, form=_FORM.value, **grid)
    if multihost.is_first():
      progress.say(f"\n{sweep_results.summary(content)}")
      if content["best"] is not None:
        progress.say(f"as a single job:\n  {command(content['best'])}")


def numbers(flag, kind, default):
  """The numbers of a list flag, or the config's own one."""
  from rndpo_jax.errors import ConfigError

  try:
    return [default] if flag.value is None else [kind(value) for value in flag.value]
  except ValueError as error:
    raise ConfigError(
      f"--{flag.name}: found {','.join(flag.value)!r}, expected numbers with commas between"
    ) from error


def command(best):
  """The command that runs the job of a setting, with data and base of this work directory."""
  from rndpo_jax.sweep import sweep_results

  flag = flags.FLAGS["config"]
  given = config_flags.get_override_values(flag)
  overrides = sweep_results.overrides(_CONFIG.value, given, best)
  overrides["base.workdir"] = _CONFIG.value.base.workdir or _WORKDIR.value
  return shlex.join(
    [
      "python", "-m", "launch.run", f"--config={config_flags.get_config_filename(flag)}",
      f"--workdir={_WORKDIR.value.rstrip('/')}-best",
      *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]
  )  # fmt: skip


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=common.parse)
