"""pairs: shards round-trip, the summary comes last, and a full disk leaves nothing behind."""

import errno

import numpy as np
import pytest

from rndpo_jax import files
from rndpo_jax.stages import pairs


def records(count):
  for index in range(count):
    yield {"index": np.int32(index), "chosen": np.full((2, 3), index, np.uint8)}


def write(directory, counts):
  for shard, count in enumerate(counts):
    path = pairs.shard_path(directory, shard, len(counts))
    pairs.write_shard(path, records(count), {"num_pairs": count})
  summaries = [
    files.read_json(pairs.summary_path(pairs.shard_path(directory, n, len(counts))))
    for n in range(len(counts))
  ]
  files.write_json(directory / "manifest.json", {"shards": summaries})
  return summaries


def test_records_come_back_in_the_order_of_the_shards(tmp_path):
  summaries = write(tmp_path, [2, 0, 3])
  assert [s["count"] for s in summaries] == [2, 0, 3]
  assert summaries[0]["file"] == "pairs-00000-of-00003.array_record"
  table = pairs.read(tmp_path)
  assert len(table) == 5
  assert [int(record["index"]) for record in table] == [0, 1, 0, 1, 2]
  assert table[4]["chosen"].dtype == np.uint8 and (table[4]["chosen"] == 2).all()
  with pytest.raises(IndexError):
    table[5]


def test_missing_manifest_names_the_stage(tmp_path):
  with pytest.raises(pairs.PairsError, match="manifest.json is missing; run the stage 'mine'"):
    pairs.read(tmp_path)


def test_full_disk_is_named_and_leaves_nothing_that_counts(tmp_path, monkeypatch):
  class FullDisk:
    def __init__(self, *_):
      pass

    def write(self, _):
      raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(pairs.array_record_module, "ArrayRecordWriter", FullDisk)
  path = pairs.shard_path(tmp_path, 0, 1)
  with pytest.raises(OSError, match="pairs-00000.*No space left") as error:
    pairs.write_shard(path, records(1), {})
  assert error.value.errno == errno.ENOSPC
  assert list(tmp_path.iterdir()) == []
