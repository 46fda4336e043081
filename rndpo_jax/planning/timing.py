"""The programs of the stages tried on the devices that are here: memory, and seconds a batch."""

from __future__ import annotations

import functools
import math
import os
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import records, tiles, writer
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import sliding_window
from rndpo_jax.pairs import shards
from rndpo_jax.planning import program_inputs, programs, roofline
from rndpo_jax.runtime import multihost, sharding

# Images read, and records written, to see how long one takes.
_NUM_TRIALS = 32
# A program is run until it was timed so often or so long.
_MAX_RUNS = 10
_ENOUGH_SECONDS = 2.0


class Trial(NamedTuple):
  """One program on zeros: images a batch, bytes on each device, seconds a batch, its results.

  The seconds are NaN if the program is too large to be run.
  """

  batch_size: int
  memory: int
  seconds: float
  out_info: Any


def try_programs(config, problem: program_inputs.Problem, mesh: Mesh) -> dict[str, Trial]:
  """Compiles each program at the config's batch size, and times it.

  Args:
    config: of the last phase. The steps of those before it are programs of their own, called
      'phase 1' and so on; phases that are alike share one.
    problem: what the data tell.
    mesh: of the devices that are here.

  Raises:
    ConfigError: if the compiler finds that a program does not fit.
  """
  trials = _try(config, problem, mesh, batch_sizes(config, mesh))
  tried = [(_step_of(config), trials["finetune"])]
  for name, own in earlier(config).items():
    step, sizes = _step_of(own), {"finetune": own.finetune.batch_size}
    found = next((trial for other, trial in tried if other == step), None)
    if found is None:
      found = _try(own, problem, mesh, sizes, name)["finetune"]
      tried.append((step, found))
    trials[name] = found
  return trials


def earlier(config) -> dict[str, ml_collections.ConfigDict]:
  """The configs of the phases before the last, which `config` is of, by their steps' program."""
  phases = config_lib.every_phase(config)[:-1]
  return {f"phase {number}": own for number, own in enumerate(phases, 1)}


def _step_of(config) -> tuple:
  """What a step of fine-tuning depends on, of all that phases may change."""
  return config.finetune, config.augment, config.strong, config.mine.pairs_per_image


def _try(config, problem, mesh, sizes: dict[str, int], shown: str = "") -> dict[str, Trial]:
  """The programs of `sizes`; `shown` is the name of a single one in errors."""
  trials = {}
  for name, lower in programs.programs(config, problem, mesh, sizes).items():
    lowered = lower()
    try:
      compiled = lowered.compile()
      memory = roofline.memory(compiled)
      # What is too large for a device is an error by its figure; running it would end the program.
      # Of several processes all run it, or none does.
      seconds = math.nan if multihost.any_process(memory > memory_limit()) else _seconds(compiled)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      found = str(error).splitlines()[0][:200]
      raise ConfigError(too_large(config, name, found, shown or name)) from error
    trials[name] = Trial(sizes[name], memory, seconds, lowered.out_info)
  return trials


