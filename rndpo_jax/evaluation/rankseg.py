"""A baseline without training: the masks of which the base's probabilities expect the best Dice.

Of each record and foreground class, with p the probabilities of the class on the record's own grid,

    d = max over t of (2 (p_(1) + ... + p_(t)) + 1) / (t + sum p + 1)      p_(1) >= p_(2) >= ...

and the class claims the pixels with 2 p > d, which are those of the best t: a pixel raises a ratio
if what it adds to it is larger. So the threshold is d / 2, an image's own and at most 1/2. A pixel
that several classes claim goes to the likeliest of them, one that none claims to the background.
This is the rule of Dai and Li, "RankSEG: A Consistent Ranking-based Framework for Segmentation",
JMLR 2023, with the expectation of the ratio taken as the ratio of expectations, which many pixels
make close; compare Wang and Dai, "RankSEG-RMA", NeurIPS 2025. Nothing is tuned. `argmax` is the
rule for pixel accuracy instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import models
from rndpo_jax.evaluation import cases, predict, results, stitched
from rndpo_jax.runtime import sharding

FOLDER = "rankseg"  # in `evaluate/`


def of_base(config, evaluation: predict.Evaluation) -> list[results.Case]:
  """Pixel counts of every case by this rule, from `evaluate/rankseg/` if known.

  Args:
    config: the whole config.
    evaluation: of the run; step 0 is the base.
  """
  dataset = evaluation.dataset
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  folder = evaluation.folder / FOLDER
  folder.mkdir(exist_ok=True)
  evaluation = evaluation._replace(folder=folder)
  if dataset.native is not None:
    stitch = stitched.make(segmenter, dataset, evaluation.mirror_axes, best_mask)
    return cases.overlap_cases(evaluation._replace(stitched=stitch), step=0)
  apply = predict.programs(segmenter, mirror=bool(evaluation.mirror_axes)).apply
  to_masks = sharding.over_local_devices(lambda _, arguments: native_masks(*arguments))

  def predict_batch(params, images, resize):
    return to_masks(None, (apply(params, images), resize))

  return cases.overlap_cases(evaluation._replace(predict_batch=predict_batch), step=0)


def native_masks(logits: jax.Array, resize: Sequence[jax.Array]) -> jax.Array:
  """As `predict.native_masks`, by the rule above in place of the argmax.

  Args:
    logits: f32[B, *size, C].
    resize: of `predict.resize_matrices`; where its rows are zeros the background is certain.

  Returns:
    u8[B, *N].
  """

  def one(item):
    values, matrices = item
    values = predict.on_own_grid(values, matrices)
    return best_masks(jax.nn.softmax(values, axis=-1) * predict.is_seen(matrices)[..., None])

  return jax.lax.map(one, (logits, tuple(resize)))


def best_masks(probs: jax.Array) -> jax.Array:
  """The rule above.

  Args:
    probs: f32[*N, C] of one image; pixels of zeros are background.

  Returns:
    u8[*N].
  """
  chex.assert_rank(probs, {2, 3, 4})
  foreground = jnp.moveaxis(probs[..., 1:], -1, 0)

  def claimed(p):
    falling = -jnp.sort(-p.ravel())
    total = jnp.sum(falling)
    expected = (2 * jnp.cumsum(falling) + 1) / (jnp.arange(1, p.size + 1) + total + 1)
    best = jnp.maximum(jnp.max(expected), 1 / (total + 1))
    return jnp.where(2 * p > best, p, 0.0)

  found = jax.lax.map(claimed, foreground)
  likeliest = jnp.argmax(found, axis=0) + 1
  return jnp.where(jnp.max(found, axis=0) > 0, likeliest, 0).astype(jnp.uint8)


def best_mask(probs: np.ndarray) -> np.ndarray:
  """`best_masks` on the host, of a record of any size: the values of float16 are few, so that they
  are counted in place of being sorted. Of equal ones the ratio is highest with all or with none.

  Args:
    probs: f16[*S, C] of one record.

  Returns:
    u8[*S].
  """
  chex.assert_type(probs, np.float16)
  bits = np.arange(int(np.float16(1).view(np.uint16)) + 1, dtype=np.uint16)[::-1]
  values = bits.view(np.float16).astype(np.float64)  # all that there are, falling from 1 to 0
  mask, likeliest = np.zeros(probs.shape[:-1], np.uint8), np.zeros(probs.shape[:-1], np.float16)
  for label in range(1, probs.shape[-1]):
    p = np.ascontiguousarray(probs[..., label])
    counts = sum(np.bincount(part.view(np.uint16).ravel(), minlength=len(bits)) for part in p)[::-1]
    reached = np.cumsum(counts * values)
    best = np.max((2 * reached + 1) / (np.cumsum(counts) + reached[-1] + 1))
    best = max(best, 1 / (reached[-1] + 1))
    claimed = values[2 * values > best]
    if len(claimed):
      better = (p >= np.float16(claimed[-1])) & (p > likeliest)
      mask[better], likeliest[better] = label, p[better]
  return mask
