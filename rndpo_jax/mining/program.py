"""Sampling, judging and mining as one pure function of weights, keys and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import config as config_lib
from rndpo_jax import errors, losses, models, types
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import fused, judges, network_logits, proposals, user_judges
from rndpo_jax.mining.ranked import make_rule, make_sizes


class Scored(NamedTuple):
  """Proposals of a batch with the scores that a judge on the host gave them.

  Attributes:
    index: i32[b], as in `types.Batch`.
    masks: u8[b, K, *S].
    base_logits: f32[b, *S, C].
    scores: f32[b, K].
    probs: f32[b, K, *S, C].
    present: bool[b, K], as in `types.Proposals`.
  """

  index: types.Array
  masks: types.Array
  base_logits: types.Array
  scores: types.Array
  probs: types.Array
  present: types.Array | None


def used_judges(config) -> tuple[str, ...]:
  """Names of the judges that the config measures; the one that mines first, if it is known."""
  names = dict.fromkeys((config.judge.name, *config.judge.compare))
  return tuple(name for name in names if name != judges.AUTO)


def host_judges(config, dataset) -> dict[str, str]:
  """Judges of the config that must run on the host, each with the reason.

  Args:
    config: the whole config.
    dataset: size, num_channels and num_classes are read.

  Raises:
    JudgeError: as `user_judges.why_on_host`, and if the judge `fused` is to read one of them.
  """
  size, struct = tuple(dataset.size), jax.ShapeDtypeStruct
  count = sum(n for _, n in proposals.parse_mix(config.proposals.mix))
  arrays = (
    struct((2, *size, dataset.num_channels), jnp.float32),
    struct((2, count, *size), jnp.uint8),
    struct((2, count, *size, dataset.num_classes), jnp.float32),
  )
  names = [name for name in used_judges(config) if ":" in name]
  reasons = {name: user_judges.why_on_host(name, *arrays) for name in names}
  reasons = {name: reason for name, reason in reasons.items() if reason}
  hosted = [name for name in fused.members(config) if name in reasons]
  if judges.FUSED in used_judges(config) and hosted:
    raise errors.JudgeError(
      f"judge 'fused' cannot read {hosted[0]!r} of config.judge.compare, which runs on the host "
      f"({reasons[hosted[0]]}); write it in JAX, or take one of the two out"
    )
  return reasons


def make_network(config, dataset) -> Callable[..., types.NetworkLogits]:
  """(weights, keys [b], images f32[b, *S, I]) -> what `config.proposals.mix` takes of the network.

  Args:
    config: the whole config.
    dataset: num_classes and spatial_dims are read.
  """
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  mix = proposals.parse_mix(config.proposals.mix)

  def network(weights, keys, images):
    others = [segmenter.apply(params, images) for params in weights["ensemble"]]
    members = jnp.stack(others, axis=1) if others else None
    return network_logits.compute(
      segmenter, weights["policy"], images, keys, mix, members, zoom=config.proposals.zoom
    )

  return network


def make_score(config, dataset, learned_apply: Callable | None) -> Callable:
  """The pure function that samples proposals and scores them.

  Args:
    config: the whole config.
    dataset: num_classes, spatial_dims, size and num_channels are read.
    learned_apply: of `mining.quality`, if the judge `learned` is used.

  Returns:
    score(weights, keys [b, 3], batch, names) -> (Proposals, {name: f32[b, K]}). The scores of
    `host_judges` are zeros there, for programs that are only planned.
  """
  hosted, network_of = host_judges(config, dataset), make_network(config, dataset)
  table = {
    name: judges.build(
      name,
      num_classes=dataset.num_classes,
      border=config.judge.border,
      flip_rate=config.judge.flip_rate,
      noise_level=config.judge.noise_level,
      learned_apply=learned_apply,
    )
    for name in used_judges(config)
    if name not in hosted and name != judges.FUSED
  }
  fused_of = fused.members(config)
  options = {
    "mix": proposals.parse_mix(config.proposals.mix),
    **{name: value for name, value in config.proposals.items() if name not in ("mix", "zoom")},
  }

  def score(weights, keys, batch: types.Batch, chosen_names):
    network = batch.network
    if network is None:
      network = network_of(weights, keys[:, 0], batch.images)
    sampled = proposals.of_logits(
      network, keys[:, 0], **options, files=batch.files, inside=batch.inside
    )
    context = _context(weights, keys, batch, network.members, sampled)
    probs = jax.nn.softmax(sampled.logits, axis=-1)

    def of(name):
      if name in hosted:
        return jnp.zeros(sampled.masks.shape[:2])
      if name == judges.FUSED:
        return fused.fuse(jnp.stack(list(map(of, fused_of)), axis=1), weights["log_odds"])
      found = table[name](batch.images, sampled.masks, probs, context)
      # Without a vote in `fused`, too.
      return found if sampled.present is None else jnp.where(sampled.present, found, jnp.nan)

    return sampled, {name: of(name) for name in chosen_names}

  return score


def _context(weights, keys, batch: types.Batch, members, sampled) -> judges.Context:
  """What judges may look at besides images and proposals; `members` are f32[b, M, *S, C]."""
  masks = None if members is None else jnp.argmax(members, axis=-1).astype(jnp.uint8)
  return judges.Context(
    keys=keys[:, 1],
    ensemble_masks=masks,
    labels=batch.labels,
    learned_params=weights["learned"],
    present=sampled.present,
    file_scores=sampled.file_scores,
  )


def make_mine_batch(config, dataset, score) -> Callable:
  """(weights, keys, batch) -> masks, scores, `types.Pairs`, packed masks, reference margins.

  Packed are the chosen and rejected masks, u8[b, P, bits, bytes].
  """
  name, pairs_of = config.judge.name, _make_pairs_of(config, dataset)

  def mine_batch(weights, keys, batch: types.Batch):
    sampled, scores = score(weights, keys, batch, (name,))
    probs = jax.nn.softmax(sampled.logits, axis=-1)
    return pairs_of(keys, sampled.masks, sampled.base_logits, scores[name], probs, sampled.present)

  return mine_batch


def make_propose_batch(score) -> Callable:
  """(weights, keys, batch) -> what a judge on the host, and then `make_mine_scored`, needs."""

  def propose_batch(weights, keys, batch: types.Batch):
    sampled, _ = score(weights, keys, batch, ())
    probs = jax.nn.softmax(sampled.logits, axis=-1)
    out = {"masks": sampled.masks, "probs": probs, "base_logits": sampled.base_logits}
    return {**out, "present": sampled.present}

  return propose_batch


def make_mine_scored(config, dataset) -> Callable:
  """(None, keys, Scored) -> as `make_mine_batch`: the second half of mining by a host's judge."""
  pairs_of = _make_pairs_of(config, dataset)

  def mine_scored(weights, keys, scored: Scored):
    del weights
    return pairs_of(keys, *scored[1:])

  return mine_scored


