"""Writes files as torch.save does, byte by byte: for tests of what reads them without PyTorch."""

import itertools
import zipfile

import numpy as np

from rndpo_jax.nnunet.pickle_program import Call, Global, Persistent
from rndpo_jax.nnunet.pickle_writer import encode

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
FOLDER = "nnUNetTrainer__nnUNetPlans__2d"


def tensor(key, array):
  """The call that makes an array of the bytes at data/KEY."""
  strides = [stride // array.itemsize for stride in array.strides]
  storage = Global(f"torch.{_STORAGES[str(array.dtype)]}")
  arguments = (
    Persistent(("storage", storage, key, "cpu", array.size)), 0, array.shape, tuple(strides),
    False, Call(Global("collections.OrderedDict"), ()),
  )  # fmt: skip
  return Call(Global("torch._utils._rebuild_tensor_v2"), arguments)


def ordered(content):
  """Instructions for an OrderedDict with an attribute, as a state dict has `_metadata`."""
  items = b"".join(map(encode, itertools.chain(*content.items())))
  empty = encode(Call(Global("collections.OrderedDict"), ()))
  return empty + b"(" + items + b"u" + encode({"_metadata": {}}) + b"b"


def write(path, weights, compression=zipfile.ZIP_STORED, **changes):
  """A checkpoint with these weights; arrays that are one object share their bytes."""
  stored = {id(array): (str(n), array) for n, array in enumerate(weights.values())}
  tensors = {name: tensor(*stored[id(array)]) for name, array in weights.items()}
  numpy_float = Call(
    Global("numpy._core.multiarray.scalar"),
    (
      Call(Global("numpy.dtype"), ("f8", False, True)),
      Call(Global("_codecs.encode"), ("12345678", "latin1")),
    ),
  )
  content = {
    "logging": {"ema_fg_dice": [numpy_float, 0.5, None, -3]},
    "init_args": {"configuration": "2d", "device": Call(Global("torch.device"), ("cuda",))},
    "trainer_name": "nnUNetTrainer",
    "inference_allowed_mirroring_axes": (0, 1),
    **changes,
  }
  data = b"\x80\x02}(" + encode("network_weights") + ordered(tensors)
  data += b"".join(map(encode, itertools.chain(*content.items()))) + b"u."
  write_zip(path, data, dict(stored.values()), compression)


def write_zip(path, data, arrays=(), compression=zipfile.ZIP_STORED):
  """The container, with this data.pkl."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("checkpoint_final/data.pkl", data)
    archive.writestr("checkpoint_final/byteorder", "little")
    for key, array in dict(arrays).items():
      archive.writestr(f"checkpoint_final/data/{key}", np.ascontiguousarray(array).tobytes())
    archive.writestr("checkpoint_final/version", "3\n")
