"""Chips' figures, rooflines and all-reduce times, by hand; what is told of a program."""

from types import SimpleNamespace

import pytest

from rndpo_jax.planning import chips, roofline

CHIP = chips.Chip(
  memory=1e9,
  memory_bandwidth=100.0,
  peak_flops=1000.0,
  link_bandwidth=10.0,
  torus_from=4,
  slices={1: "1x1", 4: "2x2", 16: "4x4"},
)
HOP = 1e-6
REPORT = roofline.Report(0, 500.0, 0, 100.0, 0, [], [])  # a second on CHIP
GIB = 2**30


@pytest.mark.parametrize(
  "name,figures",
  [
    ("v5e", (15.75 * GIB, 819e9, 197e12, 50e9, 16, {8: "2x4", 64: "8x8", 256: "16x16"})),
    ("v6e", (31.25 * GIB, 1638e9, 918e12, 100e9, 16, {8: "2x4", 64: "8x8", 256: "16x16"})),
    ("v5p", (95.74 * GIB, 2765e9, 459e12, 100e9, 4, {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"})),
  ],
)
def test_figures_are_the_vendors(name, figures):
  assert tuple(chips.CHIPS[name]) == figures
  assert len(chips.CHIPS) == 3


def test_the_slower_of_compute_and_bandwidth_sets_the_time():
  assert chips.step_seconds(CHIP, 2000.0, 100.0) == (2.0, "compute")
  assert chips.step_seconds(CHIP, 2000.0, 300.0) == (3.0, "bandwidth")


@pytest.mark.parametrize(
  "topology,num_bytes,count,expected",
  [
    ("1x1", 80.0, 3, 0.0),
    # Lines: 2 * 80 * 3/4 bytes over one link; one hop along each axis, forth and back.
    ("2x2", 80.0, 3, 12.0 + 3 * 2 * 2 * HOP),
    # Rings: 2 * 80 * 15/16 bytes over two links; half way round each axis.
    ("4x4", 80.0, 1, 7.5 + 2 * 4 * HOP),
  ],
)
def test_all_reduce(topology, num_bytes, count, expected):
  assert chips.all_reduce_seconds(CHIP, topology, num_bytes, count) == pytest.approx(
    expected, rel=1e-12
  )


def test_weak_scaling_is_the_share_of_the_step_that_is_not_communication():
  found = chips.weak_scaling(CHIP, 12.0, 80.0, 0)
  assert found == pytest.approx({1: 1.0, 4: 0.5, 16: 12.0 / 19.5}, rel=1e-12)


def test_mining_many_images_takes_whole_batches_of_all_chips():
  # 100 bytes take a second for 8 images on each of 4 chips; 65 images are three batches of 32.
  line = roofline.describe_mining(REPORT, CHIP, 8, 4, 65)
  assert "65 images: at least 3.0 s on 4 chips, reading 32 images/s" in line


def test_description_of_a_program_and_its_chip():
  chip = CHIP._replace(memory=15.75 * GIB, memory_bandwidth=1e12, peak_flops=1e12)
  exchanged = [("all-reduce", 1e6), ("send", 3e3), ("all-reduce", 2e6)]
  report = roofline.Report(0.5 * GIB, 5e9, 3e9, 2e9, 2e6, exchanged, [])
  assert roofline.describe("base", report, chip, 8) == (
    "base      memory 0.50 of 15.75 GiB, 5.0 GFLOP, 3.00 GB accessed (2.00 in HBM), at least "
    "5.00 ms (compute), 2.0 Mcycles estimated, at most 1600 images/s a chip; "
    "2 all-reduce of 3.000 MB, 1 send of 0.003 MB"
  )


def test_scaling_is_given_only_for_steps_with_all_reduces_alone():
  report = REPORT._replace(hbm_bytes=1200.0, collectives=[("all-reduce", 50.0), ("all-reduce", 30)])
  line = roofline.describe_scaling(report, CHIP)
  assert line.endswith("nothing overlapped: 1.000 at 1 chips, 0.500 at 4 chips, 0.615 at 16 chips")
  many = REPORT._replace(flops=8e-3, hbm_bytes=0.0, collectives=[("all-reduce", 0.0)] * 2)
  assert "0.500 at 4 chips" in roofline.describe_scaling(many, CHIP)  # two, of 4 hops each
  more = [*report.collectives, ("all-gather", 1.0), ("collective-permute", 1.0)]
  line = roofline.describe_scaling(report._replace(collectives=more), CHIP)
  assert "not told" in line and "all-gather, collective-permute" in line
  assert " at 4 chips" not in line


class Compiled:
  """What is read of a compiled program."""

  def cost_analysis(self):
    return {"flops": 7.0, "bytes accessed": 11.0}

  def memory_analysis(self):
    return SimpleNamespace(
      argument_size_in_bytes=100, output_size_in_bytes=80, alias_size_in_bytes=60,
      temp_size_in_bytes=5, generated_code_size_in_bytes=3,
    )  # fmt: skip

  def as_text(self):
    array = "f32[8,128]{1,0:T(8,128)}"
    return f"""ENTRY %main (a: f32[8,128]) -> f32[8,128] {{
  %a = {array} parameter(0)
  ROOT %sum = {array} all-reduce(%a), replica_groups={{}}, \
backend_config={{"estimated_cycles":"9"}}
}}"""


def test_xlas_counts_are_multiplied_by_micro_batches_and_our_own_are_not():
  plane = 8 * 128 * 4
  assert roofline.measure(Compiled(), 4) == roofline.Report(
    memory=100 + 80 - 60 + 5 + 3,
    flops=28.0,
    bytes_accessed=44.0,
    hbm_bytes=2 * plane,
    cycles=9.0,
    collectives=[("all-reduce", plane)],
    largest=[("all-reduce sum", 2 * plane)],
  )
