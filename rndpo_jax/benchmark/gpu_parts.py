"""Parts of the GPU report that time programs, and the process that runs a part.

  python -m rndpo_jax.benchmark.gpu_parts PART REPORT.jsonl [--rehearse] [--ph2=DIR]

The parts call the benchmarks of `launch.benchmark` with the report's shapes, and say the figures
that goals are set for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

# Memory is taken as it is needed, so that PyTorch finds some on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from absl import flags

from rndpo_jax.benchmark import gpu_rows, gpu_table, options, run, timing

COMPILED, COMPILED_CANCELLED, EAGER = (
  "PyTorch compiled, log-softmax", "PyTorch compiled, cancelled", "PyTorch eager, log-softmax",
)  # fmt: skip
NO_KERNELS = "skipped: the profiler saw no kernels of a GPU"
NO_TORCH = "skipped: PyTorch is not installed"


class Report(NamedTuple):
  """Where a part's rows go.

  Attributes:
    path: the file of rows.
    part: its name.
    goals: of its figures, none in a rehearsal.
    ph2: folder of PH2, "" without one.
  """

  path: pathlib.Path
  part: str
  goals: Any
  ph2: str = ""


def main() -> None:
  """Runs one part."""
  parser = argparse.ArgumentParser()
  parser.add_argument("part")
  parser.add_argument("report", type=pathlib.Path)
  parser.add_argument("--rehearse", action="store_true")
  parser.add_argument("--ph2", default="")
  given = parser.parse_args()
  flags.FLAGS(["gpu_parts"])  # Grain's worker processes read absl's flags, of which there are none
  part = next(part for part in gpu_table.PARTS if part.name == given.part)
  settings = dict(part.settings)
  if given.rehearse:
    settings |= part.tiny
    timing.PAUSE_SECONDS, timing.MAX_INPUTS, options.MIN_REPEATS = 0.0, 2, 2
  module, function = part.function.split(".")
  report = Report(given.report, part.name, {} if given.rehearse else part.goals, given.ph2)
  # By the name it is imported by elsewhere: this module runs as __main__.
  module = importlib.import_module(f"rndpo_jax.benchmark.{module}")
  getattr(module, function)(report, **settings)


def print_machine() -> None:
  """One line of JSON: versions and devices."""
  from rndpo_jax.benchmark import tables

  document = tables.document([], peers=False)
  keys = ("versions", "device_kind", "num_devices", "platform", "processor", "num_cores")
  machine = {key: document[key] for key in keys}
  if has_torch():
    machine["versions"]["torch"] = importlib.metadata.version("torch")
  print(json.dumps(machine))


def has_torch() -> bool:
  """Whether PyTorch is installed; importing it takes seconds."""
  return importlib.util.find_spec("torch") is not None


def figure(report: Report, name: str, setting: str, value, unit: str = "", note: str = "") -> None:
  """Writes one figure with its goal; a `value` of None says in `note` why there is none."""
  goal = report.goals.get(name)
  met = None if goal is None or value is None else gpu_rows.meets(value, goal)
  gpu_rows.write(
    report.path, "figure", part=report.part, figure=name, setting=setting, value=value, unit=unit,
    note=note, goal=goal, met=met,
  )  # fmt: skip


def benchmark(report: Report, name: str, setting: str, call: Callable | None = None, **given):
  """Runs a benchmark of `launch.benchmark`, writes its rows, and returns them by variant."""
  if "peers" in options.DEFAULTS[name]:
    given["peers"] = has_torch()
  resolved = options.resolve(name, given)
  if call is None:
    rows = run.run(resolved)
  else:
    chosen = resolved[name]
    rows = call(chosen, run.load_peers() if chosen.peers else None)
  for row in rows:
    gpu_rows.write(report.path, "timing", part=report.part, setting=setting, row=row)
  return {row["variant"]: row for row in rows}


def over(rows: dict[str, dict], name: str, other: str) -> tuple[float | None, str]:
  """(seconds of `name` over those of `other`, ""), or (None, why there is no such figure)."""
  for wanted in (name, other):
    if wanted not in rows:
      return None, NO_TORCH
    if rows[wanted]["status"] != "ok":
      return None, f"skipped: {rows[wanted]['reason']}"
  return rows[name]["seconds_median"] / rows[other]["seconds_median"], ""


def device(report: Report, copy_mib, matrix: int) -> None:
  """Bandwidth of y = x + 1 at several sizes, and rates of a matrix product."""
  for mib in copy_mib:
    each = mib << 20
    arrays = [jnp.full(each // 4, float(n)) for n in range(timing.num_inputs(each))]
    variant = timing.copy_variant(arrays)
    rate = _rate(variant, variant.work.bytes_at_least)
    figure(report, "copy bandwidth", f"{mib} MiB", rate / 1e9, "GB/s")
    del arrays, variant
  for kind in ("bfloat16", "tf32", "float32"):
    figure(report, "matrix rate", f"{kind} {matrix}^3", matrix_rate(kind, matrix) / 1e12, "TFLOP/s")
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  figure(report, "memory that XLA may take", "", limit and limit / 1e9, "GB",
         "" if limit else "not told on this device")  # fmt: skip


def matrix_rate(kind: str, size: int) -> float:
  """Operations a second of a product of random matrices; "tf32" is float32 at JAX's default."""
  dtype = "bfloat16" if kind == "bfloat16" else "float32"
  precision = jax.lax.Precision.HIGHEST if kind == "float32" else jax.lax.Precision.DEFAULT
  left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
  product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
  work = timing.Work(images=0, pairs=0, pixels=0, bytes_at_least=3 * left.nbytes)
  return _rate(timing.jax_variant(kind, work, product, [(left, right)]), 2 * size**3)


