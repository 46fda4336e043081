"""The loss of fine-tuning: a preference objective on mined pairs, with an anchor if asked."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rndpo_jax import losses, types
from rndpo_jax.data import augment
from rndpo_jax.losses import bit_planes, objectives


def make_loss_fn(
  segmenter: types.Segmenter,
  *,
  num_classes: int,
  size: tuple[int, ...],
  objective_options: dict,
  region_classes: tuple[int, ...] | None = None,
  reference: str = "cached",
  augment_options: dict | None = None,
  anchor: str = "none",
  anchor_weight: float = 0.0,
  dice_weight: float = 0.0,
  has_ignored: bool = False,
):
  """(params, types.PairBatch, types.StepInputs) -> (loss f32[], metrics of f32[]).

  Dropout is off, so h is 0 at step 0. Log-ratios cost a logsumexp a pixel: where the objective does
  not read them they are computed at logged steps alone, and their metrics are NaN at the others.

  Args:
    segmenter: of the policy, and of the reference where it is online.
    num_classes: C.
    size: S, the model's grid.
    objective_options: keyword arguments of `preference.preference_loss`; the beta of the inputs
      takes the place of the one here.
    region_classes: see `margins.region`.
    reference: "cached" (margins in the batch), "online" (parameters in the inputs) or "none" (a
      reference margin of 0).
    augment_options: of `augment.augment`, or None.
    anchor: "none", "chosen" (adds cross-entropy against the chosen masks) or "labelled" (adds the
      supervised loss on labelled images).
    anchor_weight: factor of the anchor.
    dice_weight: of the supervised loss on labelled images.
    has_ignored: of the same, see `segmentation.cross_entropy`.
  """
  region_options = {"classes": region_classes}
  read_reference = _make_reference(reference, segmenter.apply, region_options)
  add_anchor = _make_anchor(anchor, segmenter.apply, dice_weight, has_ignored)
  reads_log_ratios = bool(objectives.readers(objective_options["objective"], "log_ratios"))

  def loss_fn(params, batch: types.PairBatch, inputs: types.StepInputs):
    images, masks = _images_and_masks(batch, inputs.key, size, num_classes, augment_options)
    logits = segmenter.apply(params, images)
    reference_margin, frozen_log_prob = read_reference(batch, images, masks, inputs.reference)
    margin, region_size = losses.margin_and_size(logits, *masks, **region_options)

    def log_probs(logits):
      return losses.pair_log_prob(logits, *masks, **region_options), frozen_log_prob()

    if reads_log_ratios:
      policy_log_prob, reference_log_prob = log_probs(logits)
    else:
      policy_log_prob, reference_log_prob = _if_logged(log_probs, logits, inputs, margin)
    beta = {} if inputs.beta is None else {"beta": inputs.beta}
    loss, metrics = losses.preference_loss(
      margin,
      reference_margin,
      region_size,
      weight=batch.weight,
      policy_log_prob=policy_log_prob,
      reference_log_prob=reference_log_prob,
      voxel_volume=batch.voxel_volume[:, None],
      **{**objective_options, **beta},
    )
    if add_anchor is not None:
      # Of the pairs that the loss is a mean of, so that parts of a batch add up.
      weight = batch.weight * (region_size > 0)
      metrics["anchor"] = add_anchor(params, batch, logits, masks[0], weight)
      loss = loss + anchor_weight * metrics["anchor"]
    return loss, metrics

  return loss_fn


def _images_and_masks(batch: types.PairBatch, key, size, num_classes, augment_options):
  """(images f32[B, *S, I], [chosen, rejected] u8[B, P, *S]), augmented together."""
  masks = [bit_planes.unpack(mask, size, num_classes) for mask in (batch.chosen, batch.rejected)]
  if augment_options is None:
    return batch.images, masks
  images, both = augment.augment(
    key, batch.images, jnp.concatenate(masks, axis=1), **augment_options
  )
  return images, jnp.split(both, 2, axis=1)


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
  """Both log-probabilities, without gradient, where the step is logged; else NaN for both."""
  logits = jax.lax.stop_gradient(logits)
  if inputs.is_logged is True:
    return log_probs(logits)
  unknown = jnp.full(margin.shape, jnp.nan)
  return jax.lax.cond(inputs.is_logged, log_probs, lambda _: (unknown, unknown), logits)


def _make_anchor(
  kind: str, apply: Callable, dice_weight: float, has_ignored: bool
) -> Callable | None:
  """(params, batch, logits, chosen, weight f32[B, P]) -> f32[], or None without an anchor."""

  def chosen_masks(params, batch, logits, chosen, weight):
    """Mean over pairs and pixels of -log softmax(z_p)[y+_p]."""
    del params, batch
    entropy = jax.vmap(losses.cross_entropy, in_axes=(None, 1), out_axes=1)(logits, chosen)
    return jnp.sum(entropy * weight) / jnp.maximum(jnp.sum(weight), 1e-12)

  def labelled_images(params, batch, logits, chosen, weight):
    del logits, chosen, weight
    logits = apply(params, batch.labelled["image"])
    labels, options = batch.labelled["label"], {"dice_weight": dice_weight}
    return losses.supervised_loss(logits, labels, **options, has_ignored=has_ignored)[0]

  return {"none": None, "chosen": chosen_masks, "labelled": labelled_images}[kind]
