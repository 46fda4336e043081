"""Timing of variants side by side, and what a row of results holds.

Method: every variant is compiled and run before the clock starts; then, round by round, each
takes one sample, in an order drawn again every round, so that heat, clocks and other programs
meet all of them alike. A sample is one call, or several in a row where the device queues them
(as many as fill SAMPLE_SECONDS), and ends when the outputs are there. Each call gets the next of
many inputs, more than a cache holds. The figure is the median of the samples; its spread is their
quartiles.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Inputs of a rotation add up to this, more than the last-level cache of a server.
ROTATED_BYTES = 1 << 30
MAX_INPUTS = 256
WARM_UP_CALLS = 3
# Before each sample, so that worker threads of the variant before, which spin for some
# milliseconds in wait of more, do not compete with this one's.
PAUSE_SECONDS = 0.01
# A sample on an accelerator is to take so long, by at most so many calls.
SAMPLE_SECONDS = 0.05
MAX_CALLS = 100
COPY = "limit: copy, y = x + 1"


class Work(NamedTuple):
  """What one call does.

  Attributes:
    images: images gone through.
    pairs: preference pairs, 0 if there are none.
    pixels: pixels or voxels of those images, each counted once.
    bytes_at_least: bytes that any program for it must move to and from memory.
  """

  images: int
  pairs: int
  pixels: int
  bytes_at_least: int


class Variant(NamedTuple):
  """One way to do the work.

  Attributes:
    name: in tables.
    framework: "jax" or "torch".
    work: of a call.
    run: (turn) -> outputs, perhaps before they are computed; the turn picks the input.
    wait: (outputs) -> None, when they are there.
    compile_seconds: tracing and compiling, None if nothing is compiled.
    peak_bytes: memory of one call, inputs and outputs among it, on one device; None if unknown.
    peak_source: what told `peak_bytes`.
    flops: floating-point operations of a call on all devices, None if nobody counts them.
    settle: called before each sample, not timed.
  """

  name: str
  framework: str
  work: Work
  run: Callable[[int], Any]
  wait: Callable[[Any], Any]
  compile_seconds: float | None = None
  peak_bytes: int | None = None
  peak_source: str | None = None
  flops: float | None = None
  settle: Callable[[], None] = lambda: None


class Missing(NamedTuple):
  """A variant that cannot run here, and why."""

  name: str
  framework: str
  reason: str


def num_inputs(bytes_each: int) -> int:
  """Inputs to rotate through: as many as exceed the caches together, at least 2."""
  return int(np.clip(-(-ROTATED_BYTES // bytes_each), 2, MAX_INPUTS))


class Compiled(NamedTuple):
  """A program compiled ahead of time.

  Attributes:
    call: the program.
    seconds: of tracing and compiling.
    peak_bytes: arguments, outputs and temporaries on one device; a donated argument and the output
      in its place count once.
    flops: by XLA's count of the program as it was traced, so that it is the same on every device.
      Of a loop the body counts once.
  """

  call: Callable
  seconds: float
  peak_bytes: int
  flops: float | None


def compile_ahead(function: Callable, *args) -> Compiled:
  """Compiles a function, jitted or not, for `args`."""
  jitted = function if hasattr(function, "lower") else jax.jit(function)
  start = time.perf_counter()
  lowered = jitted.lower(*args)
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  used = compiled.memory_analysis()
  peak = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
  flops = (lowered.cost_analysis() or {}).get("flops")
  return Compiled(compiled, seconds, int(peak - used.alias_size_in_bytes), flops)


def compiled_variant(
  name: str, work: Work, compiled: Compiled, run: Callable[[int], Any], calls: int = 1
) -> Variant:
  """A variant whose `run` calls `compiled` so many times."""
  return Variant(
    name=name,
    framework="jax",
    work=work,
    run=run,
    wait=jax.block_until_ready,
    compile_seconds=compiled.seconds,
    peak_bytes=compiled.peak_bytes,
    peak_source="compiled.memory_analysis",
    flops=compiled.flops and calls * compiled.flops,
  )


def jax_variant(name: str, work: Work, function: Callable, inputs: Sequence[tuple]) -> Variant:
  """A variant that calls `function(*inputs[turn])`, compiled ahead of time.

  Args:
    name: in tables.
    work: of a call.
    function: pure, or already jitted.
    inputs: tuples of arrays on the device, all of the same shapes.
  """
  compiled = compile_ahead(function, *inputs[0])
  return compiled_variant(
    name, work, compiled, lambda turn: compiled.call(*inputs[turn % len(inputs)])
  )


def copy_variant(arrays: Sequence[jax.Array]) -> Variant:
  """The limit: y = x + 1, which reads and writes every byte of `arrays[turn]` once."""
  array = arrays[0]
  work = Work(images=0, pairs=0, pixels=0, bytes_at_least=2 * array.nbytes)
  return jax_variant(COPY, work, lambda x: x + 1, [(array,) for array in arrays])


def calls_per_sample(seconds: float) -> int:
  """Calls in a row that share a sample, of a variant whose call takes about `seconds`.

  An accelerator takes calls into a queue, and waiting for each would time the way to it as well
  as the work; the CPU does each call at once.
  """
  if jax.default_backend() == "cpu":
    return 1
  return int(np.clip(round(SAMPLE_SECONDS / max(seconds, 1e-9)), 1, MAX_CALLS))


def interleaved(count: int, repeats: int, seed: int = 0) -> np.ndarray:
  """i64[repeats, count]: in each row every variant once, in an order of the row's own."""
  rng = np.random.default_rng(seed)
  return rng.permuted(np.tile(np.arange(count), (repeats, 1)), axis=1)


