"""Reads the weights of nnU-Net's `checkpoint_*.pth` without PyTorch and without running pickles.

The file is what `torch.save` writes (PyTorch 1.6 and later): a zip of uncompressed entries below
one folder, `data.pkl` and one `data/KEY` for each array's bytes. Nothing that the pickle names is
called (`pickle_program`), and an array may only cover bytes that are there.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import reprlib
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rndpo_jax import errors
from rndpo_jax.nnunet import pickle_program
from rndpo_jax.nnunet.pickle_program import Call, Global, Persistent

DTYPES = {
  "torch.FloatStorage": np.float32,
  "torch.DoubleStorage": np.float64,
  "torch.HalfStorage": np.float16,
  "torch.BFloat16Storage": ml_dtypes.bfloat16,
  "torch.LongStorage": np.int64,
  "torch.IntStorage": np.int32,
  "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8,
  "torch.ByteStorage": np.uint8,
  "torch.BoolStorage": np.bool_,
}
_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
# Stand in what a trainer notes beside the weights; they stay a `Call` that nobody reads.
_NOTES = (
  "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode",
  "torch.device", "torch.Size",
)  # fmt: skip
ALLOWED = frozenset({*DTYPES, _DICT, TENSOR, *_NOTES})
_REMEDY = "expected a checkpoint that nnU-Net v2 wrote, such as fold_0/checkpoint_final.pth"


class Checkpoint(NamedTuple):
  """What a checkpoint says of a trained network.

  Attributes:
    weights: name -> array, in the file's order; names of one tensor share their memory.
    configuration: name of the plans' configuration, as in 2d.
    trainer: class name of nnU-Net's trainer.
    mirroring_axes: spatial axes of nnU-Net's order that it mirrors in prediction; () for none.
  """

  weights: dict[str, np.ndarray]
  configuration: str
  trainer: str
  mirroring_axes: tuple[int, ...]


class Tensor(NamedTuple):
  """An array that was not read yet; `storage` is ("storage", Global, key, place, count)."""

  storage: tuple
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_facts(path: os.PathLike | str) -> tuple[str, tuple[int, ...]]:
  """`configuration` and `mirroring_axes` of `Checkpoint`; reads no array.

  Raises:
    errors.FileError: as `read`.
  """
  with _errors_named(path), zipfile.ZipFile(path) as archive:
    content = read_pickle(archive)[1]
    return _configuration(content), _mirroring_axes(content)


def read(path: os.PathLike | str) -> Checkpoint:
  """Reads a checkpoint; of its arrays only the weights, not the optimiser's.

  Raises:
    errors.FileError: naming the file and what is wrong: it is missing or no such zip, refers to a
      global that no weights need (by its name; nothing of it was run), lacks a key, or an array
      does not fit its bytes.
  """
  with _errors_named(path), zipfile.ZipFile(path) as archive:
    top, content = read_pickle(archive)
    return _checkpoint(content, _Storages(archive, top))


@contextlib.contextmanager
def _errors_named(path: os.PathLike | str) -> Iterator[None]:
  """Errors of a file as FileError with its name."""
  try:
    yield
  except (
    ValueError, OSError, EOFError, RuntimeError, OverflowError, MemoryError, zipfile.BadZipFile,
  ) as error:  # fmt: skip
    raise errors.FileError(f"{path}: {error or type(error).__name__}; {_REMEDY}") from error


def read_pickle(archive: zipfile.ZipFile) -> tuple[str, Any]:
  """The folder of the entries, as in "checkpoint_final/", and what `data.pkl` holds."""
  names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
  if len(names) != 1:
    raise ValueError(f"the zip has {len(names)} entries FOLDER/data.pkl, expected one")
  content = pickle_program.run(read_entry(archive, names[0]), ALLOWED, _make)
  return names[0].removesuffix("data.pkl"), content


def _make(call: Call) -> Any:
  """What a call stands for: an empty dict, an array, or itself."""
  if call.function.name == _DICT:
    if call.arguments:
      raise ValueError("its pickle makes an OrderedDict of arguments")
    return {}
  if call.function.name != TENSOR:
    return call
  storage, offset, shape, strides = call.arguments[:4]
  if not isinstance(storage, Persistent) or not _are_counts((offset, *shape, *strides)):
    raise ValueError(f"its pickle has a tensor of {reprlib.repr(call.arguments)}")
  if len(shape) != len(strides):
    raise ValueError(f"its pickle has a tensor of {len(shape)} axes with {len(strides)} strides")
  return Tensor(storage.id, offset, shape, strides)


def _are_counts(values: tuple) -> bool:
  return all(type(value) is int and value >= 0 for value in values)


class _Storages:
  """The bytes of arrays, each read once."""

  def __init__(self, archive: zipfile.ZipFile, top: str):
    self.archive = archive
    self.top = top
    self.known: dict[tuple[str, str], np.ndarray] = {}
    has_order = f"{top}byteorder" in archive.namelist()  # files before PyTorch 2.1 have none
    order = read_entry(archive, f"{top}byteorder") if has_order else b"little"
    if order != b"little":
      raise ValueError(f"its byteorder is {order[:20]!r}, expected little")

  def array(self, name: str, tensor: Tensor) -> np.ndarray:
    """The array of a tensor, read-only."""
    values = self._values(name, tensor.storage)
    size = math.prod(tensor.shape)
    ends = (s * (n - 1) for n, s in zip(tensor.shape, tensor.strides, strict=True))
    end = tensor.offset + (sum(ends) + 1 if size else 0)
    if end > values.size or size > values.size:
      raise ValueError(f"{name} of shape {tensor.shape} reaches beyond its {values.size} values")
    strides = [stride * values.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
      values[tensor.offset :], tensor.shape, strides, writeable=False
    )

  def _values(self, name: str, storage: Any) -> np.ndarray:
    match storage:
      case ("storage", Global(name=kind), str(key), _, int(count)) if kind in DTYPES:
        pass
      case _:
        raise ValueError(f"{name} is stored as {reprlib.repr(storage)}")
    if (kind, key) not in self.known:
      self.known[kind, key] = self._read(name, key, np.dtype(DTYPES[kind]), count)
    return self.known[kind, key]

  def _read(self, name: str, key: str, dtype: np.dtype, count: int) -> np.ndarray:
    data = read_entry(self.archive, f"{self.top}data/{key}")
    if len(data) != count * dtype.itemsize:
      raise ValueError(f"{name}: found {len(data)} bytes, expected {count} values of {dtype}")
    return np.frombuffer(data, dtype)


def read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
  """The bytes of an entry; a compressed one could be far larger than the file."""
  try:
    info = archive.getinfo(name)
  except KeyError:
    raise ValueError(f"the zip has no entry {name}") from None
  if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
    raise ValueError(f"entry {name} of the zip is compressed, which torch.save never does")
  return archive.read(info)


def _checkpoint(content: Any, storages: _Storages) -> Checkpoint:
  weights = _key(content, "network_weights", dict)
  for name, tensor in weights.items():
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
      raise ValueError(
        f"network_weights has {reprlib.repr(name)}: {type(tensor).__name__}, expected tensors"
      )
  return Checkpoint(
    {name: storages.array(name, tensor) for name, tensor in weights.items()},
    _configuration(content),
    _key(content, "trainer_name", str),
    _mirroring_axes(content),
  )


def _mirroring_axes(content: Any) -> tuple[int, ...]:
  axes = content.get("inference_allowed_mirroring_axes") or ()
  if not isinstance(axes, (tuple, list)) or not _are_counts(tuple(axes)):
    raise ValueError(
      f"inference_allowed_mirroring_axes is {reprlib.repr(axes)}, expected axes or None"
    )
  return tuple(axes)


def _configuration(content: Any) -> str:
  return _key(_key(content, "init_args", dict), "configuration", str)


def _key(content: Any, key: str, kind: type) -> Any:
  found = content.get(key) if isinstance(content, dict) else None
  if not isinstance(found, kind):
    raise ValueError(f"its {key!r} is {type(found).__name__}, expected {kind.__name__}")
  return found