def batch_sizes(config, mesh: Mesh) -> dict[str, int]:
  """Images that each program of a run takes at once, on all devices together."""
  parts, local = sharding.num_batch_parts(mesh), jax.local_device_count()
  sizes = {"base": config.base.batch_size} if config_lib.trains_base(config) else {}
  if "learned" in (config.judge.name, *config.judge.compare):
    sizes["judge"] = config.judge.learned.batch_size
  if not config.data.preferences:
    sizes["measure"] = config.mine.batch_size * mesh.size
  if config.data.spacing:  # tiles; masks are brought to their own grids on the host
    evaluate = {"evaluate": sliding_window.batch_size(config.data.patch_size) // local * mesh.size}
  else:
    size = -(-config.evaluate.batch_size // local) * mesh.size
    evaluate = {"evaluate": size, "resize": size}
  return sizes | {
    "mine": config.mine.batch_size * mesh.size,
    "finetune": config.finetune.batch_size,
    "validate": -(-config.evaluate.batch_size // parts) * parts,
    **evaluate,
  }


def host_seconds(dataset, record, batch_size: int) -> tuple[float | None, float]:
  """Seconds of a process to read a mining batch (None before `prepare`), and to write its pairs."""
  read = None
  if dataset is not None:
    dataset = tiles.view(dataset)
    indices = np.resize(dataset.splits["unlabelled"], _NUM_TRIALS)
    start = time.perf_counter()
    for index in indices:
      dataset_lib.load_example(dataset, int(index), with_labels=False)
    read = (time.perf_counter() - start) / _NUM_TRIALS * batch_size
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    shards.write_shard(epath.Path(folder) / "trial.array_record", [record] * _NUM_TRIALS, {})
    return read, (time.perf_counter() - start) / _NUM_TRIALS * batch_size


def preparing_seconds(source: records.Source) -> float:
  """Seconds of a process to read, check and write a record, from the first ones of a source."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    count = writer.try_some(
      source,
      epath.Path(folder) / "trial.array_record",
      min(len(source.records), _NUM_TRIALS),
      _ENOUGH_SECONDS,
    )
    return (time.perf_counter() - start) / count


def memory_limit() -> int:
  """Bytes that a program may take on a device.

  On CPU the devices share the host's memory, or what a container or Slurm leaves of it.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return min([host, *cgroup_limits()]) // jax.local_device_count()


def cgroup_limits(
  own: pathlib.Path = pathlib.Path("/proc/self/cgroup"),
  root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
) -> list[int]:
  """Bytes to which this process's control groups limit its memory; those of Linux, v1 and v2.

  A group's limit holds for all within it, so that those above count too. Source: Linux kernel
  documentation, cgroups(7), cgroup-v2.rst.

  Args:
    own: file with a line ID:CONTROLLERS:PATH for each group of this process.
    root: where the groups are mounted.
  """
  found = []
  for line in own.read_text().splitlines() if own.exists() else []:
    _, controllers, path = line.split(":", 2)
    if "memory" in controllers.split(","):
      top, name = root / "memory", "memory.limit_in_bytes"
    elif not controllers:
      top, name = root, "memory.max"
    else:
      continue
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
      if folder.is_relative_to(top) and (folder / name).is_file():
        text = (folder / name).read_text().strip()
        found += [int(text)] if text.isdigit() else []  # else 'max', that is, none
  return found


def too_large(config, name: str, found: str, shown: str) -> str:
  """The error line of a program that does not fit, naming the keys that make it smaller.

  Args:
    config: of the phase whose program it is.
    name: of the program in `programs.programs`.
    found: what it takes.
    shown: what it is called; in a phase before the last, its name is another.
  """
  sections = {
    "validate": "evaluate", "resize": "evaluate", "measure": "mine", "judge": "judge.learned",
  }  # fmt: skip
  section = sections.get(name, name)
  more = {
    "base": ", a larger config.base.accumulate_steps, config.model.remat=True",
    "finetune": ", a larger config.finetune.accumulate_steps, config.model.remat=True",
    "judge": ", a smaller config.judge.learned.masks_per_image",
    "measure": ", fewer judges in config.judge.compare",
  }
  options = functools.reduce(getattr, section.split("."), config)
  return (
    f"config.{section}.batch_size: found {options.batch_size}, with which the program {shown!r} "
    f"does not fit ({found}); take a smaller one{more.get(name, '')}, or more devices"
  )


def _seconds(compiled) -> float:
  """Median seconds of a program on zeros after its first run; donated arguments are made again.

  Several processes run it as often, for they may wait for each other in it: process 0 decides.
  """

  def zero(info):
    if jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    return jnp.zeros(info.shape, info.dtype)

  (infos, _), (shardings, _) = compiled.args_info, compiled.input_shardings
  make = jax.jit(lambda: jax.tree.map(zero, infos), out_shardings=shardings)
  times: list[float] = []

  def goes_on() -> bool:
    return len(times) < 2 or (len(times) <= _MAX_RUNS and sum(times[1:]) < _ENOUGH_SECONDS)

  while multihost.broadcast(goes_on):
    arguments = jax.block_until_ready(make())
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:]))
