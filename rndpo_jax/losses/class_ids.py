"""Whether masks hold class ids that the logits have."""

from __future__ import annotations

import jax
import numpy as np

from rndpo_jax import types


def check(logits: types.Array, ignore: types.Array | None = None, **masks: types.Array) -> None:
  """Checks that masks hold class ids below C where they count, if they can be looked at.

  Args:
    logits: f[B, *S, C].
    ignore: bool[B, *S] or None.
    masks: by name, integers [B, *S] or [B, P, *S].

  Raises:
    ValueError: naming the mask and the id. Nothing is seen inside `jit`, or of arrays that other
      processes hold.
  """
  num_classes = max(logits.shape[-1], 2)
  for name, mask in masks.items():
    seen = [x for x in (mask, ignore) if x is not None]
    if any(isinstance(x, jax.core.Tracer) for x in seen):
      continue
    if not all(getattr(x, "is_fully_addressable", True) for x in seen):
      continue
    counted = np.ones((), bool) if ignore is None else ~np.asarray(ignore)
    if mask.ndim == logits.ndim and ignore is not None:
      counted = counted[:, None]
    ids = np.where(counted, np.asarray(mask), 0)
    if ids.size and not 0 <= ids.min() <= ids.max() < num_classes:
      wrong = ids.max() if ids.max() >= num_classes else ids.min()
      raise ValueError(
        f"{name}: found class id {wrong}, expected ids from 0 to {num_classes - 1} for logits of "
        f"{logits.shape[-1]} classes; name pixels that do not count by `ignore`"
      )
