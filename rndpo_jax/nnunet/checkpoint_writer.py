"""Writes nnU-Net's `checkpoint_*.pth` without PyTorch and without Python's pickle.

The container is that of `torch.save`: a zip of uncompressed entries below one folder, the bytes of
each beginning at a multiple of 64 of the file, so that a reader may map them into memory.
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from rndpo_jax import errors
from rndpo_jax.nnunet import checkpoint_pth, pickle_writer
from rndpo_jax.nnunet.pickle_program import Call, Global, Persistent

_ALIGNMENT = 64
_FOLDER = "checkpoint_final/"
_HEADER_BYTES = 30  # of a zip's entry, before its name
_FIELD = b"FB"  # PyTorch's name of the extra field that pads
# What nnU-Net's trainer keeps of each epoch.
_LOGGED = (
  "mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs",
  "epoch_start_timestamps", "epoch_end_timestamps",
)  # fmt: skip


def replaced(path: os.PathLike, weights: Mapping[str, np.ndarray]) -> bytes:
  """A checkpoint with other weights; every other byte of its entries stays as it is.

  Args:
    path: of the checkpoint that nnU-Net wrote.
    weights: name -> f32 array for every name there, in its shape.

  Returns:
    The bytes of the new file: the same entries in the same order.

  Raises:
    errors.FileError: if the file cannot be read, or its weights have other names or shapes.
  """
  path = pathlib.Path(path)
  there = checkpoint_pth.read(path).weights  # checks the file
  if {name: a.shape for name, a in there.items()} != {name: a.shape for name, a in weights.items()}:
    raise errors.FileError(f"{path}: its weights are not those of the network to be exported")
  with zipfile.ZipFile(path) as archive:
    top, content = checkpoint_pth.read_pickle(archive)
    entries = {info.filename: archive.read(info) for info in archive.infolist()}
  for name, tensor in content["network_weights"].items():
    _, kind, key, _, _ = tensor.storage
    entry = f"{top}data/{key}"
    values = np.frombuffer(bytearray(entries[entry]), checkpoint_pth.DTYPES[kind.name])
    strides = [stride * values.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides)
    view[...] = weights[name]
    entries[entry] = values.tobytes()
  return _zip(entries)


def new(
  weights: Mapping[str, np.ndarray],
  *,
  plans: Mapping[str, Any],
  dataset: Mapping[str, Any],
  configuration: str,
  fold: int | str,
  mirroring_axes: tuple[int, ...],
) -> bytes:
  """A checkpoint for prediction and for `-pretrained_weights`; there is no training to go on with.

  Args:
    weights: name -> f32 array, in the file's order; arrays that are one object share their bytes.
    plans: what `plans.json` holds.
    dataset: what `dataset.json` holds.
    configuration: a name of the plans.
    fold: number of the fold, or "all".
    mirroring_axes: spatial axes that the network was trained to see mirrored; () for none.

  Returns:
    The bytes of the file.
  """
  places: dict[int, str] = {}
  tensors, entries = pickle_writer.Ordered(), {}
  for name, array in weights.items():
    key = places.setdefault(id(array), str(len(places)))
    entries[f"{_FOLDER}data/{key}"] = np.ascontiguousarray(array, np.float32).tobytes()
    tensors[name] = _tensor(key, array.shape)
  arguments = {"plans": plans, "configuration": configuration, "fold": fold}
  content = {
    "network_weights": tensors,
    "optimizer_state": {},
    "grad_scaler_state": None,
    "logging": {name: [] for name in _LOGGED},
    "_best_ema": None,
    "current_epoch": 0,
    "init_args": {**arguments, "dataset_json": dataset},
    "trainer_name": "nnUNetTrainer",
    # Not (): nnU-Net's prediction takes the largest of them.
    "inference_allowed_mirroring_axes": tuple(mirroring_axes) or None,
  }
  first = {
    "data.pkl": pickle_writer.dump(content),
    ".format_version": b"1",
    ".storage_alignment": str(_ALIGNMENT).encode(),
    "byteorder": b"little",
  }
  first = {_FOLDER + name: data for name, data in first.items()}
  return _zip({**first, **entries, f"{_FOLDER}version": b"3\n"})


def _tensor(key: str, shape: tuple[int, ...]) -> Call:
  """The call that makes a tensor of the bytes at data/KEY."""
  count = int(np.prod(shape))
  strides = np.cumprod((1, *shape[:0:-1]))[::-1].tolist() if shape else []
  storage = Persistent(("storage", Global("torch.FloatStorage"), key, "cpu", count))
  hooks = Call(Global("collections.OrderedDict"), ())
  arguments = (storage, 0, tuple(map(int, shape)), tuple(strides), False, hooks)
  return Call(Global(checkpoint_pth.TENSOR), arguments)


def _zip(entries: Mapping[str, bytes]) -> bytes:
  """The container, with these entries in their order."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    for name, data in entries.items():
      info = zipfile.ZipInfo(name)  # of a fixed date, so that equal weights are equal files
      start = archive.start_dir + _HEADER_BYTES + len(name.encode()) + 4
      padding = -start % _ALIGNMENT
      info.extra = struct.pack("<2sH", _FIELD, padding) + b"Z" * padding
      archive.writestr(info, data)
  return file.getvalue()
