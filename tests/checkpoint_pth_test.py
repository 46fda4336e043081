"""checkpoint_pth: weights come back bit for bit; nothing that a pickle names is run."""

import zipfile

import numpy as np
import pth_files
import pytest
from pth_files import Call, Global, Persistent

from rndpo_jax import errors
from rndpo_jax.nnunet import checkpoint_pth


def arrays():
  rng = np.random.default_rng(0)
  shared = rng.normal(size=(3, 2, 2, 2)).astype(np.float32)
  return {"a.weight": shared, "b.weight": shared, "a.bias": np.float32([0.0, -0.0, np.nan])}


def refusal(path, *words):
  with pytest.raises(errors.FileError) as error:
    checkpoint_pth.read(path)
  for word in (str(path), *words):
    assert word in str(error.value), error.value


def test_weights_come_back_bit_for_bit_and_shared_ones_share_memory(tmp_path):
  path = tmp_path / "checkpoint_final.pth"
  pth_files.write(path, arrays())
  found = checkpoint_pth.read(path)
  assert found[1:] == ("2d", "nnUNetTrainer", (0, 1))
  assert list(found.weights) == list(arrays())
  for name, array in arrays().items():
    assert found.weights[name].dtype == array.dtype and found.weights[name].shape == array.shape
    assert found.weights[name].tobytes() == array.tobytes()
  assert np.shares_memory(found.weights["a.weight"], found.weights["b.weight"])


def test_strides_and_dtypes_of_the_file_are_kept(tmp_path):
  path = tmp_path / "checkpoint_final.pth"
  turned = np.arange(6, dtype=np.float16).reshape(2, 3)
  pth_files.write(path, {"n": np.array([2**40]), "turned": turned})
  data = zipfile.ZipFile(path).read("checkpoint_final/data.pkl")
  shape, strides = (pth_files.encode(numbers) for numbers in ((2, 3), (3, 1)))
  turn = data.replace(shape + strides, pth_files.encode((3, 2)) + pth_files.encode((1, 3)))
  assert turn != data
  pth_files.write_zip(path, turn, {"0": np.array([2**40]), "1": turned})
  found = checkpoint_pth.read(path).weights
  assert found["n"].tolist() == [2**40]
  assert found["turned"].dtype == np.float16
  np.testing.assert_array_equal(found["turned"], turned.T)


@pytest.mark.parametrize(
  "name", ["posix.system", "builtins.eval", "torch.storage._load_from_bytes", "numpy.load"]
)
def test_a_global_that_weights_do_not_need_raises_with_its_name_and_is_not_run(tmp_path, name):
  path, trace = tmp_path / "checkpoint_final.pth", tmp_path / "trace"
  pth_files.write(path, arrays(), extra=Call(Global(name), (f"touch {trace}",)))
  refusal(path, name, "nothing of it was run")
  assert not trace.exists()


@pytest.mark.parametrize(
  "data,words",
  [
    (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x07touch x\x85R.", ["protocol 4"]),
    (b"\x80\x02(X\x01\x00\x00\x00xiposix\nsystem\n.", ["INST 'posix system'"]),
    (b"\x80\x02cposix\nsystem\n)\x81.", ["posix.system"]),
    (b"\x80\x02ctorch\ndevice\n)\x81.", ["NEWOBJ"]),
    (b"\x80\x02}(X\x01\x00\x00\x00xX\x01\x00\x00\x00y", ["damaged"]),
    (b"\x80\x02tt.", ["damaged"]),
    (b"\x80\x02}]K\x01s.", ["keys that are no text or number"]),
    (b"\x80\x02K\x01.", ["'network_weights' is NoneType, expected dict"]),
    (b"no pickle", ["damaged"]),
    (b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.", ["keys that are no text or number"]),
  ],
)
def test_a_pickle_that_is_no_checkpoint_raises(tmp_path, data, words):
  path = tmp_path / "checkpoint_final.pth"
  pth_files.write_zip(path, data)
  refusal(path, "fold_0/checkpoint_final.pth", *words)


@pytest.mark.parametrize("position,value,words", [
  (1, 7, "reaches beyond its 8 values"),
  (1, -1, "a tensor of"),
  (2, (2, 5), "reaches beyond its 8 values"),
  (3, (4, 3), "reaches beyond its 8 values"),
  (3, (4,), "2 axes with 1 strides"),
  (3, (2**72, 1), ""),
  (2, (0, 2**70), ""),
  (0, Persistent(("storage", Global("torch.FloatStorage"), "0", "cpu", 9)), "found 32 bytes"),
  (0, Persistent(("storage", Global("torch.FloatStorage"), "1", "cpu", 8)), "no entry"),
  (0, Persistent(("storage", Global("torch.device"), "0", "cpu", 8)), "is stored as"),
])  # fmt: skip
def test_an_array_stays_within_its_bytes(tmp_path, position, value, words):
  path, array = tmp_path / "checkpoint_final.pth", np.zeros((2, 4), np.float32)
  pth_files.write(path, {"w": array})
  checkpoint_pth.read(path)
  call = pth_files.tensor("0", array)
  changed = list(call.arguments)
  changed[position] = value
  data = zipfile.ZipFile(path).read("checkpoint_final/data.pkl")
  bad = data.replace(
    pth_files.encode(call), pth_files.encode(call._replace(arguments=tuple(changed)))
  )
  assert bad != data
  pth_files.write_zip(path, bad, {"0": array})
  refusal(path, words)


def test_other_files_raise(tmp_path):
  path = tmp_path / "checkpoint_final.pth"
  refusal(path, "No such file")
  path.write_bytes(b"\x80\x02}q\x00.")
  refusal(path, "not a zip file")
  pth_files.write(path, arrays(), compression=zipfile.ZIP_DEFLATED)
  refusal(path, "is compressed")
  pth_files.write(path, arrays(), trainer_name=None)
  refusal(path, "'trainer_name' is NoneType, expected str")
  pth_files.write(path, arrays())
  path.write_bytes(path.read_bytes()[:-200])
  refusal(path)