def sample(
  variants: Sequence[Variant], *, repeats: int, calls: int | None = None
) -> tuple[np.ndarray, list[int]]:
  """Seconds of one call, f64[variants, repeats], and the calls that made a sample of each.

  Args:
    variants: at least one.
    repeats: samples of each.
    calls: calls in a row that make a sample; None: `calls_per_sample` of each variant's own time.
  """
  turn, counts = 0, []
  seconds = np.zeros((len(variants), repeats))
  for variant in variants:
    for _ in range(WARM_UP_CALLS):
      start = time.perf_counter()
      variant.wait(variant.run(turn))
      turn += 1
    counts.append(calls or calls_per_sample(time.perf_counter() - start))
  collecting = gc.isenabled()
  gc.collect()
  gc.disable()  # a collection would fall upon whichever variant is being timed
  try:
    for repeat, order in enumerate(interleaved(len(variants), repeats)):
      for place in order:
        variant, count = variants[place], counts[place]
        time.sleep(PAUSE_SECONDS)
        variant.settle()
        variant.wait(variant.run(turn))  # wakes the variant's threads, as a training loop has them
        turn += 1
        start = time.perf_counter()
        for _ in range(count):
          outputs = variant.run(turn)
          turn += 1
        variant.wait(outputs)
        seconds[place, repeat] = (time.perf_counter() - start) / count
        del outputs
  finally:
    if collecting:
      gc.enable()
  return seconds, counts


def rows(
  variants: Sequence[Variant | Missing],
  *,
  baseline: str,
  repeats: int,
  setup: dict,
  calls: int | None = None,
) -> list[dict[str, Any]]:
  """Times the variants together and returns one row of results each.

  Args:
    variants: among them one from `copy_variant` and one named `baseline`.
    baseline: the variant whose time the others' is divided by.
    repeats: samples of each.
    setup: entries that every row repeats, such as the shape.
    calls: as in `sample`.
  """
  present = [variant for variant in variants if isinstance(variant, Variant)]
  taken, counts = sample(present, repeats=repeats, calls=calls)
  medians = {v.name: float(np.median(t)) for v, t in zip(present, taken, strict=True)}
  copy = next(variant for variant in present if variant.name == COPY)
  limit = copy.work.bytes_at_least / medians[COPY]
  table = []
  for variant in variants:
    row = {**setup, "variant": variant.name, "framework": variant.framework}
    if isinstance(variant, Missing):
      table.append({**row, "status": "not available", "reason": variant.reason})
      continue
    times, count = taken[present.index(variant)], counts[present.index(variant)]
    table.append(
      {
        **row,
        "status": "ok",
        **_speeds(variant.work, medians[variant.name], limit),
        "baseline": baseline,
        "time_over_baseline": medians[variant.name] / medians[baseline],
        "seconds_p25": float(np.quantile(times, 0.25)),
        "seconds_p75": float(np.quantile(times, 0.75)),
        "seconds_min": float(times.min()),
        "samples": repeats,
        "calls_per_sample": count,
        "compile_seconds": variant.compile_seconds,
        "peak_memory_bytes": variant.peak_bytes,
        "peak_memory_source": variant.peak_source,
        "flops": variant.flops,
      }
    )
  return table


def _speeds(work: Work, seconds: float, limit: float) -> dict[str, Any]:
  """Median, and rates that follow from it; None for what the work does not have."""

  def rate(amount):
    return amount / seconds if amount else None

  bandwidth = work.bytes_at_least / seconds
  return {
    "seconds_median": seconds,
    "images_per_second": rate(work.images),
    "pairs_per_second": rate(work.pairs),
    "megapixels_per_second": rate(work.pixels / 1e6),
    "pixels": work.pixels,
    "bytes_at_least": work.bytes_at_least,
    "bandwidth_bytes_per_second": bandwidth,
    "copy_bandwidth_bytes_per_second": limit,
    "fraction_of_copy_bandwidth": bandwidth / limit,
  }
