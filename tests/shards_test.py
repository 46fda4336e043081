"""shards: they round-trip, the summary comes last, and a full disk leaves nothing behind."""

import contextlib
import errno
import signal

import jax
import numpy as np
import pytest

from rndpo_jax import errors, pipeline
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files, preemption


def records(count):
  for index in range(count):
    fields = {
      name: np.zeros((2,) * len(field.axes), field.dtype) for name, field in shards.FIELDS.items()
    }
    yield {**fields, "index": np.int32(index), "chosen": np.full((2, 1, 3), index, np.uint8)}


def write(directory, counts):
  for shard, count in enumerate(counts):
    path = shards.shard_path(directory, shard, len(counts))
    shards.write_shard(path, records(count), {"num_pairs": count})
  summaries = [
    files.read_json(shards.summary_path(shards.shard_path(directory, n, len(counts))))
    for n in range(len(counts))
  ]
  files.write_json(directory / "manifest.json", {"shards": summaries})
  return summaries


def test_records_come_back_in_the_order_of_the_shards(tmp_path):
  summaries = write(tmp_path, [2, 0, 3])
  assert [s["count"] for s in summaries] == [2, 0, 3]
  assert summaries[0]["file"] == "pairs-00000-of-00003.array_record"
  table = shards.read(tmp_path)
  assert len(table) == 5
  assert [int(record["index"]) for record in table] == [0, 1, 0, 1, 2]
  assert table[4]["chosen"].dtype == np.uint8 and (table[4]["chosen"] == 2).all()
  with pytest.raises(IndexError):
    table[5]


def test_missing_manifest_names_the_stage(tmp_path):
  with pytest.raises(errors.PairsError, match="manifest.json is missing; run the stage 'mine'"):
    shards.read(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_shard_is_checked_once_by_all_processes_together(tmp_path, monkeypatch, count):
  write(tmp_path, [2, 0, 3, 1, 1])
  paths = [shards.shard_path(tmp_path, n, 5) for n in range(5)]
  whole = paths[3].read_bytes()
  checked, found = [], []
  sha256 = files.sha256
  monkeypatch.setattr(files, "sha256", lambda path: checked.append(path) or sha256(path))
  monkeypatch.setattr(preemption, "together", lambda what: contextlib.nullcontext())
  monkeypatch.setattr(jax, "process_count", lambda: count)
  for index in range(count):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    assert len(shards.read(tmp_path)) == 7
  assert sorted(checked) == paths
  paths[3].write_bytes(whole[:-1] + b"?")
  for index in range(count):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    try:
      shards.read(tmp_path)
    except errors.PairsError as error:
      assert f"{paths[3]} is corrupt" in str(error) and f"delete {paths[3]}, " in str(error)
      found.append(index)
  assert found == [3 % count]


def test_a_missing_shard_is_named(tmp_path):
  write(tmp_path, [1, 1])
  path = shards.shard_path(tmp_path, 1, 2)
  path.unlink()
  with pytest.raises(errors.PairsError, match=f"{path} is missing; delete {path}, .*rebuilds this"):
    shards.read(tmp_path)


def test_a_signal_ends_the_check(tmp_path, monkeypatch):
  write(tmp_path, [1, 1])
  shards.shard_path(tmp_path, 1, 2).write_bytes(b"?")  # it is not come to
  monkeypatch.setattr(preemption, "_noted", [signal.SIGTERM])
  with pytest.raises(preemption.Preempted, match="the shards of pairs are checked again"):
    shards.read(tmp_path)


def test_full_disk_is_named_and_leaves_nothing_that_counts(tmp_path, monkeypatch):
  class FullDisk:
    def __init__(self, *_):
      pass

    def write(self, _):
      raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", FullDisk)
  path = shards.shard_path(tmp_path, 0, 1)
  with pytest.raises(OSError, match="pairs-00000.*No space left") as error:
    shards.write_shard(path, records(1), {})
  assert error.value.errno == errno.ENOSPC
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"scores": np.zeros(8, np.float32)}, "holds .*scores, expected index"),
    ({"score_gap": np.zeros(2)}, "'score_gap' of a record: found float64 of 1 axes"),
    ({"valid": np.float32(1)}, "'valid' of a record: found float32 of 0 axes"),
  ],
)
def test_a_record_has_the_fields_of_the_table(tmp_path, changes, message):
  (record,) = records(1)
  with pytest.raises(ValueError, match=message):
    shards.write_shard(shards.shard_path(tmp_path, 0, 1), [{**record, **changes}], {})


def test_more_shards_than_images_raise(tiny_config):
  shards.check_num_shards(tiny_config(mine__num_shards=20), 20)
  shards.check_num_shards(tiny_config(mine__num_shards=4), 3)  # the default
  with pytest.raises(errors.ConfigError, match="config.mine.num_shards: found 21, but .* 20 unlab"):
    shards.check_num_shards(tiny_config(mine__num_shards=21), 20)


def test_more_shards_than_images_raise_before_anything_is_read(tiny_config, tmp_path):
  with pytest.raises(errors.ConfigError, match="config.mine.num_shards: found 21"):
    pipeline.run(tiny_config(mine__num_shards=21), tmp_path)
  assert not list(tmp_path.rglob("*.array_record*"))
