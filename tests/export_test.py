"""Export: nnU-Net's own folder with other weights, plans of a new one, safetensors, StableHLO."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile

import jax
import native_data
import nnunet_models
import numpy as np
import pytest

from configs import nnunet, nnunet_model
from rndpo_jax import errors, models, pipeline
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import records
from rndpo_jax.export import nnunet_folder, safetensors, stablehlo
from rndpo_jax.export import run as run_lib
from rndpo_jax.nnunet import folder
from rndpo_jax.nnunet import plans as plans_lib
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.runtime import files
from rndpo_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
  "data.num_labelled": 1, "data.num_val": 2, "data.num_test": 2, "evaluate.batch_size": 8,
  "judge.gate.action": "off", "finetune.num_steps": 5, "finetune.eval_every_steps": 5,
}  # fmt: skip
# Trained from nothing, in 3D: other kernels, strides and pixels along each axis.
NEW = {
  "data.spatial_dims": 3, "data.spacing": (1.5, 0.0, 4.0), "data.patch_size": (8, 10, 4),
  "model.name": "nnunet_residual", "model.norm": "group", "model.width": 2, "model.depth": 2,
  "augment.turn": 0.0,
}  # fmt: skip
LOAD = """
import sys
import jax, jax.export, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
images = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(images))
assert program.call(images[:1]).shape == (1, *images.shape[1:-1], 3)
print([name for name in sys.modules if name.partition(".")[0] in ("rndpo_jax", "flax")])
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  return native_data.write(tmp_path_factory.mktemp("raw") / "raw", 6)