def _rate(variant: timing.Variant, amount: float) -> float:
  """`amount` of a call over its median seconds."""
  seconds, _ = timing.sample([variant], repeats=options.MIN_REPEATS)
  return amount / float(jnp.median(jnp.asarray(seconds)))


def loss(report: Report, cases) -> None:
  """Value and gradient beside PyTorch and naive JAX; share of copy bandwidth; kernels."""
  from rndpo_jax.benchmark import loss as benchmark_of_loss

  chosen = {}
  for shape, classes, dtype, pairs in cases:
    setting = f"{dtype}{[*shape, classes]}, {pairs} pair{'s' if pairs > 1 else ''}"
    given = {"shape": shape, "classes": classes, "dtype": dtype, "pairs": pairs, "sizes": ()}
    rows = benchmark(report, "loss", setting, **given)
    ours = rows[benchmark_of_loss.OURS]
    figure(report, "share of copy bandwidth", setting, ours["fraction_of_copy_bandwidth"])
    for name, other in (
      ("torch.compile, log-softmax", COMPILED), ("torch.compile, cancelled", COMPILED_CANCELLED),
      ("eager PyTorch, log-softmax", EAGER), ("naive JAX", "JAX, log-softmax and gather"),
    ):  # fmt: skip
      value, note = over(rows, other, benchmark_of_loss.OURS)
      figure(report, f"times as fast as {name}", setting, value, "x", note)
    chosen[setting] = options.resolve("loss", given)["loss"]
  for setting, of_case in chosen.items():
    _look_into(report, setting, of_case)


def _look_into(report: Report, setting: str, chosen: options.Options) -> None:
  """Kernels of the compiled text, which is kept beside the report, and the time they take."""
  from rndpo_jax.benchmark import gpu_profile
  from rndpo_jax.benchmark import loss as benchmark_of_loss
  from rndpo_jax.planning import hlo

  inputs = benchmark_of_loss.make_inputs(jax.random.key(0), chosen)
  function = benchmark_of_loss.VARIANTS[benchmark_of_loss.OURS]
  compiled = timing.compile_ahead(function, *inputs[0])
  text = compiled.call.as_text()
  with report.path.with_name("loss_programs.txt").open("a") as file:
    file.write(f"// {setting}\n{text}\n")
  figure(report, "kernels", setting, hlo.kernels(text), note="of the compiled text")
  work = benchmark_of_loss.work_of(chosen)
  copy = timing.copy_variant([logits for logits, *_ in inputs])
  ours = timing.compiled_variant(
    "ours", work, compiled, lambda turn: compiled.call(*inputs[turn % len(inputs)])
  )
  seen = [gpu_profile.kernels_of(variant) for variant in (copy, ours)]
  if None in seen:
    for name in ("kernels' own time", "share of copy bandwidth, kernels' own time"):
      figure(report, name, setting, None, note=NO_KERNELS)
    return
  (copy_seconds, _), (seconds, count) = seen
  share = work.bytes_at_least / seconds * copy_seconds / copy.work.bytes_at_least
  figure(report, "kernels' own time", setting, 1e3 * seconds, "ms", f"{count:g} of them a call")
  figure(report, "share of copy bandwidth, kernels' own time", setting, share)


