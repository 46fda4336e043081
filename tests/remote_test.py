"""Work directories in an object store, played by a folder behind fsspec's name for gs://."""

import io
import pathlib
from unittest import mock

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations import local

from rndpo_jax import errors
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files
from rndpo_jax.stages import prepare
from rndpo_jax.training import metric_writer


class Upload(io.BytesIO):
  """An object that is there once it is closed, and whole."""

  def __init__(self, path):
    super().__init__()
    self._path = pathlib.Path(path)

  def close(self):
    if not self.closed:
      self._path.write_bytes(self.getvalue())
    super().close()


class Bucket(local.LocalFileSystem):
  """gs://NAME/... is FOLDER/NAME/...; code that opens the URI as a local file finds nothing."""

  protocol = ("gcs", "gs")
  folder = None

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path)
    if path.startswith("gs://"):
      path = f"{cls.folder}/{path[len('gs://') :]}"
    return super()._strip_protocol(path)

  def _open(self, path, mode="rb", **_):
    if mode not in ("rb", "wb"):
      raise NotImplementedError(f"mode {mode!r} of {path}: an object cannot be changed")
    return Upload(path) if mode == "wb" else super()._open(path, mode)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  (tmp_path / "bucket" / "runs").mkdir(parents=True)
  monkeypatch.setattr(Bucket, "folder", str(tmp_path / "bucket"))
  fsspec.register_implementation("gcs", Bucket, clobber=True)
  monkeypatch.chdir(tmp_path / "bucket" / "runs")  # where a stray 'gs:' folder would be seen
  yield epath.Path("gs://runs")
  assert not list(tmp_path.rglob("gs:*"))


def test_files_appear_whole_in_a_bucket(bucket, tmp_path):
  files.write_json(bucket / "a" / "b.json", {"c": 1})
  files.write_json(bucket / "a" / "b.json", {"c": 2})
  assert files.read_json(bucket / "a" / "b.json") == {"c": 2}
  assert [path.name for path in (tmp_path / "bucket/runs/a").iterdir()] == ["b.json"]
  assert files.sha256(bucket / "a" / "b.json") == files.sha256(tmp_path / "bucket/runs/a/b.json")


@pytest.fixture
def no_events(monkeypatch):
  """TensorBoard's writer talks to the real store."""
  monkeypatch.setattr(metric_writer, "EventsWriter", lambda _: mock.Mock())


def test_rows_in_a_bucket_are_there_at_every_write_and_after_a_run_that_went_on(bucket, no_events):
  with (bucket / "half").open("w") as file:
    file.write("text")
    assert not (bucket / "half").exists()  # as it is in a bucket
  rows = metric_writer.MetricWriter(bucket)
  rows.resume(0)
  for step, kind in ((10, "train"), (10, "val"), (20, "train")):
    rows.add({"step": step, "kind": kind, "val_dice": step / 100})
  rows.write()
  assert [row["step"] for row in metric_writer.read_rows(bucket, "train")] == [10, 20]
  rows.add({"step": 30, "kind": "val", "val_dice": 0.3})
  rows.close()  # killed after step 20's state: step 30 comes again
  rows = metric_writer.MetricWriter(bucket)
  rows.resume(20)
  assert rows.of_kind("val") == metric_writer.read_rows(bucket, "val")[:1]
  rows.add({"step": 30, "kind": "val", "val_dice": 0.4})
  rows.close()
  assert [row["val_dice"] for row in metric_writer.read_rows(bucket, "val")] == [0.1, 0.4]


def test_prepared_data_in_a_bucket_is_that_of_a_folder(bucket, tmp_path, tiny_config):
  config = tiny_config(data__phantom__num_cases=12)
  datasets = []
  for workdir in (bucket / "job", tmp_path / "job"):
    prepare.run(config, workdir)
    assert prepare.is_done(epath.Path(workdir))
    datasets.append(dataset_lib.open_dataset(config, workdir))
  assert list(datasets[0].records) == list(datasets[1].records)
  examples = [dataset_lib.load_example(dataset, 3, with_labels=True) for dataset in datasets]
  for name, value in examples[0].items():
    np.testing.assert_array_equal(value, examples[1][name], err_msg=name)
  (bucket / "job" / "data" / "records.json").unlink()  # it broke off
  left = bucket / "job" / "data" / "cases" / "1.0.0" / "left"
  left.write_bytes(b"of another run")
  assert not prepare.is_done(bucket / "job")
  prepare.run(config, bucket / "job")
  assert prepare.is_done(bucket / "job") and not left.exists()


def test_pairs_in_a_bucket_are_checked_and_read(bucket):
  directory = bucket / "pairs"
  path = shards.shard_path(directory, 0, 1)
  rest = {
    name: np.zeros((2,) * len(field.axes), field.dtype) for name, field in shards.FIELDS.items()
  }
  records = [{**rest, "index": np.int32(i)} for i in range(4)]
  shards.write_shard(path, records, {"num_pairs": 4})
  summary = files.read_json(shards.summary_path(path))
  assert summary["count"] == 4 and summary["sha256"] == files.sha256(path)
  files.write_json(directory / "manifest.json", {"shards": [summary]})
  table = shards.read(directory)
  assert [int(record["index"]) for record in table] == [0, 1, 2, 3]
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.PairsError, match="gs://runs/pairs/pairs-00000.*is corrupt"):
    shards.read(directory)
