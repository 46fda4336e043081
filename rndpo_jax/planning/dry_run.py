"""What a config would need here, before anything is trained or written.

The programs of the stages are compiled for the devices that are here and run on zeros; the rest is
arithmetic (`cost`). Nothing is written to the work directory.
"""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax import models, pipeline, types
from rndpo_jax import workdir as workdir_lib
from rndpo_jax.checks import config_checks
from rndpo_jax.data import builder
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import metrics
from rndpo_jax.mining import proposals
from rndpo_jax.nnunet import imported
from rndpo_jax.pairs import manifest, shards
from rndpo_jax.planning import cost, data_set, storage, timing
from rndpo_jax.planning.data_set import Data
from rndpo_jax.runtime import files, progress, sharding
from rndpo_jax.stages import measure_judges


def run(config, workdir: os.PathLike, num_unlabelled: int = 0) -> list[str]:
  """Says what a run of `config` needs.

  Args:
    config: the whole config.
    workdir: of the run; what is prepared there is measured, and its disk looked at.
    num_unlabelled: plans for so many unlabelled images; 0 takes those of the data set.

  Returns:
    The lines that were said.

  Raises:
    ConfigError: what cannot work or does not fit; the lines are said before that.
    records.DataError: from the source.
  """
  config = imported.resolve(config)
  config_checks.validate(config)
  workdir_lib.check_path("--workdir", workdir)
  pipeline.check_here(config)
  config = config_lib.of_phase(config)
  data = data_set.describe_data(config, workdir)
  if num_unlabelled:
    data = data_set.with_unlabelled(data, num_unlabelled)
  shards.check_num_shards(config, data.num_images["unlabelled"])
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  segmenter = models.build(
    config.model, num_classes=data.problem.num_classes, spatial_dims=data.problem.spatial_dims
  )
  image = jax.ShapeDtypeStruct((1, *data.problem.size, data.problem.num_channels), jnp.float32)
  params = jax.eval_shape(segmenter.init, jax.eval_shape(lambda: jax.random.key(0)), image)
  trials = timing.try_programs(config, data.problem, mesh)
  record = example_record(trials["mine"].out_info)
  planned = storage.planned(config, data, params, record)
  # Planned for other images, all of them are still to be prepared.
  left = (
    planned if num_unlabelled or files.is_remote(workdir) else storage.to_come(planned, workdir)
  )
  local = config.mine.batch_size * jax.local_device_count()
  host = timing.host_seconds(data.dataset, record, local)
  limit = timing.memory_limit()
  free = None if files.is_remote(workdir) else storage.free_bytes(workdir)
  lines = [
    *_head(data, mesh, params),
    *_table(config, data, trials, host, limit),
    *_foot(config, data, record, planned, left, free),
    *_preparing(data, files.is_remote(workdir)),
  ]
  progress.say("\n".join(lines))
  refused = refusals(config, trials, limit, left, free)
  if refused:
    raise ConfigError("\n".join(refused))
  return lines


def example_record(out_info) -> dict[str, np.ndarray]:
  """A mined image as it is written, from the shapes of the mining program's results."""
  out = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), out_info)
  mined = types.Pairs(*(field[0] for field in out["pairs"]))
  return manifest.record(out, 0, 0, mined)


def refusals(config, trials, limit: int, left: cost.Storage, free: int | None) -> list[str]:
  """A line for each thing that does not fit, naming the key that makes it smaller.

  Args:
    config: the whole config.
    trials: from `timing.try_programs`.
    limit: bytes that a program may take on a device.
    left: what is still to be written.
    free: bytes of the disk; None if there is no such limit.
  """
  found, earlier = [], timing.earlier(config)
  for name, tried in trials.items():
    if tried.memory > limit:
      size = f"{cost.show_bytes(tried.memory)} a device, of {cost.show_bytes(limit)}"
      own, program = (earlier[name], "finetune") if name in earlier else (config, name)
      found.append(timing.too_large(own, program, size, name))
  if free is not None and sum(left) > free:
    found.append(
      f"--workdir: needs up to {cost.show_bytes(sum(left))} more, its disk has "
      f"{cost.show_bytes(free)} free; name another, or mine fewer pairs an image "
      f"(config.mine.pairs_per_image={config.mine.pairs_per_image})"
    )
  return found


def _head(data: Data, mesh: Mesh, params) -> list[str]:
  problem, device = data.problem, mesh.devices.flat[0]
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  counts = ", ".join(f"{count:,} {name}" for name, count in data.num_images.items())
  counts += " (tiles)" if data.num_evaluated is not None else ""
  return [
    f"devices   {mesh.size} of kind {device.device_kind}, {jax.process_count()} process"
    f"{'es' if jax.process_count() > 1 else ''}; mesh: {axes}",
    f"images    {counts}; {problem.num_channels} channels, {problem.num_classes} classes, taken at "
    f"{' x '.join(map(str, problem.size))}, stored with {data.num_bytes // data.num_stored:,} "
    "bytes each in the mean",
    f"model     {sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,} parameters, "
    f"{cost.show_bytes(storage.num_bytes(params))}",
    "",
  ]


