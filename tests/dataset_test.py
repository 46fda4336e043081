"""dataset: what prepared data hold, which masks are read, and what does not fit together."""

import json
import shutil

import numpy as np
import pytest
import small_phantom

from rndpo_jax import errors
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, records, splits
from rndpo_jax.data.sources import phantom
from rndpo_jax.stages import prepare


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("phantom")
  prepare.run(small_phantom.get_config(), path)
  return path


@pytest.fixture(scope="module")
def dataset(workdir):
  return dataset_lib.open_dataset(small_phantom.get_config(), workdir)


def test_open_dataset(dataset):
  assert (dataset.num_classes, dataset.num_channels, dataset.spatial_dims) == (2, 1, 2)
  assert len(dataset.source) == len(dataset.records) == 12
  assert {name: len(part) for name, part in dataset.splits.items()} == {
    "labelled": 3, "unlabelled": 5, "val": 2, "test": 2,
  }  # fmt: skip
  every = np.concatenate(list(dataset.splits.values()))
  assert sorted(every) == list(range(12))
  assert all((np.diff(part) > 0).all() for part in dataset.splits.values())


def test_native_and_model_grid(dataset):
  native = dataset_lib.load_native(dataset, 4, with_labels=True)
  assert native["image"].shape == (20, 24, 1) and native["image"].dtype == np.uint8
  assert native["label"].shape == (20, 24) and native["label"].max() == 1
  assert native["spacing"] is None and native["affine"].shape == (4, 4)
  example = dataset_lib.load_example(dataset, 4, with_labels=True)
  assert example["image"].shape == (16, 16, 1) and example["image"].dtype == np.float32
  assert example["label"].shape == (16, 16) and example["label"].dtype == np.uint8
  assert example["index"] == 4 and example["index"].dtype == np.int32
  np.testing.assert_allclose([example["image"].mean(), example["image"].std()], [0, 1], atol=1e-5)
  assert abs(example["label"].mean() - native["label"].mean()) < 0.05


def test_crop_is_read(workdir):
  config = small_phantom.get_config()
  config.data.crop = (16, 16)
  config.data.normalization = "minmax"
  dataset = dataset_lib.open_dataset(config, workdir)
  native = dataset_lib.load_native(dataset, 1, with_labels=True)
  example = dataset_lib.load_example(dataset, 1, with_labels=True)
  np.testing.assert_array_equal(example["label"], native["label"][2:18, 4:20])
  crop = native["image"][2:18, 4:20].astype(np.float32)
  np.testing.assert_allclose(
    example["image"], (crop - crop.min()) / (crop.max() - crop.min()), atol=1e-6
  )


def test_volumes_with_four_classes(tmp_path):
  config = small_phantom.get_config()
  config.data.update({"spatial_dims": 3, "num_classes": 4})
  config.data.update({"size": (16, 16, 8), "crop": (20, 22, 12)})
  config.data.phantom.size = (24, 24, 12)
  prepare.run(config, tmp_path)
  dataset = dataset_lib.open_dataset(config, tmp_path)
  (batch,) = loader.batches(dataset, dataset.splits["test"], batch_size=2, with_labels=True)
  assert batch.images.shape == (2, 16, 16, 8, 1) and batch.labels.shape == (2, 16, 16, 8)
  assert set(np.unique(batch.labels)) == {0, 1, 2, 3}
  logits = np.zeros((16, 16, 8, 4), np.float32)
  shape = dataset_lib.load_native(dataset, 0, with_labels=True)["label"].shape
  assert loader.to_native(logits, shape, dataset.crop).shape == (24, 24, 12, 4)


class _Poison:
  """A mask that must not be touched."""

  def __getitem__(self, index):
    raise AssertionError(f"the masks of record {index} were read")


def test_without_labels_no_mask_is_read(dataset):
  poisoned = dataset._replace(source=_Poison())
  blind = dataset_lib.load_example(poisoned, 4, with_labels=False)
  seen = dataset_lib.load_example(dataset, 4, with_labels=True)
  np.testing.assert_array_equal(blind["image"], seen["image"])
  assert blind["label"].shape == (16, 16) and not blind["label"].any() and seen["label"].any()
  assert dataset_lib.load_native(poisoned, 4, with_labels=False)["label"] is None
  list(loader.batches(poisoned, [1, 2], batch_size=2, with_labels=False))
  assert not isinstance(dataset.blind_source[4]["mask"], np.ndarray)  # bytes, still compressed
  with pytest.raises(AssertionError, match="were read"):
    dataset_lib.load_example(poisoned, 4, with_labels=True)


def test_poisoned_masks_change_nothing_without_labels(dataset, tmp_path, monkeypatch):
  draw = phantom.draw

  def poisoned(*args, **kwargs):
    image, mask = draw(*args, **kwargs)
    return image, (1 - mask).astype(np.uint8)

  monkeypatch.setattr(phantom, "draw", poisoned)
  prepare.run(small_phantom.get_config(), tmp_path)
  other = dataset_lib.open_dataset(small_phantom.get_config(), tmp_path)
  pairs = [loader.batches(d, range(12), batch_size=5, with_labels=False) for d in (dataset, other)]
  for one, two in zip(*pairs, strict=True):
    for a, b in zip(one, two, strict=True):
      np.testing.assert_array_equal(a, b)
  labels = [dataset_lib.load_example(d, 0, with_labels=True)["label"] for d in (dataset, other)]
  assert (labels[0] != labels[1]).any()


def test_a_label_that_is_not_there_is_refused(dataset):
  entries = [{**entry, "has_mask": False} for entry in dataset.records]
  with pytest.raises(errors.DataError, match="phantom_0004: it has no mask"):
    dataset_lib.load_example(dataset._replace(records=entries), 4, with_labels=True)


def test_what_does_not_fit_together_is_named(workdir, tmp_path):
  with pytest.raises(errors.DataError, match="records.json: no such file.*'prepare'"):
    dataset_lib.open_dataset(small_phantom.get_config(), tmp_path)
  for name in ("data", splits.FILE):
    (tmp_path / name).symlink_to(workdir / name)
  (tmp_path / splits.FILE).unlink()
  parts = json.loads((workdir / splits.FILE).read_text())
  parts["val"].append(parts["labelled"].pop())
  (tmp_path / splits.FILE).write_text(json.dumps(parts))
  with pytest.raises(errors.DataError, match="splits.json is not what .*'prepare' wrote"):
    dataset_lib.open_dataset(small_phantom.get_config(), tmp_path)


def test_a_split_holds_every_record_of_its_cases(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / "run")
  path = tmp_path / "run" / "data" / records.FILE
  content = json.loads(path.read_text())
  content["records"]["case_id"] = [f"c{n % 5}" for n in range(12)]
  parts = {"labelled": ["c3", "c0"], "unlabelled": ["c4"], "val": ["c1"], "test": ["c2"]}
  path.write_text(json.dumps({**content, "splits_sha256": splits.sha256(parts)}))
  (tmp_path / "run" / splits.FILE).write_text(json.dumps(parts))
  found = dataset_lib.open_dataset(small_phantom.get_config(), tmp_path / "run").splits
  assert {name: part.tolist() for name, part in found.items()} == {
    "labelled": [0, 3, 5, 8, 10], "unlabelled": [4, 9], "val": [1, 6, 11], "test": [2, 7],
  }  # fmt: skip
  assert found["val"].dtype == np.int64
