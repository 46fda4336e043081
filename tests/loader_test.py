import functools
import pathlib
import shutil
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import small_phantom

from rndpo_jax import errors
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader
from rndpo_jax.stages import prepare


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("phantom")
  prepare.run(small_phantom.get_config(), path)
  return path


@pytest.fixture(scope="module")
def dataset(workdir):
  return dataset_lib.open_dataset(small_phantom.get_config(), workdir)


# A reader with a worker, and a signal to them all, as a terminal, Slurm or Kubernetes may send it.
GROUP = """
import os, signal, sys, time
from absl import app
from rndpo_jax.data import loader

def load(item):
  time.sleep(0.02)
  return {"item": item}

def main(_):
  noted = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: noted.append(number))
  options = {"batch_size": 2, "seed": 0, "start_step": 0}
  batches = loader.stream(range(9), load, num_workers=1, **options)
  next(batches)
  for number in (signal.SIGTERM, signal.SIGINT):
    os.killpg(0, number)
  time.sleep(0.5)
  assert noted == [signal.SIGTERM, signal.SIGINT]
  rest = [next(batches)["item"].tolist() for _ in range(40)]  # more than were loaded ahead
  alone = loader.stream(range(9), load, num_workers=0, **options)
  assert rest == [next(alone)["item"].tolist() for _ in range(41)][1:]
  sys.exit(75)

app.run(main)
"""


def test_a_signal_to_the_group_leaves_the_workers_to_their_parent():
  process = subprocess.run(
    [sys.executable, "-c", GROUP], start_new_session=True, capture_output=True, text=True,
    cwd=pathlib.Path(__file__).parent.parent, timeout=120,
  )  # fmt: skip
  assert process.returncode == 75, process.stderr


def test_what_is_opened_opens_anew_in_a_worker_and_names_what_it_cannot_read(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / "run")
  copied = dataset_lib.open_dataset(small_phantom.get_config(), tmp_path / "run").blind_source
  again = cloudpickle.loads(packed := cloudpickle.dumps(copied))
  np.testing.assert_array_equal(again[3]["image"], copied[3]["image"])
  assert not isinstance(again[3]["mask"], np.ndarray) and len(again) == len(copied)
  (file,) = (tmp_path / "run" / "data").rglob("*array_record*")
  content = bytearray(file.read_bytes())
  content[4000] ^= 1  # within the records; zeros fill the file up
  file.write_bytes(content)
  message = f"data/cases: cannot be read .*; remove {tmp_path / 'run' / 'data'} and run"
  with pytest.raises(errors.DataError, match=message):
    [copied[index] for index in range(12)]
  shutil.rmtree(tmp_path / "run" / "data")
  with pytest.raises(errors.DataError, match=message):
    cloudpickle.loads(packed)


def _index(item):
  return {"index": np.int32(item), "twice": np.array([item, item])}


def _take(count, items=range(10, 17), **changes):
  options = {"batch_size": 4, "seed": 0, "start_step": 0, "num_workers": 0, **changes}
  stream = loader.stream(items, _index, **options)
  return np.stack([next(stream)["index"] for _ in range(count)])


def test_every_pass_holds_every_item_in_its_own_order():
  passes = _take(14).reshape(8, 7)  # 14 batches of 4 are 8 passes over 7 items
  np.testing.assert_array_equal(np.sort(passes, axis=1), [list(range(10, 17))] * 8)
  assert len({tuple(order) for order in passes}) > 6


def test_a_batch_depends_on_seed_and_step_alone():
  whole = _take(9)
  np.testing.assert_array_equal(_take(4, start_step=5), whole[5:])
  np.testing.assert_array_equal(_take(9), whole)
  assert (_take(9, seed=1) != whole).any()
  # Grain's shuffle would give seed 1 the passes of seed 0, one later.
  assert (_take(7, seed=1).reshape(4, 7)[:3] != _take(7).reshape(4, 7)[1:]).any()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch_in_contiguous_rows(count):
  parts = [_take(6, process_index=p, process_count=count) for p in range(count)]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), _take(6))


def test_fewer_items_than_a_batch_repeat():
  batch = _take(1, items=[7, 8])[0]
  assert sorted(batch) == [7, 7, 8, 8]


def test_stream_refuses_what_cannot_be():
  with pytest.raises(ValueError, match="no items"):
    _take(1, items=[])
  with pytest.raises(ValueError, match="3 processes do not divide batch_size=4"):
    _take(1, process_count=3)


def test_worker_processes_change_nothing(dataset):
  """Also: the data set and a cached `load` travel to another process."""
  load = loader.cached(functools.partial(dataset_lib.load_example, dataset, with_labels=True))
  options = {"batch_size": 4, "seed": 3, "start_step": 2}
  here = loader.stream(dataset.splits["labelled"], load, num_workers=0, **options)
  there = loader.stream(dataset.splits["labelled"], load, num_workers=2, **options)
  for _ in range(3):
    one, two = next(here), next(there)
    assert one["image"].shape == (4, 16, 16, 1) and set(one) == set(two)
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])
  there.close()


def test_cache_keeps_up_to_its_limit():
  calls = []

  def load(item):
    calls.append(item)
    return {"x": np.zeros(10, np.uint8)}

  kept = loader.cached(load, max_bytes=20)
  for item in (1, 2, 3, 1, 2, 3):
    assert kept(item)["x"].shape == (10,)
  assert calls == [1, 2, 3, 3]


def test_batches_go_through_once_and_pad_the_last(dataset):
  out = list(loader.batches(dataset, [5, 1, 2], batch_size=2, with_labels=True))
  assert [list(b.index) for b in out] == [[5, 1], [2, 2]]
  assert [list(b.valid) for b in out] == [[True, True], [True, False]]
  assert out[1].images.shape == (2, 16, 16, 1) and out[1].labels.dtype == np.uint8
  np.testing.assert_array_equal(
    out[0].labels[1], dataset_lib.load_example(dataset, 1, with_labels=True)["label"]
  )
  assert list(loader.batches(dataset, [], batch_size=2, with_labels=True)) == []


@pytest.mark.parametrize("depth", [0, 1, 3, 9])
def test_prefetch_runs_ahead_by_its_depth(depth):
  started = []

  def put(item):
    started.append(item)
    return item * 10

  out = loader.prefetch(iter(range(5)), put, depth)
  assert next(out) == 0
  assert started == list(range(min(depth + 1, 5)))
  assert list(out) == [10, 20, 30, 40]


@pytest.mark.parametrize("count", [1, 3, 4, 6, 7])
def test_batches_of_two_processes_are_those_of_one(dataset, count):
  indices = [5, 1, 2, 7, 3, 0, 4][:count]
  options = {"batch_size": 4, "with_labels": True}
  whole = list(loader.batches(dataset, indices, **options))
  parts = [
    list(loader.batches(dataset, indices, **options, process_index=i, process_count=2))
    for i in range(2)
  ]
  assert len(whole) == len(parts[0]) == len(parts[1])
  for batch, *shares in zip(whole, *parts, strict=True):
    for field in ("images", "labels", "index", "valid"):
      joined = np.concatenate([getattr(share, field) for share in shares])
      seen = joined if field == "valid" else joined[batch.valid]
      ours = getattr(batch, field)
      np.testing.assert_array_equal(ours if field == "valid" else ours[batch.valid], seen, field)
