"""Figures of TPU chips, and what they allow: roofline and all-reduce times."""

from __future__ import annotations

import math
from typing import NamedTuple


class Chip(NamedTuple):
  """One chip.

  Attributes:
    memory: bytes of HBM that the compiler lets a program have.
    memory_bandwidth: bytes a second.
    peak_flops: bfloat16 multiply and add operations a second.
    link_bandwidth: bytes a second of one interconnect link in one direction.
    torus_from: chips along an axis from which on its ends are linked, so that it is a ring.
    slices: number of chips -> topology, for the scaling table.
  """

  memory: float
  memory_bandwidth: float
  peak_flops: float
  link_bandwidth: float
  torus_from: int
  slices: dict[int, str]


# Source: Google Cloud's pages "TPU v5e", "TPU v6e" and "TPU v5p" (cloud.google.com/tpu/docs/v5e,
# v6e, v5p), key specifications. They give interconnect bandwidth a chip, all ports and both
# directions together: 400, 800 and 1200 GB/s over 4, 4 and 6 ports. Memory is not the pages' 16, 32
# and 95 GiB, but what libtpu 0.0.42.1 names in its error for a program that is too large:
# "exceeds available HBM (15.75G)"; a test provokes that.
_FLAT = {8: "2x4", 64: "8x8", 256: "16x16"}
_CUBE = {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"}
CHIPS = {
  "v5e": Chip(15.75 * 2**30, 819e9, 197e12, 400e9 / 4 / 2, 16, _FLAT),
  "v6e": Chip(31.25 * 2**30, 1638e9, 918e12, 800e9 / 4 / 2, 16, _FLAT),
  "v5p": Chip(95.74 * 2**30, 2765e9, 459e12, 1200e9 / 6 / 2, 4, _CUBE),
}

# Assumed time for a message to the next chip, a round figure for a torus of direct links.
SECONDS_PER_HOP = 1e-6


def step_seconds(chip: Chip, flops: float, memory_bytes: float) -> tuple[float, str]:
  """The roofline: the least time of a program, and whether "compute" or "bandwidth" sets it."""
  compute, bandwidth = flops / chip.peak_flops, memory_bytes / chip.memory_bandwidth
  return max(compute, bandwidth), "compute" if compute > bandwidth else "bandwidth"


def all_reduce_seconds(chip: Chip, topology: str, num_bytes: float, count: int) -> float:
  """Time of `count` all-reduces of `num_bytes` in all, over every chip of a slice.

  A reduce-scatter and an all-gather each move (n - 1) / n of the bytes through a chip. Pessimistic:
  one axis at a time is in use, by its two links if it is a ring and by one if it is a line;
  each all-reduce waits for a message to go along every axis, forth and back.

  Args:
    chip: of `CHIPS`.
    topology: chips along each axis, as in "4x4".
    num_bytes: of the reduced arrays, together.
    count: how many all-reduces they are split over.
  """
  axes = [int(n) for n in topology.split("x")]
  chips = math.prod(axes)
  if chips == 1:
    return 0.0
  rings = [n >= chip.torus_from for n in axes]
  bandwidth = chip.link_bandwidth * (2 if all(rings) else 1)
  hops = sum(n // 2 if ring else n - 1 for n, ring in zip(axes, rings, strict=True))
  return 2 * num_bytes * (chips - 1) / chips / bandwidth + count * 2 * hops * SECONDS_PER_HOP


def weak_scaling(chip: Chip, seconds: float, num_bytes: float, count: int) -> dict[int, float]:
  """Chips -> efficiency of a step with the same batch on every chip, nothing overlapped.

  efficiency = seconds / (seconds + all-reduce). `seconds` is the roofline, the least that a step
  takes, so that a real step hides more.
  """
  return {
    chips: seconds / (seconds + all_reduce_seconds(chip, topology, num_bytes, count))
    for chips, topology in chip.slices.items()
  }
