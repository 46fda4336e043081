"""What prediction computes on the devices besides evaluation's masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rndpo_jax import config as config_lib
from rndpo_jax import seeds, types
from rndpo_jax.evaluation import predict
from rndpo_jax.mining import judges, overlap, proposals

SCORES = ("agreement", "confidence", "entropy")


def drawn_mix(mix: str) -> str:
  """What a mix draws of the one network; the default mix if that makes no two proposals.

  New images have no masks in files, and there is no other member of an ensemble.
  """
  parts = [entry.strip().partition(":") for entry in mix.split(",")]
  parts = [part for part in parts if not {"file", "member"} & set(part[0].strip().split("+"))]
  if sum(int(count) for _, _, count in parts) < 2:
    return config_lib.base_config().proposals.mix
  return ",".join(map("".join, parts))


def make_scores(config, segmenter: types.Segmenter, num_classes: int) -> Callable:
  """Scores of masks by what judges look at where there is no truth.

  Args:
    config: `proposals`, `judge.border` and `seed` are read.
    segmenter: of the network.
    num_classes: C.

  Returns:
    scores(params, (images f32[b, *S, I], logits f32[b, *S, C], number u32[b])) -> {"agreement",
    "confidence", "entropy", "weight"}, f32[b] each. With y the argmax of `logits` and m_1..m_K the
    proposals that `config.proposals` draws of `params` (by `drawn_mix`),
    keys folded from `number`:

      agreement   the mean over k of the mean foreground Dice of y and m_k
      confidence  `judges.confidence` of y under the K proposals' mean probabilities
      entropy     `judges.entropy` of y under softmax(logits); an empty y is seen on the whole image
      weight      pixels that are foreground in y or any m_k
  """
  options = {name: value for name, value in config.proposals.items() if name != "mix"}
  mix = proposals.parse_mix(drawn_mix(config.proposals.mix))
  settings = judges.Settings(num_classes, config.judge.border, 0.0, 0.0, None)
  key = seeds.mining_key(config.seed)

  def scores(params, rows):
    images, logits, number = rows
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(number)
    sampled = proposals.sample(segmenter, params, images, keys, mix=mix, **options)
    mask = jnp.argmax(logits, axis=-1).astype(jnp.uint8)[:, None]
    dice = overlap.pairwise_dice(mask, sampled.masks, num_classes)
    probs = jax.nn.softmax(sampled.logits, axis=-1)
    own = jax.nn.softmax(logits, axis=-1)[:, None]
    seen = jnp.any(jnp.concatenate([mask, sampled.masks], axis=1) > 0, axis=1)
    return {
      "agreement": jnp.mean(dice[:, 0], axis=-1),
      "confidence": judges.confidence(images, mask, probs, None, settings)[:, 0],
      "entropy": judges.entropy(images, mask, own, None, settings)[:, 0],
      "weight": jnp.sum(seen, axis=range(1, seen.ndim), dtype=jnp.float32),
    }

  return scores


def native_probabilities(logits: jax.Array, resize: Sequence[jax.Array]) -> jax.Array:
  """The softmax of logits on the records' own grids, beside `predict.native_masks`.

  Args:
    logits: f32[B, *size, C].
    resize: of `predict.resize_matrices`; where its rows are zeros the background is certain.

  Returns:
    f16[B, *N, C].
  """

  def one(item):
    values, matrices = item
    values, seen = predict.on_own_grid(values, matrices), predict.is_seen(matrices)
    background = jax.nn.one_hot(jnp.zeros(seen.shape, jnp.int32), values.shape[-1])
    found = jnp.where(seen[..., None], jax.nn.softmax(values, axis=-1), background)
    return found.astype(jnp.float16)

  return jax.lax.map(one, (logits, tuple(resize)))
