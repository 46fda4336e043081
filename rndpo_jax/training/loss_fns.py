"""The loss of fine-tuning: a preference objective on mined pairs, with an anchor if asked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rndpo_jax import losses, types
from rndpo_jax.data import augment
from rndpo_jax.losses import bit_planes


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
):
  """(params, batch, key, beta=None) -> (loss, metrics); dropout is off, so h is 0 at step 0.

  A beta given there takes the place of the one in `objective_options`.

  Args:
    segmenter: of the policy, and of the reference where it is online.
    num_classes: C.
    size: S, the model's grid.
    objective_options: keyword arguments of `preference.preference_loss`.
    region_classes: see `margins.region`.
    reference: "cached" (margins in the batch), "online" (reference_params in the batch) or
      "none" (a reference margin of 0).
    augment_options: of `augment.augment`, or None.
    anchor: "none", "chosen" (adds cross-entropy against the chosen masks) or "labelled" (adds the
      supervised loss on labelled images).
    anchor_weight: factor of the anchor.
    dice_weight: of the supervised loss on labelled images.

  The batch holds image f32[B, *S, I], chosen and rejected (packed u8[B, P, bits, bytes]),
  reference_margin, reference_log_prob and weight f32[B, P] (0 where a slot has no pair), and
  voxel_volume f32[B]; with a labelled anchor also labelled, as `base.make_loss_fn` takes it.
  """
  which = {"classes": region_classes}

  def loss_fn(params, batch, key, beta=None):
    options = objective_options if beta is None else {**objective_options, "beta": beta}
    images, packed = batch["image"], [batch["chosen"], batch["rejected"]]
    masks = [bit_planes.unpack(mask, size, num_classes) for mask in packed]
    if augment_options is not None:
      both = jnp.concatenate(masks, axis=1)
      images, both = augment.augment(key, images, both, **augment_options)
      packed, masks = None, jnp.split(both, 2, axis=1)
    logits = segmenter.apply(params, images)
    reference_margin, reference_log_prob = batch["reference_margin"], batch["reference_log_prob"]
    if reference == "online":
      frozen = segmenter.apply(batch["reference_params"], images)
      reference_margin = losses.pair_margin(frozen, *masks, **which)
      reference_log_prob = losses.pair_log_prob(frozen, *masks, **which)
    elif reference == "none":
      reference_margin, reference_log_prob = jnp.zeros((2, *reference_margin.shape))
    # Bit planes, where they still stand for the masks: an eighth of the bytes in both passes.
    source = masks if packed is None else packed
    margin, region_size = losses.margin_and_size(
      logits, *source, packed=packed is not None, **which
    )
    loss, metrics = losses.preference_loss(
      margin,
      reference_margin,
      region_size,
      weight=batch["weight"],
      policy_log_prob=losses.pair_log_prob(logits, *masks, **which),
      reference_log_prob=reference_log_prob,
      voxel_volume=batch["voxel_volume"][:, None],
      **options,
    )
    if anchor == "chosen":
      # Of the pairs that the loss is a mean of, so that parts of a batch add up.
      weight = batch["weight"] * (region_size > 0)
      metrics["anchor"] = _chosen_cross_entropy(logits, masks[0], weight)
    elif anchor == "labelled":
      labelled = batch["labelled"]
      metrics["anchor"], _ = losses.supervised_loss(
        segmenter.apply(params, labelled["image"]), labelled["label"], dice_weight=dice_weight
      )
    return loss + anchor_weight * metrics.get("anchor", 0.0), metrics

  return loss_fn


def _chosen_cross_entropy(logits, chosen, weight):
  """Mean over pairs and pixels of -log softmax(z_p)[y+_p]."""
  entropy = jax.vmap(losses.cross_entropy, in_axes=(None, 1), out_axes=1)(logits, chosen)
  return jnp.sum(entropy * weight) / jnp.maximum(jnp.sum(weight), 1e-12)
