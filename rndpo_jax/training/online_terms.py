"""Preferences on pairs that are made while training: the policy proposes, its teacher judges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import losses
from rndpo_jax.losses import objectives
from rndpo_jax.mining import overlap, proposals
from rndpo_jax.training.term_inputs import Inputs


def online(inputs: Inputs, options: Mapping[str, Any]):
  """`finetune.objective` on the best of the policy's proposals against a random other one.

  The proposals are the policy's mask of the weak view and `num_proposals` - 1 of its logits under
  noise and a shifted threshold, see `proposals.perturbed`. The score of a mask is the Dice that the
  moving average's probabilities expect of it, see `overlap.expected_dice`. Masks and scores carry
  no gradient; the reference is the frozen base on the same view. The mean runs over the images,
  those without a pair (equal scores or masks) counting 0. |D| is in pixels.
  Source of the use: Guo et al., "Direct Language Model Alignment from Online AI Feedback", 2024,
  with the moving average as the annotator.

  Returns:
    (f32[], {"pairs": share of the images with a pair, "gap": mean score gap of those}).
  """
  settings, images = inputs.settings, inputs.weak
  logits = settings.apply(inputs.params, images)
  noise_key, pair_key = jax.random.split(inputs.key)
  proposed = proposals.perturbed(
    jax.lax.stop_gradient(logits),
    noise_key,
    options["num_proposals"],
    noise_scale=options["noise_scale"],
    noise_smoothing=options["noise_smoothing"],
    threshold_shift=options["threshold_shift"],
  )
  masks = jnp.argmax(proposed, axis=-1).astype(jnp.uint8)
  teacher = jax.nn.softmax(jax.lax.stop_gradient(settings.teach(inputs.teacher, images)))
  scores = overlap.expected_dice(masks, teacher, settings.num_classes)
  chosen, rejected, gap = top_against_random(pair_key, masks, scores)
  return _preference(inputs, images, logits, (chosen, rejected), gap)


def top_against_random(key: jax.Array, masks: jax.Array, scores: jax.Array):
  """The mask of the highest score, the first of equals, and another one drawn at random.

  Args:
    key: one key.
    masks: u8[B, K, *S]; K >= 2.
    scores: f32[B, K].

  Returns:
    (chosen u8[B, *S], rejected u8[B, *S], the gap of their scores f32[B]).
  """
  chex.assert_equal_shape_prefix([masks, scores], 2)
  count = scores.shape[1]
  top = jnp.argmax(scores, axis=1)
  other = jax.random.randint(key, top.shape, 0, count - 1)
  other = other + (other >= top)

  def take(places):
    rows = places.reshape(-1, *(1,) * (masks.ndim - 1))
    return jnp.take_along_axis(masks, rows, axis=1)[:, 0]

  gap = [jnp.take_along_axis(scores, places[:, None], axis=1)[:, 0] for places in (top, other)]
  return take(top), take(other), gap[0] - gap[1]


def _preference(inputs: Inputs, images, logits, masks, gap):
  """(loss, metrics) of one pair an image; the pairs weigh 1 where there is a gap."""
  settings, region = inputs.settings, {"classes": inputs.settings.region_classes}
  frozen = jax.lax.stop_gradient(settings.apply(inputs.base, images))
  margin, size = losses.margin_and_size(logits, *masks, **region)
  options = dict(settings.objective)
  if inputs.beta is not None:
    options["beta"] = inputs.beta
  if objectives.readers(options["objective"], "log_ratios"):
    options["policy_log_prob"] = losses.pair_log_prob(logits, *masks, **region)
    options["reference_log_prob"] = losses.pair_log_prob(frozen, *masks, **region)
  weight = (gap > 0).astype(jnp.float32)
  reference = losses.pair_margin(frozen, *masks, **region)
  loss, metrics = losses.preference_loss(margin, reference, size, weight=weight, **options)
  share = metrics["weight"] / len(images)
  counted = weight * (size > 0)
  mean_gap = jnp.sum(gap * counted) / jnp.maximum(jnp.sum(counted), 1.0)
  return loss * share, {"pairs": share, "gap": mean_gap}
