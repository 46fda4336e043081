"""Judges: automatic quality signals that score the proposals of an image, higher is better.

A judge is a pure function (images f32[b, *S, I], masks u8[b, K, *S], probs f32[b, K, *S, C],
context) -> f32[b, K]. Only the order and the gaps of scores within an image are used. `oracle`
and `noisy_oracle` read labels and are for studies; no other judge does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import overlap, types


class Context(NamedTuple):
  """What a judge may need besides images and proposals; None where there is none.

  Attributes:
    keys: [b], one key an image.
    ensemble_masks: u8[b, M, *S], masks of other base models.
    labels: u8[b, *S]; given to `oracle` and `noisy_oracle` alone.
    learned_params: parameters of the learned judge.
  """

  keys: jax.Array
  ensemble_masks: jax.Array | None = None
  labels: jax.Array | None = None
  learned_params: types.Params | None = None


class Settings(NamedTuple):
  """Settings of the judges; see `build`."""

  num_classes: int
  border: int
  flip_rate: float
  noise_level: float
  learned_apply: Callable[..., jax.Array] | None


def build(
  name: str,
  *,
  num_classes: int,
  border: int,
  flip_rate: float,
  noise_level: float,
  learned_apply: Callable[..., jax.Array] | None = None,
) -> Callable[..., jax.Array]:
  """Builds a judge by name.

  Args:
    name: a key of JUDGES, or `package.module:function` for a function of your own, called as
      function(images, masks, probs) -> [b, K] inside a compiled program.
    num_classes: C.
    border: pixels around a mask that `confidence` and `entropy` look at too.
    flip_rate: `noisy_oracle`: share of images whose ranking is reversed.
    noise_level: `noisy_oracle`: standard deviation of the noise on the true score.
    learned_apply: `learned`: (params, images f32[n, *S, I], masks u8[n, *S]) -> f32[n].

  Returns:
    judge(images, masks, probs, context) -> f32[b, K].

  Raises:
    ValueError: the name is unknown, or its module or function is not found. The judge itself
      raises ValueError, while it is traced, when `context` lacks what it needs or a function of
      your own returns another shape.
  """
  if ":" in name:
    return _user_judge(name)
  if name not in JUDGES:
    raise ValueError(
      f"unknown judge {name!r}; known: {', '.join(JUDGES)}, or package.module:function"
    )
  settings = Settings(num_classes, border, flip_rate, noise_level, learned_apply)
  return lambda images, masks, probs, context: JUDGES[name](images, masks, probs, context, settings)


def true_scores(masks: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """Mean foreground Dice of each proposal with the label, the truth that judges are measured by.

  Args:
    masks: u8[b, K, *S]. labels: u8[b, *S]. num_classes: C.

  Returns:
    f32[b, K]; a class that mask and label both lack counts 1.
  """
  return overlap.pairwise_dice(masks, labels[:, None], num_classes)[:, :, 0]


def agreement(images, masks, probs, context, settings):
  """Mean foreground Dice with the other proposals and, where given, the ensemble's masks."""
  del images, probs
  count = masks.shape[1]
  with_others = overlap.pairwise_dice(masks, masks, settings.num_classes)
  # The sum runs over the proposal itself too and its 1 is taken off after: so equal masks have
  # equal sums to the last bit, and tie.
  total, terms = jnp.sum(with_others, axis=2) - 1.0, count - 1
  if context.ensemble_masks is not None:
    dice = overlap.pairwise_dice(masks, context.ensemble_masks, settings.num_classes)
    total, terms = total + jnp.sum(dice, axis=2), terms + dice.shape[2]
  return total / terms


def confidence(images, masks, probs, context, settings):
  """Mean probability of the mask's class in and around its foreground, by all proposals."""
  del images, context
  mean_probs = jnp.mean(probs, axis=1)
  chosen = jnp.take_along_axis(mean_probs[:, None], masks[..., None].astype(jnp.int32), axis=-1)
  return _region_mean(chosen[..., 0], masks, settings.border)


def entropy(images, masks, probs, context, settings):
  """Minus the mean predictive entropy in and around the foreground."""
  del images, context
  mean_probs = jnp.mean(probs, axis=1)
  value = jnp.sum(jax.scipy.special.entr(mean_probs), axis=-1)
  return -_region_mean(jnp.broadcast_to(value[:, None], masks.shape), masks, settings.border)


def learned(images, masks, probs, context, settings):
  """The Dice that a small network, trained on the labelled split, predicts."""
  del probs
  _need(context.learned_params is not None, "learned", "context.learned_params")
  _need(settings.learned_apply is not None, "learned", "learned_apply")

  def apply(one_mask_each):
    return settings.learned_apply(context.learned_params, images, one_mask_each)

  return jax.vmap(apply, in_axes=1, out_axes=1)(masks)


def oracle(images, masks, probs, context, settings):
  """The true score; for studies."""
  del images, probs
  _need(context.labels is not None, "oracle", "context.labels")
  return true_scores(masks, context.labels, settings.num_classes)


def noisy_oracle(images, masks, probs, context, settings):
  """The true score, negated in a share of the images, plus normal noise; for studies."""
  del images, probs
  _need(context.labels is not None, "noisy_oracle", "context.labels")
  scores = true_scores(masks, context.labels, settings.num_classes)

  def disturb(key, row):
    flip_key, noise_key = jax.random.split(key)
    sign = jnp.where(jax.random.bernoulli(flip_key, settings.flip_rate), -1.0, 1.0)
    return sign * row + settings.noise_level * jax.random.normal(noise_key, row.shape)

  return jax.vmap(disturb)(context.keys, scores)


JUDGES = {
  "agreement": agreement,
  "confidence": confidence,
  "entropy": entropy,
  "learned": learned,
  "oracle": oracle,
  "noisy_oracle": noisy_oracle,
}


def _need(there: bool, judge: str, what: str) -> None:
  if not there:
    raise ValueError(f"judge {judge!r} needs {what}, found None")


def _user_judge(name):
  module_name, _, function_name = name.partition(":")
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"judge {name!r}: {error}; expected package.module:function, importable from here"
    ) from error

  def judge(images, masks, probs, context):
    del context
    scores = jnp.asarray(function(images, masks, probs))
    if scores.shape != masks.shape[:2]:
      raise ValueError(
        f"judge {name!r} returned shape {scores.shape}, expected (images, proposals) = "
        f"{masks.shape[:2]}"
      )
    return scores.astype(jnp.float32)

  return judge


def _region_mean(values, masks, border):
  """Mean of f32[b, K, *S] over each mask's foreground dilated by `border`; all if it is empty."""
  region = _dilate((masks > 0).astype(jnp.float32), border)
  axes = tuple(range(2, masks.ndim))
  region = jnp.where(jnp.any(region > 0, axis=axes, keepdims=True), region, 1.0)
  return jnp.sum(values * region, axis=axes) / jnp.sum(region, axis=axes)


def _dilate(region, border):
  """Dilates f32[b, K, *S] by a box of 2 * border + 1 pixels, one axis at a time."""
  for axis in range(2, region.ndim):
    window = tuple(2 * border + 1 if a == axis else 1 for a in range(region.ndim))
    region = jax.lax.reduce_window(region, 0.0, jax.lax.max, window, (1,) * region.ndim, "SAME")
  return region
