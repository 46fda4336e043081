"""The native mode's preparation: crop, schemes, spacing, what is stored, and what is refused."""

import errno
import json
import shutil

import numpy as np
import pytest
from scipy import ndimage

from configs import nnunet as nnunet_config
from rndpo_jax import errors, types
from rndpo_jax.data import (
  builder,
  native,
  reader,
  records,
  split_batches,
  splits,
  tiles,
  unpacked,
  writer,
)
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.planning import data_set
from rndpo_jax.stages import prepare
from tests import native_data

SPACING = (2.0, 1.0, 6.0)


def _case(with_mask=True):
  """A volume [6, 8, 4]: values 1..96 in rows 1..4, columns 2..7, slices 1 and 2, zero elsewhere."""
  image = np.zeros((6, 8, 4, 1), np.float32)
  image[1:5, 2:8, 1:3, 0] = np.arange(1, 49).reshape(4, 6, 2)
  mask = np.zeros((6, 8, 4), np.uint8)
  mask[2:4, 3:6, 1], mask[1, 2, 2] = 1, types.IGNORED
  masks = [mask[:, :, z] if with_mask else None for z in range(4)]
  return [records.Pixels(image[:, :, z], m, np.eye(4)) for z, m in enumerate(masks)], image, mask


def _native(spacing=(1.0, 2.0), schemes=("zscore",), statistics=(None,)):
  return records.Native(spacing, schemes, statistics)


@pytest.mark.parametrize("between,axes", [(2.0, None), (6.0, (0, 1))])
def test_a_case_is_cropped_normalised_and_resampled_as_one(between, axes):
  pixels, image, mask = _case()
  found = native.on_spacing(pixels, (*SPACING[:2], between), _native(), num_classes=2)
  crop = image[1:5, 2:8, 1:3, 0].astype(np.float64)
  crop = (crop - crop.mean()) / crop.std()
  zoomed = ndimage.zoom(crop, (2, 0.5, 1), order=3, mode="nearest", grid_mode=True)
  # Splines overshoot: they are clipped to the volume's values, or to each slice's if those are far
  # apart.
  zoomed = np.clip(zoomed, crop.min(axes, keepdims=True), crop.max(axes, keepdims=True))
  for z in (1, 2):
    np.testing.assert_array_equal(found[z].box, [[1, 5], [2, 8]])
    assert found[z].image.shape == (8, 3, 1) and found[z].image.dtype == np.float32
    np.testing.assert_allclose(found[z].image[..., 0], zoomed[:, :, z - 1], atol=1e-5)
  # Shares of class 1: 0.75, 1, 1, 0.75 in rows 2 to 5, times 0.5, 1, 0 in the columns.
  expected = np.zeros((8, 3), np.uint8)
  expected[2:6, 1] = expected[3:5, 0] = 1
  np.testing.assert_array_equal(found[1].mask, expected)
  assert found[2].mask[0, 0] == types.IGNORED and np.count_nonzero(found[2].mask) == 1
  for z in (0, 3):  # outside the crop
    assert not native.is_seen(found[z].box) and not found[z].mask.any()
  assert native.on_spacing(_case(False)[0], SPACING, _native(), 2)[1].mask is None
  np.testing.assert_array_equal(mask[2:4, 3:6, 1], 1)


@pytest.mark.parametrize("schemes,low,high", [(("none",), 1, 48), (("zero_to_one",), 0, 1)])
def test_schemes_see_the_case_and_not_the_slice(schemes, low, high):
  native_mode = _native(spacing=SPACING[:2], schemes=schemes)
  found = native.on_spacing(_case()[0], SPACING, native_mode, 2)
  values = np.stack([found[z].image for z in (1, 2)])
  assert (values.min(), values.max()) == (low, high)


def test_masks_and_images_come_back_to_their_own_grid():
  box = np.array([[1, 5], [2, 8]])
  values = np.arange(24, dtype=np.float32).reshape(8, 3, 1)
  back = native.to_own_spacing(values, box, SPACING[:2], _native())
  expected = ndimage.zoom(values[..., 0], (0.5, 2), order=1, mode="nearest", grid_mode=True)
  np.testing.assert_allclose(back[..., 0], expected, atol=1e-5)
  pasted = native.paste(back, box, (6, 8))
  np.testing.assert_array_equal(pasted[1:5, 2:8], back)
  assert np.count_nonzero(pasted) == np.count_nonzero(back)


