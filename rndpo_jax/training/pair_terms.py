"""Terms of fine-tuning's loss on mined pairs: preference, chosen and consensus.

They share one forward of the policy, on the images as they were mined or, augmented, on a view in
which image and masks move together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import losses, types
from rndpo_jax.data import augment
from rndpo_jax.losses import bit_planes, consistency, objectives
from rndpo_jax.training import term_inputs


class Settings(NamedTuple):
  """What the terms on pairs share.

  Attributes:
    apply: (params, images, key=None) -> logits f32[B, *S, C].
    num_classes: C.
    size: S, the model's grid.
    objective: keyword arguments of `preference.preference_loss`; the beta of the inputs and the
      smoothing of a batch take the place of those here.
    region_classes: see `margins.region`.
    reference: "cached" (margins in the batch), "online" (parameters in the inputs) or "none" (a
      reference margin of 0).
    augment: options of `augment.augment`, or None.
    strong: options of `term_inputs.strong_view`, or None: what the policy alone sees.
    dropout: whether the policy has dropout on.
    dice_weight: factor of soft Dice beside cross-entropy.
  """

  apply: Callable[..., jax.Array]
  num_classes: int
  size: tuple[int, ...]
  objective: Mapping[str, Any]
  region_classes: tuple[int, ...] | None = None
  reference: str = "cached"
  augment: Mapping[str, float] | None = None
  strong: Mapping[str, float] | None = None
  dropout: bool = False
  dice_weight: float = 0.0


def make(settings: Settings, terms: Mapping[str, Mapping[str, Any]]) -> Callable:
  """(params, PairBatch, StepInputs, view key, dropout key) -> (name -> loss f32[], metrics).

  Without augmentation and dropout h is 0 at step 0. Log-ratios cost a logsumexp a pixel: if the
  objective does not read them they are computed at logged steps alone, and their metrics are NaN at
  the others. The metric "weight" is what the losses are means over.

  Args:
    settings: see there.
    terms: of `preference`, `chosen`, `consensus` those with a weight above 0, with their options.
  """
  preference = _make_preference(settings)

  def pair_losses(params, batch: types.PairBatch, inputs: types.StepInputs, key, dropout_key):
    images, masks, consensus = _view(settings, batch, inputs.key)
    seen = images
    if settings.strong is not None:
      seen = term_inputs.strong_view(key, images, settings.strong)
    logits = settings.apply(params, seen, *([dropout_key] if settings.dropout else []))
    found, metrics = {}, {}
    if "preference" in terms:
      found["preference"], metrics = preference(batch, images, logits, masks, inputs)
    if "chosen" in terms:
      # Of the pairs that the preference loss is a mean of, so that parts of a batch add up.
      size = losses.region_size(*masks, classes=settings.region_classes)
      weight = batch.weight * (size > 0)
      metrics.setdefault("weight", jnp.sum(weight))
      if (temperature := terms["chosen"]["image_temperature"]) > 0:
        weight = weight * image_weights(batch.top_score, temperature)[:, None]
      found["chosen"] = _chosen(logits, masks[0], weight, settings.dice_weight)
    if "consensus" in terms:
      values = consistency.soft_label_loss(logits, consensus)
      if (temperature := terms["consensus"]["image_temperature"]) > 0:
        values = values * image_weights(batch.top_score, temperature)
      found["consensus"] = jnp.mean(values)
    return found, metrics

  return pair_losses


def _make_preference(settings: Settings) -> Callable:
  """(PairBatch, images, logits, masks, StepInputs) -> (loss f32[], metrics)."""
  region_options = {"classes": settings.region_classes}
  read_reference = _make_reference(settings.reference, settings.apply, region_options)
  reads_log_ratios = bool(objectives.readers(settings.objective["objective"], "log_ratios"))

  def preference(batch, images, logits, masks, inputs):
    reference_margin, frozen_log_prob = read_reference(batch, images, masks, inputs.reference)
    margin, region_size = losses.margin_and_size(logits, *masks, **region_options)

    def log_probs(logits):
      return losses.pair_log_prob(logits, *masks, **region_options), frozen_log_prob()

    if reads_log_ratios:
      policy_log_prob, reference_log_prob = log_probs(logits)
    else:
      policy_log_prob, reference_log_prob = _if_logged(log_probs, logits, inputs, margin)
    own = {} if inputs.beta is None else {"beta": inputs.beta}
    if batch.smoothing is not None:
      own["label_smoothing"] = batch.smoothing
    return losses.preference_loss(
      margin,
      reference_margin,
      region_size,
      weight=batch.weight,
      policy_log_prob=policy_log_prob,
      reference_log_prob=reference_log_prob,
      voxel_volume=batch.voxel_volume[:, None],
      **{**settings.objective, **own},
    )

  return preference


def image_weights(top_score: jax.Array, temperature: float) -> jax.Array:
  """Weights of the images of a batch by their judge's top scores, with mean 1.

      w = B softmax(top_score / temperature)

  An image of whose proposals one is sure to be good teaches more than one on which all are poor.

  Args:
    top_score: f32[B].
    temperature: in the unit of the score, above 0.

  Returns:
    f32[B].
  """
  return len(top_score) * jax.nn.softmax(top_score / temperature)


def _chosen(logits, chosen, weight, dice_weight):
  """Cross-entropy + dice_weight * soft Dice loss against the chosen masks, mean over the pairs."""

  def of_slot(masks):
    dice = losses.soft_dice_loss(logits, masks)
    return losses.cross_entropy(logits, masks) + dice_weight * dice

  values = jax.vmap(of_slot, in_axes=1, out_axes=1)(chosen)
  return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-12)


def _view(settings: Settings, batch: types.PairBatch, key):
  """(images f32[B, *S, I], [chosen, rejected] u8[B, P, *S], consensus or None), moved together."""
  size, num_classes = settings.size, settings.num_classes
  masks = [bit_planes.unpack(mask, size, num_classes) for mask in (batch.chosen, batch.rejected)]
  images, consensus = batch.images, None
  parts = list(masks)
  if batch.consensus is not None:
    parts.append(jnp.moveaxis(batch.consensus, -1, 1))
  if settings.augment is not None:
    images, both = augment.augment(key, images, jnp.concatenate(parts, axis=1), **settings.augment)
    count = batch.chosen.shape[1]
    parts = jnp.split(both, [count, 2 * count], axis=1)
  if batch.consensus is not None:
    consensus = jnp.moveaxis(parts[2], 1, -1).astype(jnp.float32)
    consensus = consensus / jnp.sum(consensus, axis=-1, keepdims=True)
  return images, parts[:2], consensus


def _make_reference(kind: str, apply: Callable, region_options: dict) -> Callable:
  """(batch, images, masks, params or None) -> (margin f32[B, P], () -> log-prob f32[B, P])."""

  def cached(batch, images, masks, params):
    del images, masks, params
    return batch.reference_margin, lambda: batch.reference_log_prob

  def online(batch, images, masks, params):
    del batch
    logits = apply(params, images)
    margin = losses.pair_margin(logits, *masks, **region_options)
    return margin, lambda: losses.pair_log_prob(logits, *masks, **region_options)

  def none(batch, images, masks, params):
    del images, masks, params
    zeros = jnp.zeros(batch.reference_margin.shape)
    return zeros, lambda: zeros

  return {"cached": cached, "online": online, "none": none}[kind]


def _if_logged(log_probs: Callable, logits, inputs: types.StepInputs, margin):
  """Both log-probabilities, without gradient, if the step is logged; else NaN for both."""
  logits = jax.lax.stop_gradient(logits)
  if inputs.is_logged is True:
    return log_probs(logits)
  unknown = jnp.full(margin.shape, jnp.nan)
  return jax.lax.cond(inputs.is_logged, log_probs, lambda _: (unknown, unknown), logits)
