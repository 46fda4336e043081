"""What a run will cost: batches, seconds and bytes, as arithmetic on a few numbers."""

from __future__ import annotations

import math
from typing import NamedTuple


class Storage(NamedTuple):
  """Bytes that a run leaves in its work directory, by folder.

  Attributes:
    data: images and masks as they are stored, before compression.
    unpacked: large ones of the native mode once more, as they are read; 0 in the simple mode.
    base: parameters and states of every member's training.
    pairs: mined records, before compression.
    finetune: parameters and states.
  """

  data: int
  unpacked: int
  base: int
  pairs: int
  finetune: int


def preparing_seconds(
  num_records: int, record_seconds: float, num_files: int, num_processes: int
) -> float:
  """Seconds of the process that prepares the most: file i is of process i mod N, all equally large.

  Args:
    num_records: of the source.
    record_seconds: to read, check and write one.
    num_files: that the records are written to.
    num_processes: N.
  """
  return num_records * record_seconds * -(-num_files // num_processes) / num_files


def mining_batches(num_images: int, num_shards: int, num_processes: int, batch_size: int) -> int:
  """Batches that the busiest process mines one after another.

  Shard i holds an equal part of the images, the first ones one more if it does not come out
  even, belongs to process i mod N, and is gone through in batches of its own, the last one padded.

  Args:
    num_images: of the unlabelled split.
    num_shards: `config.mine.num_shards`.
    num_processes: N.
    batch_size: images of all devices of one process.
  """
  whole, more = divmod(num_images, num_shards)
  batches = [-(-(whole + (shard < more)) // batch_size) for shard in range(num_shards)]
  return max(sum(batches[first::num_processes]) for first in range(num_processes))


def mining_seconds(
  batches: int, batch_seconds: float, read_seconds: float, write_seconds: float, *, shared: bool
) -> float:
  """Seconds of one process, without starting and compiling.

  The three go on beside one another, so that the slowest sets the pace; if the devices are the
  host's own cores they take them from one another, and the times add up.

  Args:
    batches: from `mining_batches`.
    batch_seconds: of the mining program, for one batch.
    read_seconds: to read and resample the images of a batch.
    write_seconds: to encode and write the pairs of a batch.
    shared: whether the devices are the host's cores.
  """
  parts = (batch_seconds, read_seconds, write_seconds)
  return batches * (sum(parts) if shared else max(parts))


def checkpoint_bytes(
  param_bytes: int, state_bytes: int, num_steps: int, eval_every_steps: int, keep: int, best: bool
) -> int:
  """Bytes of one training: parameters at each evaluation, and the states that are kept.

  Orbax's metadata are not counted, some 60 kB a checkpoint of the default network.

  Args:
    param_bytes: of the parameters.
    state_bytes: of what a training goes on from: parameters, moments and average.
    num_steps: of the training.
    eval_every_steps: steps between evaluations.
    keep: states kept.
    best: whether the parameters of two steps at most are kept, the best and the last.
  """
  evaluations = -(-num_steps // eval_every_steps)
  kept = min(evaluations, 2) if best else evaluations
  return kept * param_bytes + min(keep, evaluations) * state_bytes


def show_bytes(count: float) -> str:
  """Such as '1.5 GB', in powers of a thousand."""
  power = min(int(math.log10(max(count, 1))) // 3, 4)
  return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def show_seconds(seconds: float) -> str:
  """Such as '1.5 h'."""
  for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
    if seconds >= 1.5 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.1f} s"
