"""Parameters as `model.safetensors`, and what they belong to as `model.json`.

The format is a JSON header and the arrays one after another (github.com/huggingface/safetensors,
"Format"): written here, for its own package would be a dependency of every installation and saves
these twenty lines alone.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Mapping

import jax
import numpy as np

from rndpo_jax.export import description
from rndpo_jax.predict.trained import Trained

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8"}


def make(trained: Trained, workdir: pathlib.Path) -> dict[str, bytes]:
  """The files of the folder."""
  del workdir
  leaves = jax.tree_util.tree_leaves_with_path(trained.params)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in leaves
  }
  return {
    "model.json": description.text(trained),
    "model.safetensors": serialize(arrays, {"format": "jax"}),
  }


def serialize(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
  """The bytes of a file: u64 length of the header, header, arrays in C order, little-endian.

  Args:
    arrays: name -> array; 8 bytes of alignment hold for any order of f32 arrays.
    metadata: names and texts for the header.
  """
  entries, start = {}, 0
  for name, array in arrays.items():
    dtype, end = _DTYPES[str(array.dtype)], start + array.nbytes
    entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    start = end
  header = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
  header += b" " * (-len(header) % 8)  # so that the arrays begin at a multiple of 8
  data = [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
  return b"".join([struct.pack("<Q", len(header)), header, *data])
