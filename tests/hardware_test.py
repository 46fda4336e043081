"""Rooflines and all-reduce times, by hand."""

import pytest

from rndpo_jax import hardware, program_report

CHIP = hardware.Chip(
  memory=1e9,
  memory_bandwidth=100.0,
  peak_flops=1000.0,
  link_bandwidth=10.0,
  torus_from=4,
  slices={1: "1x1", 4: "2x2", 16: "4x4"},
)
HOP = hardware.SECONDS_PER_HOP


def test_the_slower_of_compute_and_bandwidth_sets_the_time():
  assert hardware.step_seconds(CHIP, 2000.0, 100.0) == (2.0, "compute")
  assert hardware.step_seconds(CHIP, 2000.0, 300.0) == (3.0, "bandwidth")


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
  assert hardware.all_reduce_seconds(CHIP, topology, num_bytes, count) == pytest.approx(
    expected, rel=1e-12
  )


def test_weak_scaling_is_the_share_of_the_step_that_is_not_communication():
  found = hardware.weak_scaling(CHIP, 12.0, 80.0, 0)
  assert found == pytest.approx({1: 1.0, 4: 0.5, 16: 12.0 / 19.5}, rel=1e-12)


def test_slices_have_the_chips_they_are_named_for():
  for chip in hardware.CHIPS.values():
    assert set(chip.slices) == {8, 64, 256}
    for count, topology in chip.slices.items():
      product = 1
      for axis in topology.split("x"):
        product *= int(axis)
      assert product == count


def test_mining_many_images_takes_whole_batches_of_all_chips():
  # 100 bytes take a second for 8 images on each of 4 chips; 65 images are three batches of 32.
  report = program_report.Report(0, 500.0, 0, 100.0, 0, [], [])
  line = program_report.describe_mining(report, CHIP, 8, 4, 65)
  assert "65 images: at least 3.0 s on 4 chips, reading 32 images/s" in line