def step(report: Report, shape, width, depth, dtype, matrix: int) -> None:
  """RN-DPO over supervised, both beside PyTorch; memory; share of the matrix rate."""
  from rndpo_jax.benchmark import step as benchmark_of_step

  setting = f"{dtype}{[*shape, 1]}, width {width}"
  rows = benchmark(
    report, "step", setting,
    lambda chosen, peers: benchmark_of_step.run(chosen, peers, online=False),
    shape=shape, width=width, depth=depth, dtype=dtype, pairs=4,
  )  # fmt: skip
  supervised = benchmark_of_step.SUPERVISED
  ours = {pairs: benchmark_of_step.cached_name(pairs) for pairs in (1, 4)}
  for pairs, name in ours.items():
    noun = f"{pairs} pair{'s' if pairs > 1 else ''}"
    figure(
      report, f"RN-DPO, {noun}, over supervised", setting, over(rows, name, supervised)[0], "x"
    )
  for name, ours_name, other in (
    ("supervised over PyTorch compiled", supervised, "PyTorch compiled, supervised"),
    ("supervised over PyTorch eager", supervised, "PyTorch eager, supervised"),
    ("RN-DPO, 4 pairs, over PyTorch compiled", ours[4], "PyTorch compiled, RN-DPO, 4 pairs"),
  ):
    value, note = over(rows, ours_name, other)
    figure(report, name, setting, value, "x", note)
  kind = "bfloat16" if dtype == "bfloat16" else "tf32"
  rate = matrix_rate(kind, matrix)
  for name in (supervised, *ours.values()):
    row = rows[name]
    share = row["flops"] / row["seconds_median"] / rate
    note = f"{row['flops'] / 1e12:.3g} TFLOP a step; {kind} {rate / 1e12:.4g} TFLOP/s"
    figure(report, "share of the matrix rate", f"{setting}: {name}", share, note=note)
  for name, row in rows.items():
    if name != timing.COPY and row["status"] == "ok" and row["peak_memory_bytes"]:
      figure(report, "peak memory", f"{setting}: {name}", row["peak_memory_bytes"] / 1e9, "GB",
             row["peak_memory_source"])  # fmt: skip


def mine(report: Report, shape, width, depth, dtype) -> None:
  """K proposals of one encoder pass over K forward passes, and over PyTorch's."""
  from rndpo_jax.benchmark import mine as benchmark_of_mine

  setting = f"{dtype}{[*shape, 1]}, width {width}"
  rows = benchmark(report, "mine", setting, shape=shape, width=width, depth=depth, dtype=dtype)
  sampling = f"sampling, {benchmark_of_mine.DROPOUT_MIX}"
  for name, other in (
    ("8 forward passes", benchmark_of_mine.FULL),
    ("PyTorch compiled", f"PyTorch compiled, {benchmark_of_mine.FULL}"),
    ("PyTorch eager", f"PyTorch eager, {benchmark_of_mine.FULL}"),
  ):
    value, note = over(rows, sampling, other)
    figure(report, f"sampling over {name}", setting, value, "x", note)
  for name, row in rows.items():
    if row["status"] == "ok" and row["images_per_second"]:
      figure(report, "images a second", f"{setting}: {name}", row["images_per_second"], "images/s")


def population(report: Report, shape, width, depth, members, seeds) -> None:
  """Steps of a population as one program, over those one after another."""
  from rndpo_jax.benchmark import population as benchmark_of_population

  setting = f"{members} members, {[*shape, 1]}, width {width}"
  rows = benchmark(
    report, "population", setting, shape=shape, width=width, depth=depth, members=members,
    seeds=seeds,
  )  # fmt: skip
  for form, name in benchmark_of_population.TOGETHER.items():
    value, note = over(rows, benchmark_of_population.APART, name)
    figure(report, f"times as fast as one after another, {form}", setting, value, "x", note)


def feed(report: Report, shape, width, depth, dtype, workers) -> None:
  """Steps a second with batches as they are read, of those with a batch on the device."""
  from rndpo_jax.benchmark import input as benchmark_of_input

  for count in workers:
    setting = f"{dtype}{[*shape, 1]}, width {width}, {count} worker processes"
    rows = benchmark(
      report, "input", setting, shape=shape, width=width, depth=depth, dtype=dtype, workers=count
    )
    value, note = over(rows, benchmark_of_input.RESIDENT, benchmark_of_input.READ)
    figure(report, "steps with real input, of those without", setting, value, "", note)
    rate = 1 / rows[benchmark_of_input.READ]["seconds_median"]
    figure(report, "steps with real input", setting, rate, "steps/s")
    figure(report, "images with real input", setting, rate * shape[0], "images/s")


if __name__ == "__main__":
  main()