def _make_pairs_of(config, dataset) -> Callable:
  """(keys, masks, base_logits, scores, probs, present) -> what `make_mine_batch` says."""
  consensus = config.finetune.terms.consensus
  rule, sizes_of = make_rule(config), make_sizes(config, dataset)
  region_options = {"classes": config_lib.region_classes(config)}

  def pairs_of(keys, masks, base_logits, scores, probs, present=None):
    if present is not None:
      scores = jnp.where(present, scores, jnp.nan)
    mined = rule(keys, sizes_of(masks), scores, present)
    take = jax.vmap(lambda masks, places: masks[places])
    chosen, rejected = take(masks, mined.chosen), take(masks, mined.rejected)

    def pack(masks):
      return bit_planes.pack(masks, dataset.num_classes, dataset.spatial_dims)

    more = {}
    if consensus.weight > 0:
      more["consensus"] = mean_probs(scores, probs, consensus.temperature, present)
    if config_lib.weighs_images(config):
      more["top_score"] = jnp.max(jnp.where(jnp.isfinite(scores), scores, -jnp.inf), axis=1)
    return {
      **more,
      "masks": masks,
      "scores": scores,
      "pairs": mined,
      "chosen": pack(chosen),
      "rejected": pack(rejected),
      "reference_margin": losses.pair_margin(base_logits, chosen, rejected, **region_options),
      "reference_log_prob": losses.pair_log_prob(base_logits, chosen, rejected, **region_options),
    }

  return pairs_of


def mean_probs(
  scores: jax.Array, probs: jax.Array, temperature: float, present: jax.Array | None = None
) -> jax.Array:
  """The consensus of an image's proposals: the mean of their probabilities, in 255ths.

  Args:
    scores: f32[b, K]; one that is not finite weighs nothing.
    probs: f32[b, K, *S, C].
    temperature: T of the weights softmax(score / T) of the proposals; 0 weighs them equally.
    present: bool[b, K], the proposals that count; None for all.

  Returns:
    u8[b, *S, C].
  """
  ranked = jnp.where(jnp.isfinite(scores), scores, -jnp.inf)
  weight = jax.nn.softmax(ranked / temperature) if temperature > 0 else jnp.ones_like(scores)
  if present is not None:
    weight = jnp.where(present, weight, 0.0)
  weight = weight / jnp.sum(weight, axis=1, keepdims=True)
  weight = weight.reshape(*weight.shape, *(1,) * (probs.ndim - 2))
  mean = jnp.sum(jnp.where(weight > 0, weight * probs, 0.0), axis=1)
  return jnp.round(255 * mean).astype(jnp.uint8)


def with_keys(function: Callable) -> Callable:
  """(weights, key, batch): `function` with each image's keys for sampling, judging and mining.

  They come from the image's place in the data set alone.
  """

  def keyed(weights, key, batch: types.Batch):
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(batch.index)
    return function(weights, keys, batch)

  return keyed
