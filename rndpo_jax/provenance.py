"""What a file was made of: fingerprints of data and parameters, and the check that they are these.

Whatever is made of data and of a base (checkpoints, pairs, results) keeps their fingerprints by
name, such as {"data": SHA-256, "base": SHA-256}. Used with other data or another base it would be
wrong and look right.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rndpo_jax import errors, types


def fingerprint(tree: Any) -> str:
  """SHA-256, in hexadecimal, of a pytree of arrays on the host: names, dtypes, shapes, values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(tree):
    leaf = np.asarray(leaf)
    sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    sha.update(leaf.tobytes())
  return sha.hexdigest()


def of_finetuning(dataset, params: types.Params) -> dict[str, str]:
  """Of a fine-tuning: the data, and the base that it starts from and is compared with."""
  return {"data": dataset.fingerprint, "base": fingerprint(params)}


def check(
  made: os.PathLike, there: Mapping[str, str] | None, here: Mapping[str, str], remedy: str
) -> None:
  """Checks that a file or folder was made of what is here.

  Args:
    made: the file or folder, for the message.
    there: the fingerprints that it keeps; None or without a name where it keeps none.
    here: the fingerprints of what is here; each name is compared.
    remedy: what to do, the end of the message.

  Raises:
    ProvenanceError: naming what differs.
  """
  for name, value in here.items():
    found = (there or {}).get(name)
    if found != value:
      raise errors.ProvenanceError(
        f"{made} was not made from this {name}: SHA-256 {str(found)[:12]}, here {value[:12]}; "
        f"{remedy}"
      )
