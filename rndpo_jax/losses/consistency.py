"""Losses that need no labels: pseudo-labels, consistency between two predictions, entropy.

A teacher (the base, or a moving average of the student) predicts an image, the student predicts
another view of it. No gradient flows into the teacher's logits. Every function gives a mean over
pixels, f32[B]; `weight` f32[B, *S], 1 everywhere by default, takes pixels out by 0: the mean is
over those that weigh, sum_p w_p l_p / sum_p w_p, and 0 for an image of which no pixel weighs.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import types


def pseudo_label_loss(
  logits: types.Array,
  teacher_logits: types.Array,
  *,
  threshold: float = 0.0,
  weight: types.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy against the teacher's class, where the teacher is sure.

      l_p = 1[max_c q_pc >= threshold] * -log softmax(z_p)[argmax_c q_pc],   q = softmax(teacher)

  The mean is over all pixels, sure or not, so that a teacher that is sure of little moves little.
  Sources: Lee, "Pseudo-Label", ICML workshop 2013 (threshold 0); Sohn et al., "FixMatch", NeurIPS
  2020, and Yang et al., "UniMatch", CVPR 2023 (weak view to strong view, threshold 0.95).

  Args:
    logits: f[B, *S, C] of the student, C >= 2.
    teacher_logits: f[B, *S, C].
    threshold: least probability of a class that counts, 0..1.
    weight: f32[B, *S], or None.

  Returns:
    (loss f32[B], share of the pixels that count f32[B]).
  """
  chex.assert_equal_shape([logits, teacher_logits])
  teacher = jax.nn.softmax(_frozen(teacher_logits))
  sure = (jnp.max(teacher, axis=-1) >= threshold).astype(jnp.float32)
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  onehot = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), logits.shape[-1])
  entropy = -jnp.sum(onehot * log_probs, axis=-1)
  return _mean(sure * entropy, weight), _mean(sure, weight)


def soft_label_loss(
  logits: types.Array, probs: types.Array, *, weight: types.Array | None = None
) -> jax.Array:
  """Cross-entropy against probabilities: l_p = -sum_c q_pc log softmax(z_p)[c].

  With the mean of several predictions as q it distils their consensus. Source: Hinton et al.,
  "Distilling the Knowledge in a Neural Network", 2015 (temperature 1).

  Args:
    logits: f[B, *S, C], C >= 2.
    probs: f[B, *S, C], rows that add up to 1; no gradient flows into them.
    weight: f32[B, *S], or None.

  Returns:
    f32[B].
  """
  chex.assert_equal_shape([logits, probs])
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return _mean(-jnp.sum(_frozen(probs) * log_probs, axis=-1), weight)


def consistency_loss(
  logits: types.Array,
  teacher_logits: types.Array,
  *,
  max_entropy: float | None = None,
  weight: types.Array | None = None,
) -> jax.Array:
  """Mean square of the difference of two predictions.

      l_p = 1 / C * sum_c (softmax(z_p)[c] - q_pc)^2,   q = softmax(teacher)

  Sources: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017; with
  `max_entropy` only pixels whose teacher has an entropy below it weigh: Yu et al.,
  "Uncertainty-aware Self-ensembling Model" (UA-MT), MICCAI 2019, who take the entropy of the mean
  of several stochastic passes: hand in the logarithm of that mean as `teacher_logits`.

  Args:
    logits: f[B, *S, C] of the student, C >= 2.
    teacher_logits: f[B, *S, C].
    max_entropy: in nats, at most log C; None lets every pixel weigh.
    weight: f32[B, *S], or None.

  Returns:
    f32[B].
  """
  chex.assert_equal_shape([logits, teacher_logits])
  teacher = jax.nn.softmax(_frozen(teacher_logits))
  probs = jax.nn.softmax(logits.astype(jnp.float32))
  if max_entropy is not None:
    sure = (pixel_entropy(teacher_logits) < max_entropy).astype(jnp.float32)
    weight = sure if weight is None else weight * sure
  return _mean(jnp.mean(jnp.square(probs - teacher), axis=-1), weight)


def entropy_loss(logits: types.Array, *, weight: types.Array | None = None) -> jax.Array:
  """The prediction's own entropy, l_p = -sum_c q_pc log q_pc, in nats.

  Source: Grandvalet and Bengio, "Semi-supervised Learning by Entropy Minimization", NIPS 2004.

  Args:
    logits: f[B, *S, C], C >= 2.
    weight: f32[B, *S], or None.

  Returns:
    f32[B].
  """
  return _mean(pixel_entropy(logits), weight)


def pixel_entropy(logits: types.Array) -> jax.Array:
  """Entropy of softmax(logits) in nats, f32[B, *S], 0..log C."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def _frozen(values: types.Array) -> jax.Array:
  return jax.lax.stop_gradient(jnp.asarray(values, jnp.float32))


def _mean(values: jax.Array, weight: types.Array | None) -> jax.Array:
  """f32[B]: mean over the pixels of each image, by weight."""
  space = tuple(range(1, values.ndim))
  if weight is None:
    return jnp.mean(values, axis=space)
  chex.assert_equal_shape([values, weight])
  weight = weight.astype(jnp.float32)
  # Selected, so that a pixel without weight may hold anything.
  total = jnp.sum(jnp.where(weight > 0, values * weight, 0.0), axis=space)
  return total / jnp.maximum(jnp.sum(weight, axis=space), 1e-12)