def _table(config, data: Data, trials: dict[str, timing.Trial], host, limit: int) -> list[str]:
  """One row a program; a batch's seconds are those of the program on zeros."""
  title = ("program", "batch", "memory a device", "s a batch", "batches", "in all", "images/s read")
  rows, total = [title], 0.0
  for name, count in num_batches(config, data, trials).items():
    tried = trials[name]
    seconds = count * tried.seconds
    if name == "mine":
      read, write = host
      seconds = cost.mining_seconds(
        count, tried.seconds, read or 0.0, write, shared=jax.default_backend() == "cpu"
      )
    unknown = math.isnan(tried.seconds)  # too large to be run
    total += seconds
    rows.append(
      (
        name,
        f"{tried.batch_size}",
        f"{cost.show_bytes(tried.memory)} of {cost.show_bytes(limit)}",
        "-" if unknown else f"{tried.seconds:.3g}",
        f"{count:,}",
        "-" if unknown else cost.show_seconds(seconds),
        "-" if unknown else _rate(tried.batch_size / tried.seconds),
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]
  if not math.isnan(total):
    shown = cost.show_seconds(total)
    lines.append(f"total     {shown}; starting, compiling and reading images come on top")
  return lines


def _rate(images_a_second: float) -> str:
  return f"{images_a_second:,.0f}" if images_a_second >= 10 else f"{images_a_second:.2g}"


def num_batches(config, data: Data, trials: dict[str, timing.Trial]) -> dict[str, int]:
  """Batches of each program one after another, in the order of the stages."""
  counts, base, before = data.num_images, config.base, timing.earlier(config)
  phases = [*before.values(), config]
  evaluations = sum(-(-own.finetune.num_steps // own.finetune.eval_every_steps) for own in phases)
  supervised = base.num_members if config_lib.trains_base(config) else 0
  validated = evaluations + supervised * -(-base.num_steps // base.eval_every_steps)
  local = config.mine.batch_size * jax.local_device_count()
  processes = jax.process_count()
  judged = sum(-(-counts[split] // local) for split in measure_judges.SPLITS)  # by process 0
  # Each process measures some of the checkpoints, and of the base, on its own devices.
  # Once more the base, by RankSEG, by process 0.
  measured = -(-(evaluations + 1) // processes) + 1
  own = trials["evaluate"].batch_size // processes
  if set(config.evaluate.metrics) & set(metrics.SURFACE):
    measured += 3  # base, last and selected checkpoint again, by process 0
  seen = data.num_evaluated or counts["val"] + counts["test"]
  evaluated = -(-seen // own)
  # The program is of one pass; so many flips are averaged over.
  passes = 2**config.data.spatial_dims if config.evaluate.mirror else 1
  found = {
    "base": supervised * base.num_steps,
    "judge": config.judge.learned.num_steps,
    "measure": judged * len(phases),
    "mine": cost.mining_batches(counts["unlabelled"], config.mine.num_shards, processes, local)
    * storage.num_minings(config),
    **{name: own.finetune.num_steps for name, own in before.items()},
    "finetune": config.finetune.num_steps,
    "validate": validated * -(-counts["val"] // trials["validate"].batch_size),
    "evaluate": measured * evaluated * passes,
    "resize": measured * evaluated,
  }
  return {name: count for name, count in found.items() if name in trials}


def _foot(config, data: Data, record, planned, left, free: int | None) -> list[str]:
  most = data.num_images["unlabelled"] * config.mine.pairs_per_image
  num_proposals = sum(count for _, count in proposals.parse_mix(config.proposals.mix))
  count = f"at most {most:,}: {config.mine.pairs_per_image} an image, of {num_proposals} proposals"
  if config.data.preferences:
    count = f"those of {config.data.preferences}"
  size = len(serialization.msgpack_serialize(record)) / config.mine.pairs_per_image
  return [
    "",
    f"pairs     {count}; {size:,.0f} bytes a pair before compression",
    f"storage   at most {cost.show_bytes(sum(planned))}: "
    + ", ".join(
      f"{name} {cost.show_bytes(size)}"
      for name, size in planned._asdict().items()
      if size or name != "unpacked"
    )
    + ("" if left == planned else f"; {cost.show_bytes(sum(left))} of it to come")
    + ("" if free is None else f"; {cost.show_bytes(free)} free"),
  ]


def _preparing(data: Data, remote: bool) -> list[str]:
  """What the stage 'prepare' takes if it has not run, and that reading is then unknown."""
  if data.source is None:
    return []
  each = timing.preparing_seconds(data.source)
  num_files = -(-data.num_bytes // builder.FILE_BYTES)
  processes = 1 if remote else jax.process_count()  # process 0 alone writes to an object store
  seconds = cost.preparing_seconds(data.num_stored, each, num_files, processes)
  return [
    f"prepare   {cost.show_seconds(seconds)}: {_rate(1 / each)} records/s in a process, "
    f"{data.num_stored:,} in {num_files:,} file{'s' if num_files > 1 else ''}, which {processes} "
    f"process{'es share' if processes > 1 else ' writes'}",
    "reading   not measured, for nothing is prepared; run --stages=prepare and look again",
  ]
