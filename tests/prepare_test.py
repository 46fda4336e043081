import json
import shutil

import few_images
import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from rndpo_jax import errors
from rndpo_jax.data import builder, reader, records, splits, writer
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data.sources import folder, images
from rndpo_jax.runtime import threads
from rndpo_jax.stages import prepare


@pytest.fixture
def root(tmp_path):
  return few_images.write(tmp_path / "files")


def test_a_folder_becomes_records_and_splits(root, tmp_path, capsys):
  workdir = tmp_path / "work"
  prepare.run(few_images.config_of(root), workdir)
  assert not any(".tmp" in name or "incomplete" in name for name in few_images.files_of(workdir))
  dataset = dataset_lib.open_dataset(few_images.config_of(root), workdir)
  assert [len(dataset.splits[name]) for name in splits.NAMES] == [1, 3, 1, 1]
  assert 5 in dataset.splits["unlabelled"]
  for n in range(6):
    native = dataset_lib.load_native(dataset, n, with_labels=n < 5)
    stored = np.asarray(Image.open(root / "images" / f"{n}.png"))
    np.testing.assert_array_equal(native["image"][..., 0], stored)
    if n < 5:
      np.testing.assert_array_equal(native["label"], stored > 100)
  with pytest.raises(errors.DataError, match="5: it has no mask"):
    dataset_lib.load_native(dataset, 5, with_labels=True)
  assert "Dataset cases" not in capsys.readouterr().out


def test_done_is_done(root, tmp_path, monkeypatch):
  prepare.run(few_images.config_of(root), tmp_path)
  monkeypatch.setattr(builder, "build", lambda *_: pytest.fail("built again"))
  prepare.run(few_images.config_of(root), tmp_path)
  (tmp_path / splits.FILE).write_text("{}")  # not whole: not done
  with pytest.raises(pytest.fail.Exception, match="built again"):
    prepare.run(few_images.config_of(root), tmp_path)


def test_two_runs_give_the_same(root, tmp_path):
  contents = []
  for name in ("a", "b"):
    prepare.run(few_images.config_of(root), tmp_path / name)
    files = [tmp_path / name / "data" / records.FILE, tmp_path / name / splits.FILE]
    contents.append([file.read_bytes() for file in files])
  assert contents[0] == contents[1]


def test_many_files_hold_what_one_holds(root, tmp_path, monkeypatch):
  datasets = []
  for n in (2, 3, 4):  # foreground in the first of the three files is enough
    Image.fromarray(np.zeros((8 + n, 9), np.uint8)).save(root / "masks" / f"{n}.png")
  for name, size in (("one", 1 << 32), ("many", 400)):
    monkeypatch.setattr(builder, "FILE_BYTES", size)
    prepare.run(few_images.config_of(root), tmp_path / name)
    datasets.append(dataset_lib.open_dataset(few_images.config_of(root), tmp_path / name))
  # 9 x 8, 9, ... 12 pixels with masks and 9 x 13 without: 144 + 162, 180 + 198, 216 + 117 bytes.
  found = [[p.name for p in (tmp_path / n).rglob("*array_record*")] for n in ("one", "many")]
  assert found[0] == ["cases-cases.array_record-00000-of-00001"]
  assert sorted(found[1]) == [f"cases-cases.array_record-{n:05d}-of-00003" for n in range(3)]
  assert len(datasets[1].source) == 6
  for index in range(6):
    one, many = (d.source[index] for d in datasets)
    assert one.keys() == many.keys() and one["record_id"] == f"{index}".encode()
    for key in one:
      np.testing.assert_array_equal(one[key], many[key], err_msg=key)


def test_a_trial_writes_the_first_records_for_so_long(root, tmp_path):
  source, path = folder.open_source(few_images.config_of(root)), epath.Path(tmp_path / "trial")
  assert writer.try_some(source, path, 4, seconds=60.0) == 4
  assert array_record_module.ArrayRecordReader(str(path)).num_records() == 4
  assert writer.try_some(source, path, 4, seconds=-1.0) == 1  # at least one, however slow


class _Killed(BaseException):
  pass


@pytest.fixture
def opened(monkeypatch):
  """Images whose pixels were read, and after how many a kill comes."""
  seen, state = [], {"left": 10**6}
  real = images.read_image

  def read_image(path):
    if not state["left"]:
      raise _Killed
    state["left"] -= 1
    seen.append(path.stem)
    return real(path)

  monkeypatch.setattr(images, "read_image", read_image)
  monkeypatch.setattr(threads, "in_order", map)  # one after the other
  return seen, state


def _pixels(workdir):
  opened = reader.open_source(workdir / "data", with_labels=True)
  return [np.asarray(opened[index]["image"]) for index in range(len(opened))]


def _times(folder):
  """When each of the first two files and their summaries was written."""
  found = [path for number in (0, 1) for path in folder.rglob(f"*-0000{number}-of-*")]
  return {path.name: path.stat().st_mtime_ns for path in found}


