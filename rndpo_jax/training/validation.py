"""Validation during training: figures of each image, on the model's grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rndpo_jax import types
from rndpo_jax.evaluation import metrics
from rndpo_jax.runtime import sharding


def make_validate(
  apply: Callable,
  num_classes: int,
  batches: Callable[[], Iterable[types.Batch]],
  mesh: Mesh,
  reference: types.Params | None = None,
  fsdp_min_size: int = 0,
):
  """Mean foreground Dice on the model's grid, mean over images; and how far the policy has gone.

  Args:
    apply: (params, images) -> logits f32[B, *S, C].
    num_classes: C.
    batches: () -> this process's rows of the labelled batches to go through once; padding is left
      out.
    mesh: from `sharding.make_mesh`; its devices share each batch.
    reference: parameters to measure the divergence from, or None.
    fsdp_min_size: of the reference, as in `make_state`.

  Returns:
    validate(params) -> {"val_dice": float}, the same on every process; with a reference also
    "val_kl", the KL divergence from it, and "val_entropy", in nats a pixel.
  """
  if reference is not None:
    reference = sharding.put_params(reference, mesh, fsdp_min_size)
  per_image = make_image_figures(apply, num_classes, mesh)

  def validate(params) -> dict[str, float]:
    parts = [per_image(params, reference, sharding.put_batch(batch, mesh)) for batch in batches()]
    whole = jax.tree.map(lambda *xs: np.concatenate(xs), *jax.device_get(parts))
    valid = whole.pop("valid")
    return {name: float(np.mean(x[valid], dtype=np.float64)) for name, x in whole.items()}

  return validate


def make_image_figures(apply: Callable, num_classes: int, mesh: Mesh) -> Callable:
  """`image_figures` compiled: (params, reference or None, batch) -> figures.

  Every image's figures go to every process, so that their mean does not depend on who held it.
  """
  figures = functools.partial(image_figures, sharding.data_parallel(apply, mesh), num_classes)
  return jax.jit(figures, out_shardings=sharding.replicated(mesh))


def image_figures(apply: Callable, num_classes: int, params, reference, batch) -> dict:
  """Figures of each image, f32[B], and whether they count, bool[B]; see `make_validate`."""
  logits = apply(params, batch.images)
  masks = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
  per_class = metrics.dice(masks, batch.labels, num_classes, batch.labels.ndim - 1)
  # An image whose label ignores every pixel, such as a slice that nobody drew, tells nothing.
  known = jnp.any(batch.labels != types.IGNORED, axis=tuple(range(1, batch.labels.ndim)))
  figures = {"val_dice": jnp.mean(per_class, axis=-1), "valid": batch.valid & known}
  if reference is not None:
    figures["val_kl"] = metrics.kl_divergence(logits, apply(reference, batch.images))
    figures["val_entropy"] = metrics.entropy(logits)
  return figures