def _config(root, **changes):
  config = nnunet_config.get_config("")
  with config.unlocked():
    values = {"root": str(root), "num_labelled": 3, "num_val": 2, "num_test": 2}
    values |= {"spacing": (1.5, 0.0), "patch_size": (8, 8)}
    config.update_from_flattened_dict({f"data.{k}": v for k, v in (values | changes).items()})
  return config


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"source": "phantom", "phantom.size": (16, 16), "num_classes": 2}, "spacing of .*is unknown"),
    ({"schemes": ("zscore", "none")}, "config.data.schemes: found .*expected 1, one a channel"),
    ({"schemes": ("rgb",)}, "config.data.schemes: scheme 'rgb' found values from"),
  ],
)
def test_data_that_do_not_fit_raise(tmp_path, changes, message):
  root = native_data.write(tmp_path / "raw")
  with pytest.raises(errors.DataError, match=message):
    prepare.run(_config(root, **changes), tmp_path / "work")
  assert not (tmp_path / "work" / "data" / records.FILE).exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("native")
  config = _config(native_data.write(folder / "raw"))
  prepare.run(config, folder / "work")
  return config, folder / "work"


def test_an_image_too_large_for_a_record_raises_before_it_is_written(
  prepared, tmp_path, monkeypatch
):
  config, _ = prepared
  monkeypatch.setattr(writer, "_MAX_IMAGE_BYTES", 500)
  message = r"imagesTr/c00_0000.*\) values of float32 are .*at most 500 in a record; take a coarser"
  with pytest.raises(errors.DataError, match=message):
    prepare.run(config, tmp_path)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"spacing": (), "patch_size": ()}, r"prepared with config.data.spacing=\(1.5, 1.25\)"),
    ({"spacing": (1.5, 1.0)}, "take that spacing, or prepare the data again"),
  ],
)
def test_data_of_another_spacing_raise(prepared, changes, message):
  config, workdir = prepared
  with pytest.raises(errors.DataError, match=message):
    dataset_lib.open_dataset(_config(config.data.root, **changes), workdir)
  other = _config(config.data.root, spacing=(0.0, 1.25), patch_size=(4, 6))
  assert dataset_lib.open_dataset(other, workdir).size == (4, 6)


def test_files_that_end_within_a_case_hold_the_same(prepared, tmp_path, monkeypatch):
  config, workdir = prepared
  monkeypatch.setattr(builder, "FILE_BYTES", 20_000)  # some 14 slices of six a case
  prepare.run(config, tmp_path)
  one, other = (dataset_lib.open_dataset(config, place) for place in (workdir, tmp_path))
  assert len(list(reader.folder(tmp_path / "data").glob("*/*record*"))) > 3
  np.testing.assert_array_equal(one.boxes, other.boxes)
  for index in range(len(one.records)):
    a, b = (dataset_lib.load_on_spacing(d, index, with_labels=True) for d in (one, other))
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


def test_large_records_are_mapped_from_files_and_read_whole_where_none_can_be(
  prepared, tmp_path, monkeypatch
):
  config, workdir = prepared
  dataset = dataset_lib.open_dataset(config, workdir)
  index = next(int(i) for i in dataset.splits["labelled"] if native.is_seen(dataset.boxes[i]))
  want = dataset_lib.load_on_spacing(dataset, index, with_labels=True)
  assert dataset.unpacked.parent == workdir / "data" and not dataset.unpacked.exists()
  monkeypatch.setattr(unpacked, "MIN_BYTES", 1)
  dataset = dataset._replace(unpacked=tmp_path / "unpacked")
  first = dataset_lib.load_on_spacing(dataset, index, with_labels=False)
  assert sorted(first) == ["image", "index"] and isinstance(first["image"], np.memmap)
  dataset_lib.load_on_spacing(dataset, index, with_labels=True)
  assert len(list(dataset.unpacked.iterdir())) == 2
  closed = dataset._replace(source=None, blind_source=None)
  for name, array in dataset_lib.load_on_spacing(closed, index, with_labels=True).items():
    np.testing.assert_array_equal(array, want[name])
    assert array.dtype == want[name].dtype
  (dataset.unpacked / f"{index}-label.npy").write_bytes(b"")
  with pytest.raises(errors.DataError, match="label.npy: cannot be read .* remove"):
    dataset_lib.load_on_spacing(closed, index, with_labels=True)
  for number, reason in enumerate((lambda _: PLENTY._replace(free=9), _raise_full)):
    monkeypatch.setattr(unpacked.shutil, "disk_usage", reason)
    other = dataset._replace(unpacked=tmp_path / f"none{number}")
    found = dataset_lib.load_on_spacing(other, index, with_labels=True)
    np.testing.assert_array_equal(found["image"], want["image"])
    assert not list(other.unpacked.iterdir())