def test_a_killed_run_goes_on_after_its_finished_files(root, tmp_path, monkeypatch, opened):
  seen, state = opened
  monkeypatch.setattr(builder, "FILE_BYTES", 400)  # two records a file
  prepare.run(few_images.config_of(root), tmp_path / "whole")
  seen.clear()
  state["left"] = 5
  with pytest.raises(_Killed):
    prepare.run(few_images.config_of(root), tmp_path / "killed")
  (left,) = (tmp_path / "killed" / "data" / "cases").iterdir()
  times = _times(left)
  assert left.name.endswith("incomplete") and len(times) == 4
  seen.clear()
  state["left"] = 10**6
  prepare.run(few_images.config_of(root), tmp_path / "killed")
  assert seen == ["4", "5"]  # the files of 0 to 3 were whole
  contents = [
    {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "data").rglob("*.array_record*")}
    for folder in (tmp_path / "whole", tmp_path / "killed")
  ]
  assert contents[0] == contents[1] and len(contents[0]) == 3
  assert _times(tmp_path / "killed") == times
  for one, other in zip(*map(_pixels, (tmp_path / "whole", tmp_path / "killed")), strict=True):
    np.testing.assert_array_equal(one, other)


def test_processes_share_the_files(root, tmp_path, monkeypatch, opened):
  seen, _ = opened
  monkeypatch.setattr(builder, "FILE_BYTES", 400)
  prepare.run(few_images.config_of(root), tmp_path / "one")
  source, directory = folder.open_source(few_images.config_of(root)), tmp_path / "two" / "data"
  builder._start(source, directory)
  for index, expected in enumerate((["0", "1", "4", "5"], ["2", "3"])):
    seen.clear()
    builder._write_files(source, directory, index, 2)
    assert seen == expected
  builder._finish(source, directory)
  contents = [
    {path.name: path.read_bytes() for path in workdir.rglob("*.array_record*")}
    for workdir in (tmp_path / "one", tmp_path / "two")
  ]
  assert contents[0] == contents[1] and len(contents[0]) == 3


@pytest.mark.parametrize("limit", [400, 700])
def test_a_source_that_processes_list_otherwise_is_refused(root, tmp_path, monkeypatch, limit):
  """An image comes between the listings of two processes: all records after it are other ones.

  Without it three files or two; with it four, which have other names, or two as well.
  """
  monkeypatch.setattr(builder, "FILE_BYTES", limit)
  before, directory = folder.open_source(few_images.config_of(root)), tmp_path / "data"
  builder._start(before, directory)
  builder._write_files(before, directory, 0, 2)
  for part in ("images", "masks"):
    shutil.copy(root / part / "0.png", root / part / "00.png")
  after = folder.open_source(few_images.config_of(root))
  builder._write_files(after, directory, 1, 2)
  with pytest.raises(errors.DataError, match="its process listed other records of .*let it rest"):
    builder._finish(before, directory)
  assert not (directory / "records.json").exists()


@pytest.mark.parametrize(
  "change,expected",
  [
    ("none", ["4", "5"]),
    ("image", ["2", "3", "4", "5"]),
    ("mask", ["2", "3", "4", "5"]),
    ("gone", ["3", "4", "5"]),
    ("classes", ["0", "1", "2", "3", "4", "5"]),
    ("half", ["2", "3", "4", "5"]),
    ("no summary", ["0", "1", "4", "5"]),
    ("only records.json missing", []),
  ],
)
def test_files_of_other_pixels_are_written_anew(
  change, expected, root, tmp_path, monkeypatch, opened
):
  seen, state = opened
  monkeypatch.setattr(builder, "FILE_BYTES", 400)
  state["left"] = 5
  config, workdir = few_images.config_of(root), tmp_path / "w"
  if change.startswith("only"):
    state["left"] = 6
    prepare.run(config, workdir)
    (workdir / "data" / records.FILE).unlink()
  else:
    with pytest.raises(_Killed):
      prepare.run(config, workdir)
  state["left"] = 10**6
  left = workdir / "data" / "cases" / "1.0.0.incomplete"
  if change == "image":
    Image.fromarray(np.full((11, 9), 7, np.uint8)).save(root / "images" / "3.png")
  elif change == "mask":
    Image.fromarray(np.ones((10, 9), np.uint8)).save(root / "masks" / "2.png")
  elif change == "gone":
    for part in ("images", "masks"):
      (root / part / "2.png").unlink()
  elif change == "classes":
    config.data.num_classes = 3
  elif change == "half":
    path = next(left.glob("*record-00001-of-00003"))
    path.write_bytes(path.read_bytes()[:-100])
  elif change == "no summary":
    (left / "summary-00000-of-00003.json").unlink()
  seen.clear()
  prepare.run(config, workdir)
  assert seen == expected
  names = sorted(path.stem for path in (root / "images").iterdir())
  for name, pixels in zip(names, _pixels(workdir), strict=True):
    stored = np.asarray(Image.open(root / "images" / f"{name}.png"))
    np.testing.assert_array_equal(pixels[..., 0], stored)


def test_a_file_takes_records_up_to_its_limit_and_at_least_one(monkeypatch):
  def lengths(*sizes):
    entries = [
      records.record(record_id="a", case_id="a", group_id="a", shape=(size,), has_mask=False)
      for size in sizes
    ]
    source = records.Source("toy", 2, [], 1, 1, "voxel", "float32", entries, iter, str)
    return builder.file_lengths(source)

  monkeypatch.setattr(builder, "FILE_BYTES", 40)  # ten float32
  assert lengths(4, 6, 1) == [2, 1]
  assert lengths(11, 1, 30, 9) == [1, 1, 1, 1]
  assert lengths(1) == [1]


def test_split_file(root, tmp_path):
  config = few_images.config_of(root)
  path = tmp_path / "mine.json"
  parts = {"labelled": ["0"], "unlabelled": ["5"], "val": ["1"], "test": ["2"]}
  path.write_text(json.dumps(parts))
  config.data.split_file = str(path)
  prepare.run(config, tmp_path / "w")
  assert splits.read(tmp_path / "w") == parts
