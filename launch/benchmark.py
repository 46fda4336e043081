"""Times the parts that decide the cost of preference fine-tuning, beside others' ways to do them.

  python -m launch.benchmark --benchmark=loss [--peers] [--output=FILE.json]

--benchmark=loss   the preference loss, value and gradient, against the bandwidth of a copy
            step   a fine-tuning step against a supervised one
            mine   K proposals from one encoder pass against K forward passes; mining as a whole
            input  steps a second with real input against a batch that lies on the device
            population  a sweep's runs as one program against one after another
            all    each of them

With --output also writes a plot of the loss beside the JSON file. --peers needs the extra `peers`.
"""

import os
import sys

# Memory is taken as it is needed, so that PyTorch finds some on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import app, flags, logging

from launch import xla_flags

_BENCHMARK = flags.DEFINE_string(
  "benchmark", None, "loss | step | mine | input | population | all."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices to use; 0 uses all.")
# What is left out takes the benchmark's own default, see rndpo_jax/benchmark/options.py.
_OPTIONS = {
  "shape": flags.DEFINE_list("shape", None, "B,H,W or B,H,W,Z."),
  "classes": flags.DEFINE_integer("classes", None, "Classes; loss: 1 is one sigmoid logit."),
  "pairs": flags.DEFINE_integer("pairs", None, "Preference pairs of each image."),
  "dtype": flags.DEFINE_string("dtype", None, "float32 | bfloat16."),
  "disagreement": flags.DEFINE_float("disagreement", None, "Fraction of pixels in dispute."),
  "sizes": flags.DEFINE_list("sizes", None, "loss: exponents n, timed also at 2**n pixels."),
  "width": flags.DEFINE_integer("width", None, "Channels of the U-Net's first level."),
  "depth": flags.DEFINE_integer("depth", None, "Levels of the U-Net."),
  "members": flags.DEFINE_integer("members", None, "population: runs in one program."),
  "seeds": flags.DEFINE_integer("seeds", None, "population: seeds among them, sharing batches."),
  "workers": flags.DEFINE_integer("workers", None, "input: processes that read; 0: threads."),
  "repeats": flags.DEFINE_integer("repeats", None, "Samples of each variant."),
  "peers": flags.DEFINE_bool("peers", None, "Also times PyTorch."),
}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; flags start with --")
  xla_flags.tune()  # before anything imports numpy or jax
  logging.set_verbosity(logging.ERROR)
  use_devices(_DEVICES.value)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax import errors
  from rndpo_jax.benchmark import options, run, tables
  from rndpo_jax.runtime import progress

  try:
    given = {name: flag.value for name, flag in _OPTIONS.items()}
    given = {**given, "shape": integers("shape"), "sizes": integers("sizes")}
    resolved = options.resolve(_BENCHMARK.value, given)
    check_devices(_DEVICES.value)
    rows = run.run(resolved)
  except (errors.BenchmarkError, errors.ConfigError) as error:
    sys.exit(f"error: {error}")
  tables.print_tables(rows)
  if _OUTPUT.value:
    content = tables.document(rows, any(o.peers for o in resolved.values()))
    progress.say("\n".join(f"written: {path}" for path in tables.write(_OUTPUT.value, content)))


def integers(name):
  """The numbers of a list flag, or None if it is left out."""
  from rndpo_jax.errors import BenchmarkError

  values = _OPTIONS[name].value
  try:
    return None if values is None else tuple(int(value) for value in values)
  except ValueError as error:
    raise BenchmarkError(f"--{name}: found {','.join(values)!r}, expected integers") from error


def use_devices(count):
  """Lets JAX see the first `count` devices alone; compiles afresh, so that the time is true."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
  if count > 0:
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_cuda_visible_devices", ",".join(map(str, range(count))))


def check_devices(count):
  """Refuses a number of devices that is not there, or that JAX could not be held to."""
  import jax

  from rndpo_jax.errors import BenchmarkError

  if count < 0 or count not in (0, jax.device_count()):
    raise BenchmarkError(
      f"--devices: found {count}, and JAX sees {jax.device_count()} of kind "
      f"{jax.devices()[0].device_kind!r}; ask for as many, or limit them by the environment"
    )


if __name__ == "__main__":
  flags.mark_flag_as_required("benchmark")
  app.run(main)
