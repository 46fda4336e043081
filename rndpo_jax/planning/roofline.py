"""A compiled TPU program against the figures of its chip, as lines of text."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from rndpo_jax.planning import chips, cost, hlo


class Report(NamedTuple):
  """One compiled program, on each device.

  Attributes:
    memory: bytes of arguments, results, temporaries and code.
    flops: operations, by XLA's count. Of a loop inside the program its body counts once: of
      evaluation the network counts whole, but bringing masks to their own grids for one image.
    bytes_accessed: by XLA's count likewise, in which traffic inside the vector memory stands too.
    hbm_bytes: by `hlo.hbm_bytes`.
    cycles: the compiler's own estimate, by `hlo.cycles`.
    collectives: (kind, bytes) of each.
    largest: (instruction, HBM bytes) of those that move a hundredth of `hbm_bytes` or more.
  """

  memory: float
  flops: float
  bytes_accessed: float
  hbm_bytes: float
  cycles: float
  collectives: list[tuple[str, float]]
  largest: list[tuple[str, float]]


def measure(compiled, accumulate_steps: int = 1) -> Report:
  """Reads a compiled program's costs, memory and text.

  Args:
    compiled: the program.
    accumulate_steps: how often the loop runs that holds all but the optimiser of a training step.
      XLA counts operations and accessed bytes of a loop's body once.
  """
  costs, text = compiled.cost_analysis(), compiled.as_text()
  hbm_bytes = hlo.hbm_bytes(text)
  return Report(
    memory=memory(compiled),
    flops=accumulate_steps * costs["flops"],
    bytes_accessed=accumulate_steps * costs["bytes accessed"],
    hbm_bytes=hbm_bytes,
    cycles=hlo.cycles(text),
    collectives=hlo.collectives(text),
    largest=hlo.largest(text, hbm_bytes / 100),
  )


def memory(compiled) -> int:
  """Bytes of arguments, results, temporaries and code on each device."""
  found = compiled.memory_analysis()
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
    + found.generated_code_size_in_bytes
  )


def describe(name: str, report: Report, chip: chips.Chip, batch_per_device: float) -> str:
  """One line for a program: memory, operations, bytes, roofline, collectives."""
  seconds, bound = chips.step_seconds(chip, report.flops, report.hbm_bytes)
  return (
    f"{name:9} memory {report.memory / 2**30:.2f} of {chip.memory / 2**30:.2f} GiB, "
    f"{report.flops / 1e9:.1f} GFLOP, {report.bytes_accessed / 1e9:.2f} GB accessed "
    f"({report.hbm_bytes / 1e9:.2f} in HBM), at least {seconds * 1e3:.2f} ms ({bound}), "
    f"{report.cycles / 1e6:.1f} Mcycles estimated, "
    f"at most {batch_per_device / seconds:.0f} images/s a chip; {_collectives(report)}"
  )


def describe_mining(
  report: Report, chip: chips.Chip, images: int, num_chips: int, num_unlabelled: int
) -> str:
  """One line: the least time to mine so many images on a slice, and what must be read for it."""
  seconds, _ = chips.step_seconds(chip, report.flops, report.hbm_bytes)
  batches = -(-num_unlabelled // (images * num_chips))
  return (
    f"          {num_unlabelled:,} images: at least {cost.show_seconds(batches * seconds)} on "
    f"{num_chips} chips, reading {images * num_chips / seconds:,.0f} images/s"
  )


def describe_scaling(report: Report, chip: chips.Chip) -> str:
  """One line: efficiency by number of chips, from the all-reduces of a step.

  None is told of a step that communicates in other ways too, whose time is not known here.
  """
  others = sorted({kind for kind, _ in report.collectives} - {"all-reduce"})
  if others:
    return (
      f"          weak scaling: not told, for the step also has {', '.join(others)}, and the time "
      "of all-reduces alone is known"
    )
  seconds, _ = chips.step_seconds(chip, report.flops, report.hbm_bytes)
  reduced = [size for _, size in report.collectives]
  efficiencies = chips.weak_scaling(chip, seconds, sum(reduced), len(reduced))
  return "          weak scaling, nothing overlapped: " + ", ".join(
    f"{value:.3f} at {count} chips" for count, value in efficiencies.items()
  )


def describe_loss(name: str, report: Report, minimum: int) -> list[str]:
  """The loss alone: bytes over the minimum by both counts, and the instructions that move them."""
  lines = [
    f"loss {name}: {report.bytes_accessed / 1e6:.1f} MB accessed, {report.hbm_bytes / 1e6:.1f} MB "
    f"in HBM; minimum {minimum / 1e6:.1f} MB; ratio {report.bytes_accessed / minimum:.3f}, in HBM "
    f"{report.hbm_bytes / minimum:.3f}"
  ]
  return lines + [f"  {size / 1e6:8.1f} MB  {instruction}" for instruction, size in report.largest]


def _collectives(report: Report) -> str:
  if not report.collectives:
    return "no collectives"
  counts, sizes = Counter(), Counter()
  for kind, size in report.collectives:
    counts[kind] += 1
    sizes[kind] += size
  return ", ".join(
    f"{counts[kind]} {kind} of {sizes[kind] / 1e6:.3f} MB" for kind in sorted(counts)
  )
