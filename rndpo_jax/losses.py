"""Supervised and preference losses, normalised on the device.

A segmenter gives logits z with pixels independent given the image, so that
log pi(y|x) = sum_p log softmax(z_p)[y_p]. For a pair of masks (chosen y+, rejected y-) with
disagreement region D = {p : y+_p != y-_p} the log-partition cancels exactly:

    margin(z) = log pi(y+|x) - log pi(y-|x) = sum_{p in D} (z_p[y+_p] - z_p[y-_p])

With one logit a pixel (C = 1, sigmoid) the same algebra holds with z_p[y] = (2y - 1) z_p / 2.
No log-softmax and no gather is needed, and the gradient with respect to the logits is one scalar
a pair times (onehot(y+) - onehot(y-)): zero outside D.

Sources: DPO is Rafailov et al., "Direct Preference Optimization", NeurIPS 2023. RN-DPO, which
divides the preference update by |D|, is Kalisch et al., "Region-Normalized DPO for Medical Image
Segmentation under Noisy Judges", 2026.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import types

Metrics = dict[str, jax.Array]


def cross_entropy(logits: types.Array, labels: types.Array) -> jax.Array:
  """Mean over pixels of -log softmax(z_p)[y_p].

  Args:
    logits: f[B, *S, C], C >= 2.
    labels: u8[B, *S].

  Returns:
    f32[B], one value an image.
  """
  chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
  logits = logits.astype(jnp.float32)
  onehot = labels[..., None] == _class_ids(logits)
  log_partition = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.sum(jnp.where(onehot, logits, 0.0), axis=-1)
  return jnp.mean(log_partition - picked, axis=tuple(range(1, labels.ndim)))


def soft_dice_loss(logits: types.Array, labels: types.Array, *, smooth: float = 1.0) -> jax.Array:
  """One minus soft Dice, mean over the foreground classes.

  Dice_c = (2 sum_p q_pc y_pc + smooth) / (sum_p q_pc + sum_p y_pc + smooth), q = softmax(z).
  Source: Milletari et al., "V-Net", 3DV 2016 (here with plain, not squared, sums).

  Args:
    logits: f[B, *S, C], C >= 2.
    labels: u8[B, *S].
    smooth: pixels added to both sides; a class absent from label and prediction costs about 0.

  Returns:
    f32[B].
  """
  chex.assert_equal_shape_prefix([logits, labels], labels.ndim)
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  onehot = (labels[..., None] == _class_ids(logits)).astype(jnp.float32)
  space = tuple(range(1, labels.ndim))
  overlap = jnp.sum(probs * onehot, axis=space)[:, 1:]
  total = jnp.sum(probs + onehot, axis=space)[:, 1:]
  return jnp.mean(1.0 - (2.0 * overlap + smooth) / (total + smooth), axis=-1)


def supervised_loss(
  logits: types.Array, labels: types.Array, *, dice_weight: float
) -> tuple[jax.Array, Metrics]:
  """Cross-entropy + dice_weight * soft Dice loss, mean over the batch.

  Args:
    logits: f[B, *S, C].
    labels: u8[B, *S].
    dice_weight: factor of the Dice term.

  Returns:
    (f32[], {"cross_entropy", "dice_loss"}).
  """
  entropy = jnp.mean(cross_entropy(logits, labels))
  dice = jnp.mean(soft_dice_loss(logits, labels))
  return entropy + dice_weight * dice, {"cross_entropy": entropy, "dice_loss": dice}


def region_size(chosen: types.Array, rejected: types.Array, *, spatial_dims: int = 2) -> jax.Array:
  """|D|, the number of pixels where two masks differ.

  Args:
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    spatial_dims: length of S.

  Returns:
    i32[B] or i32[B, P]; 0 for identical masks.
  """
  chex.assert_equal_shape([chosen, rejected])
  return jnp.sum(chosen != rejected, axis=tuple(range(-spatial_dims, 0)), dtype=jnp.int32)


def pair_margin(logits: types.Array, chosen: types.Array, rejected: types.Array) -> jax.Array:
  """margin(z) = sum_{p in D} (z_p[y+_p] - z_p[y-_p]), a sum over D (not a mean).

  Sums run in float32 whatever the dtype of the logits.

  Args:
    logits: f[B, *S, C]; C = 1 stands for one sigmoid logit a pixel.
    chosen: u8[B, *S], or u8[B, P, *S] for P pairs of each image.
    rejected: like `chosen`.

  Returns:
    f32[B] or f32[B, P]; 0 for identical masks.
  """
  chex.assert_equal_shape([chosen, rejected])
  if chosen.ndim == logits.ndim:
    return jax.vmap(pair_margin, in_axes=(None, 1, 1), out_axes=1)(logits, chosen, rejected)
  chex.assert_equal_shape_prefix([logits, chosen], chosen.ndim)
  logits = logits.astype(jnp.float32)
  if logits.shape[-1] == 1:
    # (2y+ - 1) z / 2 - (2y- - 1) z / 2 = (y+ - y-) z
    sign = (chosen.astype(jnp.int8) - rejected.astype(jnp.int8)).astype(jnp.float32)[..., None]
  else:
    classes = _class_ids(logits)
    plus = (chosen[..., None] == classes).astype(jnp.float32)
    sign = plus - (rejected[..., None] == classes).astype(jnp.float32)
  # Outside D the factor is zero, yet 0 * inf is not: keep such logits out of the sum.
  terms = jnp.where(sign == 0.0, 0.0, logits) * sign
  return jnp.sum(terms, axis=tuple(range(1, logits.ndim)))


def preference_loss(
  policy_margin: types.Array,
  reference_margin: types.Array,
  size: types.Array,
  *,
  objective: str = "rn_dpo",
  beta: float,
  weight: types.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """DPO or RN-DPO on margins, mean over the pairs that carry information.

      h      = policy_margin - reference_margin           summed over D
      dpo    = -log sigmoid(beta * h)                     sum over D
      rn_dpo = -log sigmoid(beta * h / |D|)               mean over D

  On a pair with |D| pixels the two agree when beta_rn_dpo = beta_dpo * |D|; to move a DPO beta
  over, multiply it by the typical |D| of the pairs. A pair with |D| = 0 says nothing: it gets
  weight zero, is counted in `num_empty`, and leaves loss and gradient finite. With no informative
  pair at all the loss is 0.

  Args:
    policy_margin: f32[B] or f32[B, P].
    reference_margin: like `policy_margin`; no gradient flows into it.
    size: i32, like `policy_margin`: |D|.
    objective: "rn_dpo" or "dpo".
    beta: strength; with rn_dpo near 10, with dpo near 10 / typical |D|.
    weight: f32, like `policy_margin`, or None for ones; 0 marks a slot without a pair.

  Returns:
    (loss f32[], metrics): loss, accuracy (share of pairs with h > 0, ties one half), h_mean (sum
    over D), num_pairs, num_empty.

  Raises:
    ValueError: on an unknown objective.
  """
  chex.assert_equal_shape([policy_margin, reference_margin, size])
  if objective not in ("dpo", "rn_dpo"):
    raise ValueError(f"objective: found {objective!r}, expected 'dpo' or 'rn_dpo'")
  h = policy_margin.astype(jnp.float32) - jax.lax.stop_gradient(reference_margin)
  weight = jnp.ones_like(h) if weight is None else weight.astype(jnp.float32)
  informative = jnp.where(size > 0, weight, 0.0)
  total = jnp.maximum(jnp.sum(informative), 1e-12)
  scale = beta / jnp.maximum(size, 1).astype(jnp.float32) if objective == "rn_dpo" else beta
  losses = jax.nn.softplus(-scale * h)

  def mean(values):
    return jnp.sum(values * informative) / total

  loss = mean(losses)
  metrics = {
    "loss": loss,
    "accuracy": mean(jnp.where(h > 0, 1.0, jnp.where(h == 0, 0.5, 0.0))),
    "h_mean": mean(h),
    "num_pairs": jnp.sum(informative > 0),
    "num_empty": jnp.sum((size == 0) & (weight > 0)),
  }
  return loss, metrics


def _logits_loss(policy_logits, reference_logits, chosen, rejected, *, objective, beta):
  size = region_size(chosen, rejected, spatial_dims=policy_logits.ndim - 2)
  return preference_loss(
    pair_margin(policy_logits, chosen, rejected),
    pair_margin(reference_logits, chosen, rejected),
    size,
    objective=objective,
    beta=beta,
  )


def rn_dpo_loss(
  policy_logits: types.Array,
  reference_logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  beta: float,
) -> tuple[jax.Array, Metrics]:
  """RN-DPO from logits: -log sigmoid(beta * h / |D|), a mean over D.

  Args:
    policy_logits: f[B, *S, C].
    reference_logits: f[B, *S, C]; no gradient flows into it.
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    beta: near 10; beta_rn_dpo = beta_dpo * |D|.

  Returns:
    (loss f32[], metrics of `preference_loss`).
  """
  return _logits_loss(
    policy_logits, reference_logits, chosen, rejected, objective="rn_dpo", beta=beta
  )


def dpo_loss(
  policy_logits: types.Array,
  reference_logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  beta: float,
) -> tuple[jax.Array, Metrics]:
  """DPO from logits: -log sigmoid(beta * h), a sum over D. Arguments as in `rn_dpo_loss`."""
  return _logits_loss(policy_logits, reference_logits, chosen, rejected, objective="dpo", beta=beta)


def _class_ids(logits: jax.Array) -> jax.Array:
  """Class ids u8[1, ..., C], shaped to compare with labels[..., None]."""
  ids = jnp.arange(logits.shape[-1], dtype=jnp.uint8)
  return ids.reshape((1,) * (logits.ndim - 1) + (-1,))
