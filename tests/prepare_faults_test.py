"""prepare: what fails leaves nothing that looks whole, and what is damaged is named."""

import errno

import few_images
import numpy as np
import pytest
from PIL import Image

from rndpo_jax import errors
from rndpo_jax.data import builder, records, writer
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.stages import prepare


@pytest.fixture
def root(tmp_path):
  return few_images.write(tmp_path / "files")


def _fails_and_recovers(config, workdir, repair, error=errors.DataError, match=""):
  """Fails, leaves nothing that looks whole, and after `repair` the same command works."""
  with pytest.raises(error, match=match):
    prepare.run(config, workdir)
  assert not prepare.is_done(workdir) and not (workdir / "data" / records.FILE).exists()
  repair()
  prepare.run(config, workdir)
  assert len(dataset_lib.open_dataset(config, workdir).records) == 6


def test_an_image_that_breaks_half_way(root, tmp_path):
  path = root / "images" / "4.png"
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  _fails_and_recovers(
    few_images.config_of(root),
    tmp_path / "w",
    lambda: path.write_bytes(whole),
    match=r"4\.png: truncated",
  )


def test_all_masks_empty(root, tmp_path):
  whole = {path: path.read_bytes() for path in (root / "masks").iterdir()}
  for path in whole:
    array = np.asarray(Image.open(path))
    Image.fromarray(array * 0).save(path)

  def repair():
    for path, content in whole.items():
      path.write_bytes(content)

  _fails_and_recovers(
    few_images.config_of(root), tmp_path / "w", repair, match="every mask is empty"
  )


def test_more_labels_than_cases_before_any_pixel(root, tmp_path, monkeypatch):
  config = few_images.config_of(root)
  config.data.num_labelled = 5
  with monkeypatch.context() as patch:
    patch.setattr(builder, "build", lambda *_: pytest.fail("read pixels first"))
    with pytest.raises(errors.DataError, match="num_labelled=5"):
      prepare.run(config, tmp_path / "w")
  assert few_images.files_of(tmp_path) == few_images.files_of(root.parent)


def test_disk_full(root, tmp_path):
  def full(*_):
    raise RuntimeError("write() failed: No space left on device")  # as ArrayRecord does

  patch = pytest.MonkeyPatch()
  patch.setattr(writer.array_record_module, "ArrayRecordWriter", full)
  message = "w/data/cases/.*: the prepared data cannot be written: .*No space left"
  _fails_and_recovers(few_images.config_of(root), tmp_path / "w", patch.undo, OSError, message)


def test_disk_full_at_the_last_file(root, tmp_path):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  patch = pytest.MonkeyPatch()
  patch.setattr(records, "write", full)
  _fails_and_recovers(
    few_images.config_of(root), tmp_path / "w", patch.undo, OSError, "No space left"
  )


def test_what_a_killed_run_left_is_removed_and_nothing_else(root, tmp_path):
  left = tmp_path / "data" / "cases" / "1.0.0.incomplete.ABC" / "cases.array_record"
  left.parent.mkdir(parents=True)
  left.write_bytes(b"half")
  (tmp_path / "data" / "mine.txt").write_text("mine")
  prepare.run(few_images.config_of(root), tmp_path)
  assert not left.exists() and (tmp_path / "data" / "mine.txt").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no description"])
def test_damaged_prepared_files_are_named(root, tmp_path, damage):
  prepare.run(few_images.config_of(root), tmp_path)
  (path,) = (tmp_path / "data" / "cases").rglob("*.array_record*")
  if damage == "truncated":
    path.write_bytes(path.read_bytes()[:-1000])
  else:
    (path if damage == "missing" else path.parent / "dataset_info.json").unlink()
  with pytest.raises(errors.DataError, match="cases: cannot be read.*'prepare'"):
    dataset_lib.open_dataset(few_images.config_of(root), tmp_path)