@pytest.fixture(scope="module")
def imported(tmp_path_factory, raw):
  """(model folder, work directory with that base and a checkpoint of step 5)."""
  path = tmp_path_factory.mktemp("imported")
  nnunet_models.write(path / "model", ("all",))
  run(nnunet_model.get_config(), path / "work", raw, {
    "base.nnunet_folder": str(path / "model"), "base.fold": "all",
  })  # fmt: skip
  base = trained_lib.load(path / "work", "base")
  tuned = jax.tree.map(lambda x: x * np.float32(1.5), base.params)
  checkpoint.save(path / "work" / "finetune" / "params", 5, tuned)
  return path / "model", path / "work"


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory, raw):
  """Work directory of a base as if it had been trained from nothing."""
  path, config = tmp_path_factory.mktemp("new") / "work", nnunet.get_config("")
  run(config, path, raw, NEW, ("prepare",))
  segmenter = models.build(config.model, num_classes=3, spatial_dims=3)
  image = jax.ShapeDtypeStruct((1, 8, 10, 4, 1), np.float32)
  params = jax.eval_shape(segmenter.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  checkpoint.save(path / "base" / "params", 0, params)
  data = dataset_lib.open_dataset(config, path).fingerprint
  files.write_json(path / "base" / "selected.json", {"step": 0, "fingerprints": {"data": data}})
  return path


def run(config, work, raw, changes, stages=("prepare", "base")):
  with config.unlocked():
    config.update_from_flattened_dict({**TINY, "data.root": str(raw), **changes})
  pipeline.run(config, work, stages)


def entries(path):
  with zipfile.ZipFile(path) as archive:
    return [(info.filename, archive.read(info)) for info in archive.infolist()]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_base_goes_out_as_it_came(imported, tmp_path):
  model, work = imported
  run_lib.run(work, "base", "nnunet", tmp_path / "out")
  names = sorted(path.relative_to(model) for path in model.rglob("*") if path.is_file())
  assert names == sorted(
    path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()
  )
  for name in names:
    if name.suffix == ".json":
      assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    else:
      assert entries(tmp_path / "out" / name) == entries(model / name)


def test_a_checkpoint_goes_out_with_its_weights_alone(imported, tmp_path):
  """Heads that prediction does not read stay as they came."""
  model, work = imported
  run_lib.run(work, "last", "nnunet", tmp_path / "out")
  found, before = folder.read(tmp_path / "out", "all"), folder.read(model, "all")
  same(found.params, trained_lib.load(work, "5").params)
  same(found.other_heads, before.other_heads)
  assert list(found.checkpoint.weights) == list(before.checkpoint.weights)
  assert found.checkpoint[1:] == before.checkpoint[1:]
  paths = [where / "fold_all" / "checkpoint_final.pth" for where in (tmp_path / "out", model)]
  assert (
    dict(entries(paths[0]))["checkpoint_final/data.pkl"]
    == dict(entries(paths[1]))["checkpoint_final/data.pkl"]
  )


def test_a_network_of_ours_goes_out_with_plans_that_describe_it(trained_here, tmp_path):
  run_lib.run(trained_here, "base", "nnunet", tmp_path / "out")
  trained, found = trained_lib.load(trained_here, "base"), folder.read(tmp_path / "out", 0)
  same(found.params, trained.params)
  plans = found.plans
  assert plans.axes == (2, 1, 0) and plans.class_names == ("background", "a", "b")
  assert plans.preprocessing[:3] == ((1.5, 1.25, 4.0), (8, 10, 4), ("zscore_in_mask",))
  ours = models.architecture(trained.config.model, spatial_dims=3)
  assert plans.architecture.transposed(plans.axes) == ours
  assert found.checkpoint[1:] == ("3d_fullres", "nnUNetTrainer", (0, 1, 2))
  own = json.loads((tmp_path / "out" / "plans.json").read_text())["configurations"]["3d_fullres"]
  assert own["spacing"] == [4.0, 1.25, 1.5] and own["patch_size"] == [4, 10, 8]
  assert own["normalization_schemes"] == ["ZScoreNormalization"]
  assert own["use_mask_for_norm"] == [True]  # as prepare decided
  assert plans_lib.architecture_of(own).kernels == ((3, 3, 3), (3, 3, 3))


def test_a_network_of_pictures_goes_out_for_pictures(tmp_path):
  """nnU-Net's reader of them has our axes, (H, W), where that of NIfTI turns them."""
  config = nnunet.get_config("").copy_and_resolve_references()
  with config.unlocked():
    config.model.update({"name": "nnunet_plain", "width": 2, "depth": 2})
  segmenter = models.build(config.model, num_classes=3, spatial_dims=2)
  image = jax.ShapeDtypeStruct((1, 8, 12, 3), np.float32)
  params = jax.eval_shape(segmenter.init, jax.random.key(0), image)
  params = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), params)
  schemes = ("rgb", "zscore_in_mask", "zscore")
  trained = trained_lib.Trained(
    config, 3, ["background", "a", "b"], 3, 2, "voxel", (8, 12), (), "zscore",
    records.Native((1.0, 2.0), schemes, (None,) * 3), (0, 1), False, "",
    params=params,
  )  # fmt: skip
  for path, content in nnunet_folder.make(trained, tmp_path / "work").items():
    files.write_bytes(tmp_path / "out" / path, content)
  found = folder.read(tmp_path / "out", 0)
  same(found.params, trained.params)
  assert found.plans.axes == (0, 1)
  assert found.plans.preprocessing[:3] == ((1.0, 2.0), (8, 12), schemes)
  own = json.loads((tmp_path / "out" / "plans.json").read_text())["configurations"]["2d"]
  assert own["use_mask_for_norm"] == [False, True, False]
  assert json.loads((tmp_path / "out" / "dataset.json").read_text())["file_ending"] == ".png"


