"""Costs by hand."""

import pytest

from rndpo_jax.planning import cost


@pytest.mark.parametrize(
  "num_images, num_shards, num_processes, batch_size, expected",
  [
    (100, 4, 1, 25, 4),  # four shards of 25, a batch each
    (101, 4, 1, 25, 5),  # the first holds 26: two batches
    (101, 4, 2, 25, 3),  # process 0 has shards 0 and 2: 2 + 1
    (100, 4, 8, 25, 1),  # more processes than shards: no faster than one a shard
    (3, 4, 1, 16, 3),  # an empty shard costs nothing
  ],
)
def test_batches_of_the_busiest_process(
  num_images, num_shards, num_processes, batch_size, expected
):
  assert cost.mining_batches(num_images, num_shards, num_processes, batch_size) == expected


@pytest.mark.parametrize(
  "num_files, num_processes, expected",
  [
    (1, 4, 20.0),  # one file has one writer
    (4, 1, 20.0),
    (4, 2, 10.0),
    (4, 3, 10.0),  # process 0 writes files 0 and 3
    (4, 8, 5.0),
  ],
)
def test_seconds_of_the_process_that_prepares_the_most(num_files, num_processes, expected):
  assert cost.preparing_seconds(100, 0.2, num_files, num_processes) == pytest.approx(expected)


def test_seconds_add_up_on_shared_cores_and_else_the_slowest_counts():
  assert cost.mining_seconds(10, 0.5, 2.0, 0.25, shared=False) == 20.0
  assert cost.mining_seconds(10, 0.5, 2.0, 0.25, shared=True) == 27.5


def test_checkpoints_that_are_kept():
  # Steps 50, 100, 120; two states of 300 bytes.
  assert cost.checkpoint_bytes(100, 300, 120, 50, 2, best=False) == 3 * 100 + 2 * 300
  assert cost.checkpoint_bytes(100, 300, 120, 50, 5, best=False) == 3 * 100 + 3 * 300
  assert cost.checkpoint_bytes(100, 300, 120, 50, 2, best=True) == 2 * 100 + 2 * 300
  assert cost.checkpoint_bytes(100, 300, 40, 50, 2, best=True) == 100 + 300


@pytest.mark.parametrize(
  "count, expected",
  [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.56e12, "2.6 TB"), (4e15, "4000.0 TB")],
)
def test_bytes_in_words(count, expected):
  assert cost.show_bytes(count) == expected


@pytest.mark.parametrize(
  "seconds, expected", [(0.25, "0.2 s"), (90, "1.5 min"), (5400, "1.5 h"), (864000, "10.0 days")]
)
def test_seconds_in_words(seconds, expected):
  assert cost.show_seconds(seconds) == expected
