"""checkpoint_writer: a checkpoint with other weights alone, and new ones as PyTorch reads them."""

import os
import struct
import subprocess
import zipfile

import numpy as np
import pth_files
import pytest

from rndpo_jax import errors
from rndpo_jax.nnunet import checkpoint_pth, checkpoint_writer
from rndpo_jax.nnunet.pickle_program import Call, Global, Persistent

RNG = np.random.default_rng(0)
SHARED = RNG.normal(size=(2, 3, 1)).astype(np.float32)
WEIGHTS = {"a.weight": SHARED, "a.bias": np.arange(2, dtype=np.float32), "b.a.weight": SHARED}
TORCH = """
import sys, torch
for mmap in (False, True):
  found = torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=mmap)
  weights = found["network_weights"]
  assert list(weights) == ["a.weight", "a.bias", "b.a.weight"], list(weights)
  assert weights["a.weight"].data_ptr() == weights["b.a.weight"].data_ptr()
  assert weights["a.weight"].shape == (2, 3, 1) and weights["a.bias"].tolist() == [0, 1]
  assert found["init_args"]["plans"] == {"x": [1, 2.5]}
"""


def entries(path):
  with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
    return {info.filename: archive.read(info) for info in archive.infolist()}


def starts(path):
  """Where the bytes of each entry begin in the file."""
  data = path.read_bytes()
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      assert info.compress_type == zipfile.ZIP_STORED
      lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
      yield info.header_offset + 30 + sum(lengths)


def test_only_the_bytes_of_weights_change(tmp_path):
  before, after = tmp_path / "before.pth", tmp_path / "after.pth"
  pth_files.write(before, WEIGHTS)
  after.write_bytes(checkpoint_writer.replaced(before, WEIGHTS))
  assert entries(after) == entries(before) and list(entries(after)) == list(entries(before))
  doubled = {name: array * 2 for name, array in WEIGHTS.items()}
  after.write_bytes(checkpoint_writer.replaced(before, doubled))
  found = checkpoint_pth.read(after).weights
  assert list(found) == list(WEIGHTS)
  for name, array in doubled.items():
    np.testing.assert_array_equal(found[name], array)
  changed = [name for name, data in entries(after).items() if data != entries(before)[name]]
  assert {name.split("/")[1] for name in changed} == {"data"}
  assert not any(start % 64 for start in starts(after))


def test_weights_that_are_views_of_one_storage_are_written_in_their_places(tmp_path):
  """b is the transpose of what stands behind a."""
  storage = Persistent(("storage", Global("torch.FloatStorage"), "0", "cpu", 8))
  make = Global("torch._utils._rebuild_tensor_v2")
  views = {
    "a": Call(make, (storage, 0, (2,), (1,), False, {})),
    "b": Call(make, (storage, 2, (2, 3), (1, 2), False, {})),
  }
  content = {"network_weights": views, "init_args": {"configuration": "2d"}}
  content |= {"trainer_name": "nnUNetTrainer"}
  path = tmp_path / "views.pth"
  data = b"\x80\x02" + pth_files.encode(content) + b"."
  pth_files.write_zip(path, data, {"0": np.zeros(8, np.float32)})
  b = np.arange(6, dtype=np.float32).reshape(2, 3)
  path.write_bytes(checkpoint_writer.replaced(path, {"a": np.float32([7, 8]), "b": b}))
  stored = np.frombuffer(entries(path)["checkpoint_final/data/0"], np.float32)
  np.testing.assert_array_equal(stored, [7, 8, 0, 3, 1, 4, 2, 5])


@pytest.mark.parametrize("weights", [{}, {**WEIGHTS, "a.bias": np.zeros(3, np.float32)}])
def test_weights_of_another_network_raise(tmp_path, weights):
  pth_files.write(tmp_path / "a.pth", WEIGHTS)
  with pytest.raises(errors.FileError, match="a.pth: its weights are not those of the network"):
    checkpoint_writer.replaced(tmp_path / "a.pth", weights)


def new(path):
  path.write_bytes(
    checkpoint_writer.new(
      WEIGHTS,
      plans={"x": [1, 2.5]},
      dataset={},
      configuration="3d_fullres",
      fold="all",
      mirroring_axes=(),
    )
  )
  return path


def test_a_new_checkpoint_is_read_as_nnunets_own(tmp_path):
  path = new(tmp_path / "new.pth")
  found = checkpoint_pth.read(path)
  assert found[1:] == ("3d_fullres", "nnUNetTrainer", ())
  assert list(found.weights) == list(WEIGHTS)
  for name, array in WEIGHTS.items():
    np.testing.assert_array_equal(found.weights[name], array)
  assert sum("/data/" in name for name in entries(path)) == 2  # one of each array
  assert not any(start % 64 for start in starts(path))


@pytest.mark.skipif("RNDPO_NNUNET_PYTHON" not in os.environ, reason="no Python with PyTorch here")
def test_pytorch_loads_a_new_checkpoint_as_weights_only(tmp_path):
  """RNDPO_NNUNET_PYTHON is the interpreter."""
  path = new(tmp_path / "new.pth")
  command = [os.environ["RNDPO_NNUNET_PYTHON"], "-c", TORCH, path]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