PLENTY = shutil.disk_usage("/")


def _raise_full(_):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_labelled_batches_hold_foreground_and_the_others_no_label(prepared):
  config, workdir = prepared
  dataset = dataset_lib.open_dataset(config, workdir)
  batches = split_batches.stream_of_split(config, dataset, "labelled", 6)(0, 0)
  for _, batch in zip(range(10), batches, strict=False):
    assert (batch["label"][4:] > 0).any(axis=(1, 2)).all()
    assert set(batch["index"].tolist()) <= set(dataset.splits["labelled"].tolist())
  blind = next(split_batches.stream_of_split(config, dataset, "unlabelled", 6)(0, 0))
  assert sorted(blind) == ["image", "index"] and blind["image"].shape == (6, 8, 8, 1)
  of_tiles = split_batches.stream_of_split(config, tiles.view(dataset), "labelled", 6)(0, 0)
  again = split_batches.stream_of_split(config, dataset, "labelled", 6)(0, 0)
  np.testing.assert_array_equal(next(of_tiles)["image"], next(again)["image"])


def test_the_plan_counts_tiles_before_and_after_preparing(prepared, tmp_path):
  config, workdir = prepared
  view = tiles.view(dataset_lib.open_dataset(config, workdir))
  after = data_set.describe_data(config, workdir)
  assert after.num_images == {name: len(part) for name, part in view.splits.items()}
  before = data_set.describe_data(config, tmp_path)
  # Headers do not tell what is zero.
  assert all(before.num_images[name] >= count for name, count in after.num_images.items())
  assert before.num_evaluated >= after.num_evaluated > after.num_images["test"]
  with pytest.raises(errors.ConfigError, match="--num_unlabelled: with config.data.spacing"):
    data_set.with_unlabelled(after, 10)


def test_the_plan_counts_the_files_of_large_records(prepared, tmp_path, monkeypatch):
  config, workdir = prepared
  assert data_set.describe_data(config, workdir).num_unpacked == 0
  monkeypatch.setattr(unpacked, "MIN_BYTES", 1)
  dataset = dataset_lib.open_dataset(config, workdir)._replace(unpacked=tmp_path / "unpacked")
  for name, part in dataset.splits.items():
    for index in (int(i) for i in part if native.is_seen(dataset.boxes[i])):
      dataset_lib.load_on_spacing(dataset, index, with_labels=name in ("labelled", "val"))
  written = sum(path.stat().st_size for path in dataset.unpacked.iterdir())
  assert data_set.describe_data(config, workdir).num_unpacked == written > 0


def test_data_that_were_prepared_by_another_rule_keep_their_schemes(prepared, tmp_path):
  config, workdir = prepared
  content = json.loads((workdir / "data" / records.FILE).read_text())
  assert content["native"]["schemes"] == ["zscore_in_mask"]
  content["native"]["schemes"] = ["zscore"]
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / records.FILE).write_text(json.dumps(content))
  shutil.copy(workdir / splits.FILE, tmp_path)
  prepare.run(config, tmp_path)
  assert records.read(tmp_path / "data")["native"].schemes == ("zscore",)


def test_records_say_how_they_were_prepared(prepared):
  config, workdir = prepared
  content = json.loads((workdir / "data" / records.FILE).read_text())
  assert content["native"]["spacing"] == [1.5, 1.25]
  assert len(content["native"]["boxes"]) == 72
  del content["native"]["boxes"][0]
  (workdir / "data" / "broken").mkdir()
  (workdir / "data" / "broken" / records.FILE).write_text(json.dumps(content))
  with pytest.raises(errors.DataError, match="71 boxes of 72 records"):
    records.read(workdir / "data" / "broken")