def test_safetensors_hold_every_parameter(imported, tmp_path):
  work = imported[1]
  run_lib.run(work, "last", "safetensors", tmp_path / "out")
  data = (tmp_path / "out" / "model.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + length])
  assert header.pop("__metadata__") == {"format": "jax"} and (8 + length) % 8 == 0
  params = trained_lib.load(work, "last").params
  ends = []
  for name, entry in header.items():
    start, end = entry["data_offsets"]
    leaf = params
    for part in name.split("."):
      leaf = leaf[part]
    found = np.frombuffer(data[8 + length :][start:end], np.float32).reshape(entry["shape"])
    np.testing.assert_array_equal(found, leaf)
    assert entry["dtype"] == "F32"
    ends.append((start, end))
  assert len(header) == len(jax.tree.leaves(params))
  # One after another without a gap, to the end, as the format demands.
  assert [start for start, _ in ends] == [0, *(end for _, end in ends)][:-1]
  assert ends[-1][1] == len(data) - 8 - length
  described = json.loads((tmp_path / "out" / "model.json").read_text())
  assert described["network"]["kernels"] == [[3, 1], [3, 3], [3, 3]]
  assert described["input"]["spacing_mm"] == [1.5, 1.25]
  assert described["input"]["patch_size"] == [12, 10]
  assert described["checkpoint"]["step"] == 5
  assert described["output"]["classes"] == ["background", "a", "b"]


def test_safetensors_of_other_types():
  arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.ones((), np.float16)}
  data = safetensors.serialize(arrays, {})
  (length,) = struct.unpack("<Q", data[:8])
  assert data[8 + length :] == b"\x00\x01\x02\x00\x3c"
  found = json.loads(data[8 : 8 + length])
  assert found["b"] == {"dtype": "F16", "shape": [], "data_offsets": [3, 5]}


def test_stablehlo_is_loaded_by_jax_alone(imported, tmp_path):
  pytest.importorskip("flatbuffers", reason="flatbuffers, of the extra 'run', is not installed")
  work = imported[1]
  run_lib.run(work, "last", "stablehlo", tmp_path / "out")
  images = np.random.default_rng(0).normal(size=(3, 12, 10, 1)).astype(np.float32)
  np.save(tmp_path / "images.npy", images)
  (tmp_path / "load.py").write_text(LOAD)
  paths = [str(tmp_path / name) for name in ("out/model.stablehlo", "images.npy", "logits.npy")]
  command = [sys.executable, "load.py", *paths]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "[]\n"
  trained = trained_lib.load(work, "last")
  segmenter = models.build(trained.config.model, num_classes=3, spatial_dims=2)
  wanted = jax.jit(segmenter.apply)(trained.params, images)
  np.testing.assert_allclose(np.load(paths[2]), wanted, rtol=1e-4, atol=1e-4)


def test_what_no_format_can_hold_raises(trained_here, tmp_path, monkeypatch):
  def refused(work, name, match, output=tmp_path / "out"):
    with pytest.raises(errors.ConfigError, match=match):
      run_lib.run(work, "base", name, output)
    assert not (tmp_path / "out").exists()

  refused(tmp_path / "none", "nnunet", "config.json is missing; give the work directory of a run")
  refused(trained_here, "nnunet", "expected a folder of this host", "gs://bucket/out")
  refused(trained_here, "safetensors", "is there already, and an export replaces", str(tmp_path))
  trained = trained_lib.load(trained_here, "base")
  with pytest.raises(errors.ConfigError, match="config.data.spacing is empty, and nnU-Net's plans"):
    run_lib.FORMATS["nnunet"](trained._replace(native=None), trained_here)
  config = trained.config.copy_and_resolve_references()
  config.model.name = "unet"
  with pytest.raises(errors.ConfigError, match="config.model.name='unet' is no network of nnU-Net"):
    run_lib.FORMATS["nnunet"](trained._replace(config=config), trained_here)
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  with pytest.raises(errors.ConfigError, match="--format=stablehlo: needs the package flatbuffers"):
    stablehlo.serialize(trained)


def test_what_breaks_off_leaves_nothing_and_is_done_again(trained_here, tmp_path, monkeypatch):
  write, count = files.write_bytes, [0]

  def broken(path, content):
    count[0] += 1
    if count[0] == 2:
      raise OSError(28, "No space left on device", os.fspath(path))
    write(path, content)

  monkeypatch.setattr(files, "write_bytes", broken)
  with pytest.raises(OSError, match="No space left"):
    run_lib.run(trained_here, "base", "nnunet", tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
  (tmp_path / ".out.tmp" / "half").touch()
  run_lib.run(trained_here, "base", "nnunet", tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "dataset.json", "fold_0", "plans.json",
  ]  # fmt: skip
