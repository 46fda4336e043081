"""Sampling, judging and mining as one pure function of weights, keys and a batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rndpo_jax import config as config_lib
from rndpo_jax import losses, models, types
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import judges, pair_rules, proposals


def make_score(config, dataset, learned_apply: Callable | None) -> Callable:
  """The pure function that samples proposals and scores them.

  Args:
    dataset: num_classes and spatial_dims are read.
    learned_apply: of `mining.quality`, where the judge `learned` is used.

  Returns:
    score(weights, keys [b, 3], batch, names) -> (Proposals, {name: f32[b, K]}).
  """
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  table = {
    name: judges.build(
      name,
      num_classes=dataset.num_classes,
      border=config.judge.border,
      flip_rate=config.judge.flip_rate,
      noise_level=config.judge.noise_level,
      learned_apply=learned_apply,
    )
    for name in {config.judge.name, *config.judge.compare}
  }
  options = {
    "mix": proposals.parse_mix(config.proposals.mix),
    **{name: value for name, value in config.proposals.items() if name != "mix"},
  }

  def score(weights, keys, batch: types.Batch, chosen_names):
    sampled = proposals.sample(segmenter, weights["policy"], batch.images, keys[:, 0], **options)
    ensemble = [
      jnp.argmax(segmenter.apply(params, batch.images), axis=-1).astype(jnp.uint8)
      for params in weights["ensemble"]
    ]
    context = judges.Context(
      keys=keys[:, 1],
      ensemble_masks=jnp.stack(ensemble, axis=1) if ensemble else None,
      labels=batch.labels,
      learned_params=weights["learned"],
    )
    probs = jax.nn.softmax(sampled.logits, axis=-1)
    scores = {
      name: table[name](batch.images, sampled.masks, probs, context) for name in chosen_names
    }
    return sampled, scores

  return score


def make_mine_batch(config, dataset, score) -> Callable:
  """(weights, keys, batch) -> masks, scores, `types.Pairs`, packed masks, reference margins.

  Packed are the chosen and rejected masks, u8[b, P, bits, bytes].
  """
  name = config.judge.name
  options = {
    "num_classes": dataset.num_classes,
    "rule": config.mine.rule,
    "pairs_per_image": config.mine.pairs_per_image,
    "min_score_gap": config.mine.min_score_gap,
    "min_region_size": config.mine.min_region_size,
    "max_region_size": config.mine.max_region_size,
  }

  which = {"classes": config_lib.region_classes(config)}

  def mine_batch(weights, keys, batch: types.Batch):
    sampled, scores = score(weights, keys, batch, (name,))
    mined = pair_rules.mine(scores[name], sampled.masks, keys[:, 2], **options)
    take = jax.vmap(lambda masks, which: masks[which])
    chosen, rejected = take(sampled.masks, mined.chosen), take(sampled.masks, mined.rejected)

    def pack(masks):
      return bit_planes.pack(masks, dataset.num_classes, dataset.spatial_dims)

    return {
      "masks": sampled.masks,
      "scores": scores[name],
      "pairs": mined,
      "chosen": pack(chosen),
      "rejected": pack(rejected),
      "reference_margin": losses.pair_margin(sampled.base_logits, chosen, rejected, **which),
      "reference_log_prob": losses.pair_log_prob(sampled.base_logits, chosen, rejected, **which),
    }

  return mine_batch


def with_keys(function: Callable) -> Callable:
  """(weights, key, batch): `function` with each image's keys for sampling, judging and mining.

  They come from the image's place in the data set alone.
  """

  def keyed(weights, key, batch: types.Batch):
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(batch.index)
    return function(weights, keys, batch)

  return keyed
