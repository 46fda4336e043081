"""What the terms of fine-tuning's loss on images read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.data import augment


class Settings(NamedTuple):
  """What all terms share.

  Attributes:
    apply: (params, images, key=None) -> logits f32[B, *S, C]; a key switches dropout on.
    num_classes: C.
    dice_weight: factor of soft Dice beside cross-entropy.
    has_ignored: whether labels may hold `types.IGNORED`.
    augment: options of `augment.augment` for labelled images, or None.
    strong: options of `augment.augment` that make the strong view of the weak one.
    teach: (params, images) -> logits of a teacher on the weak view; see `models.mirroring`.
    objective: as in `pair_terms.Settings`, and so region_classes; of the term `online`.
  """

  apply: Callable[..., jax.Array]
  num_classes: int
  dice_weight: float
  has_ignored: bool
  augment: Mapping[str, float] | None
  strong: Mapping[str, float]
  teach: Callable[..., jax.Array]
  objective: Mapping[str, Any] | None = None
  region_classes: tuple[int, ...] | None = None


class Inputs(NamedTuple):
  """What a term on images reads; a part that none reads is None.

  Attributes:
    settings: see there.
    params: of the policy. partner: of a second network that is trained beside it.
    teacher: the moving average. base: the frozen network that fine-tuning started from.
    labelled: {"image", "label"}.
    weak: f32[B, *S, I], the weak view of unlabelled images. strong: likewise.
    student_logits: f32[B, *S, C], the policy's on the strong view, dropout on.
    key: of this term and step.
    beta: f32[] in place of the objective's, or None.
  """

  settings: Settings
  params: types.Params
  partner: types.Params | None
  teacher: types.Params | None
  base: types.Params | None
  labelled: dict[str, types.Array] | None
  weak: types.Array | None
  strong: types.Array | None
  student_logits: types.Array | None
  key: jax.Array
  beta: types.Array | None = None


def strong_view(key: jax.Array, weak: jax.Array, options: Mapping[str, float]) -> jax.Array:
  """f32[B, *S, I]: `options` of intensity, gamma and noise; no pixel moves."""
  still = dict.fromkeys(augment.MOVING, 0.0)
  masks = jnp.zeros((weak.shape[0], 0, *weak.shape[1:-1]), jnp.uint8)
  return augment.augment(key, weak, masks, **options, **still)[0]
