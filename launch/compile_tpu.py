r"""Compiles the program for TPU slices that are not here, and says what it would cost there.

  pip install -e '.[tpu-aot]'
  python -m launch.compile_tpu --config=configs/ph2.py --config.data.size='(512,512)' \
      --num_channels=3 --topology=v5e:4x4,v6e:16x16

Needs no TPU and no data. The time is a roofline, the larger of operations over the peak and HBM
bytes over the bandwidth: a program takes longer.
"""

import os
import sys

# Devices that are here are not wanted, and a TPU that is looked for is not found.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags, logging
from ml_collections import config_flags

from launch import common

PROGRAMS = ("mine", "base", "finetune", "validate", "evaluate", "resize")
# Measuring the judges, training the judge `learned`, and the loss alone.
MORE = ("measure", "judge", "loss")
# Each device has images of its own, also where config.mesh.space shares those of training.
APART = ("mine", "measure", "evaluate", "resize")
LOSSES = (((16, 256, 256, 4), "float32"), ((64, 512, 512, 4), "bfloat16"))

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
_TOPOLOGY = flags.DEFINE_list("topology", "v5e:4x4", "CHIP:AxB[xC], several after commas.")
_PROGRAMS = flags.DEFINE_list("programs", list(PROGRAMS), f"Some of {', '.join(PROGRAMS + MORE)}.")
_BATCH = flags.DEFINE_integer(
  "batch_per_device", 8, "Images on each chip; in training on config.mesh.space.", lower_bound=1
)
_CHANNELS = flags.DEFINE_integer("num_channels", 1, "Channels of an image.", lower_bound=1)
_NUM_UNLABELLED = flags.DEFINE_integer(
  "num_unlabelled", 0, "Also says how long mining so many images takes at least; 0 does not.",
  lower_bound=0,
)  # fmt: skip
_CLASSES = flags.DEFINE_integer("num_classes", 0, "Classes; 0 takes config.data.num_classes.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  logging.set_verbosity(logging.ERROR)
  import jax

  from rndpo_jax import config as config_lib
  from rndpo_jax.checks import config_checks
  from rndpo_jax.errors import RndpoError
  from rndpo_jax.nnunet import imported
  from rndpo_jax.planning import program_inputs

  jax.config.update("jax_enable_compilation_cache", False)  # it is the compiler that is asked
  unknown = set(_PROGRAMS.value) - {*PROGRAMS, *MORE}
  if unknown:
    expected = ", ".join(PROGRAMS + MORE)
    sys.exit(f"error: --programs: found {min(unknown)!r}, expected {expected}")
  if _NUM_UNLABELLED.value and "mine" not in _PROGRAMS.value:
    sys.exit("error: --num_unlabelled: is read for the program 'mine' alone; add it to --programs")
  try:
    config = imported.resolve(_CONFIG.value)
    config_checks.validate(config)
    config = config_lib.of_phase(config)
    check_micro_batches(config, _BATCH.value)
    problem = program_inputs.problem_of(config, _CHANNELS.value, _CLASSES.value)
    for topology in _TOPOLOGY.value:
      show(config, topology, problem)
  except RndpoError as error:
    sys.exit(f"error: {error}")


def accumulate_steps(config, name):
  """Micro-batches that a step of the program `name` goes through; 1 of one that has none."""
  return config[name].accumulate_steps if name in ("base", "finetune") else 1


def check_micro_batches(config, batch):
  """Raises ConfigError for a batch that the stages cannot split into micro-batches."""
  from rndpo_jax.errors import ConfigError

  for name in _PROGRAMS.value:
    steps = accumulate_steps(config, name)
    if batch % steps:
      raise ConfigError(
        f"--batch_per_device: found {batch}, no multiple of config.{name}.accumulate_steps="
        f"{steps}; use {batch // steps * steps + steps}, or other accumulate_steps"
      )


def show(config, topology, problem):
  """Prints the programs of one slice."""
  import jax

  from rndpo_jax.planning import programs, roofline
  from rndpo_jax.planning import topology as topology_lib
  from rndpo_jax.runtime import sharding

  axes = config.mesh
  chip, mesh = topology_lib.open_topology(topology, fsdp=axes.fsdp, space=axes.space)
  batch = _BATCH.value
  of_chips = (
    "a chip" if axes.space == 1 else f"for {axes.space} chips (mining and evaluating, a chip)"
  )
  print(f"{topology}, {batch} images {of_chips} of {problem.size}, {problem.num_classes} classes")
  sharers = sharding.num_batch_parts(mesh)
  totals = {name: batch * (mesh.size if name in APART else sharers) for name in _PROGRAMS.value}
  lowered = programs.programs(config, problem, mesh, totals)
  for name in _PROGRAMS.value:
    if name == "loss":
      show_losses(mesh)
      continue
    try:
      compiled = lowered[name]().compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      print(f"{name:9} does not fit: {str(error).splitlines()[0][:200]}", flush=True)
      continue
    report = roofline.measure(compiled, accumulate_steps(config, name))
    if name in APART and report.collectives:
      sys.exit(f"error: the program {name!r} communicates: {report.collectives}")
    per_chip = batch if name in APART else batch / axes.space
    print(roofline.describe(name, report, chip, per_chip), flush=True)
    if name == "mine" and _NUM_UNLABELLED.value:
      chips = mesh.size
      print(roofline.describe_mining(report, chip, batch, chips, _NUM_UNLABELLED.value))
    if name == "finetune" and axes.fsdp == axes.space == 1:  # of gradients' all-reduces alone
      print(roofline.describe_scaling(report, chip), flush=True)


def show_losses(mesh):
  """Prints what the loss alone moves."""
  from rndpo_jax.planning import roofline
  from rndpo_jax.planning import topology as topology_lib

  for shape, dtype in LOSSES:
    lowered, minimum = topology_lib.lower_loss(mesh, shape, dtype)
    report = roofline.measure(lowered.compile())
    print("\n".join(roofline.describe_loss(f"{dtype}{list(shape)}", report, minimum)))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  app.run(main, flags_parser=common.parse)
