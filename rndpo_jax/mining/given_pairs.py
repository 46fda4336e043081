"""Reference margins of pairs whose masks are given: of readers, or cut out of a whole image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from rndpo_jax import config as config_lib
from rndpo_jax import losses, models, types
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import pair_rules


class Rows(NamedTuple):
  """Records or tiles with at most P pairs each; leading axis b in a batch.

  Attributes:
    index: i32[b], of the record.
    images: f32[b, *S, I].
    chosen: u8[b, P, *S]. rejected: likewise.
    given: bool[b, P], False if a slot has no pair.
    valid: bool[b], False if the entry only pads the batch.
  """

  index: types.Array
  images: types.Array
  chosen: types.Array
  rejected: types.Array
  given: types.Array
  valid: types.Array


def make_batch(config, dataset) -> Callable:
  """(weights, keys, Rows) -> what `manifest.write` takes: pairs, packed masks, margins."""
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  options = {"classes": config_lib.region_classes(config)}

  def batch(weights, keys, rows: Rows):
    del keys
    logits = segmenter.apply(weights["policy"], rows.images)
    size = losses.region_size(
      rows.chosen, rows.rejected, spatial_dims=dataset.spatial_dims, **options
    )
    valid = rows.given & (size > 0)
    dropped = jnp.zeros((len(rows.index), len(pair_rules.FILTERS)), jnp.int32)
    identical = jnp.sum(rows.given & (size == 0), axis=1, dtype=jnp.int32)
    zeros = jnp.zeros_like(size)
    return {
      "pairs": types.Pairs(
        chosen=zeros,
        rejected=zeros,
        score_gap=jnp.zeros(size.shape, jnp.float32),
        region_size=jnp.where(valid, size, 0),
        valid=valid,
        dropped=dropped.at[:, pair_rules.FILTERS.index("identical")].set(identical),
      ),
      "chosen": bit_planes.pack(rows.chosen, dataset.num_classes, dataset.spatial_dims),
      "rejected": bit_planes.pack(rows.rejected, dataset.num_classes, dataset.spatial_dims),
      "reference_margin": losses.pair_margin(logits, rows.chosen, rows.rejected, **options),
      "reference_log_prob": losses.pair_log_prob(logits, rows.chosen, rows.rejected, **options),
    }

  return batch
