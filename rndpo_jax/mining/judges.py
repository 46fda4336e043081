"""Judges: automatic quality signals that score the proposals of an image, higher is better.

A judge is a pure function (images f32[b, *S, I], masks u8[b, K, *S], probs f32[b, K, *S, C],
context) -> f32[b, K]. Only the order and the gaps of scores within an image are used. `oracle`
and `noisy_oracle` read labels and are for studies; no other judge does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import errors, types, user_code
from rndpo_jax.evaluation import metrics
from rndpo_jax.mining import overlap, user_judges

# No judge, but the one of `config.judge.compare` that has most of the mined pairs right.
AUTO = "auto"
# The one whose scores came with proposals from files.
FILE = "file"
# A judge that reads the others' scores; see `mining.fused`, which makes them one.
FUSED = "fused"


class Context(NamedTuple):
  """What a judge may need besides images and proposals; None if there is none.

  Attributes:
    keys: [b], one key an image.
    ensemble_masks: u8[b, M, *S], masks of other base models.
    labels: u8[b, *S]; given to `oracle` and `noisy_oracle` alone.
    learned_params: parameters of the learned judge.
    present: bool[b, K], False where a proposal is missing and another stands in; None if none can
      be. What a judge makes of the others does not depend on it, and its own score is not read.
    file_scores: f32[b, K], scores that came with proposals from files, NaN for all others.
  """

  keys: jax.Array
  ensemble_masks: jax.Array | None = None
  labels: jax.Array | None = None
  learned_params: types.Params | None = None
  present: jax.Array | None = None
  file_scores: jax.Array | None = None


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
    name: a key of JUDGES, or `package.module:function` for a function of your own that JAX can
      trace, called as function(images, masks, probs) -> [b, K]; see `user_judges`.
    num_classes: C.
    border: pixels around a mask that `entropy` looks at too.
    flip_rate: `noisy_oracle`: share of images whose ranking is reversed.
    noise_level: `noisy_oracle`: standard deviation of the noise on the true score.
    learned_apply: `learned`: (params, images f32[n, *S, I], masks u8[n, *S]) -> f32[n].

  Returns:
    judge(images, masks, probs, context) -> f32[b, K].

  Raises:
    JudgeError: the name is unknown, or its module or function is not found. The judge itself
      raises it, while it is traced, if `context` lacks what it needs or a function of your own
      returns another shape.
  """
  check_name(name)
  if ":" in name:
    return user_judges.on_device(name)
  row = JUDGES[name]
  settings = Settings(num_classes, border, flip_rate, noise_level, learned_apply)

  def judge(images, masks, probs, context):
    for field in row.needs:
      if getattr(context, field) is None:
        raise errors.JudgeError(f"judge {name!r} needs context.{field}, found None")
    return row.score(images, masks, probs, context, settings)

  return judge


def check_name(name: str) -> None:
  """Checks that a name is of JUDGES, is FUSED, or reads as `package.module:function`.

  Raises:
    JudgeError: otherwise.
  """
  if name not in (*JUDGES, FUSED) and not user_code.is_name(name):
    raise errors.JudgeError(
      f"unknown judge {name!r}; known: {', '.join((*JUDGES, FUSED))}, or a function of your own as "
      "package.module:function"
    )


def true_scores(masks: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
  """Mean foreground Dice of each proposal with the label, the truth that judges are measured by.

  Args:
    masks: u8[b, K, *S]. labels: u8[b, *S]. num_classes: C.

  Returns:
    f32[b, K]; a class that mask and label both lack counts 1.
  """
  per_class = metrics.dice(masks, labels[:, None], num_classes, labels.ndim - 1)
  return jnp.mean(per_class, axis=-1)


def agreement(images, masks, probs, context, settings):
  """Mean foreground Dice with the other proposals and, if given, the ensemble's masks."""
  del images, probs
  count = masks.shape[1]
  with_others = overlap.pairwise_dice(masks, masks, settings.num_classes)
  # The sum runs over the proposal itself too and its 1 is taken off after: so equal masks have
  # equal sums to the last bit, and tie.
  total, terms = jnp.sum(with_others, axis=2) - 1.0, count - 1
  if context.present is not None:
    total = jnp.sum(jnp.where(context.present[:, None, :], with_others, 0.0), axis=2) - 1.0
    terms = jnp.sum(context.present, axis=1, keepdims=True) - 1
  if context.ensemble_masks is not None:
    dice = overlap.pairwise_dice(masks, context.ensemble_masks, settings.num_classes)
    total, terms = total + jnp.sum(dice, axis=2), terms + dice.shape[2]
  return total / terms if context.present is None else total / jnp.maximum(terms, 1)


def confidence(images, masks, probs, context, settings):
  """Dice that the proposals' mean probabilities expect of the mask.

  `overlap.expected_dice` with q the mean over the image's K proposals. An empty mask is judged like
  any other: it scores near 0 where q sees foreground, near 1 where it sees none. A mask's own
  probabilities tell less: they move along with its errors.
  """
  del images
  mean_probs = jnp.mean(probs, axis=1)
  if context is not None and context.present is not None:
    there = context.present.reshape(*context.present.shape, *(1,) * (probs.ndim - 2))
    total = jnp.sum(jnp.where(there, probs, 0.0), axis=1)
    mean_probs = total / jnp.maximum(jnp.sum(there, axis=1), 1)
  return overlap.expected_dice(masks, mean_probs, settings.num_classes)


def entropy(images, masks, probs, context, settings):
  """Minus the mean predictive entropy, in nats, in and around the mask's foreground.

  The entropy is that of the proposal's own probabilities: in that of the mean over proposals,
  which is the same map for all of them, the score would only tell where a mask's border lies.
  The mean runs over the foreground dilated by `border` pixels; that of an empty mask runs over
  the foreground of all of the image's proposals, and over the whole image if all are empty.
  """
  del images, context
  values = jnp.sum(jax.scipy.special.entr(probs), axis=-1)
  axes = tuple(range(2, masks.ndim))
  region = _dilate((masks > 0).astype(jnp.float32), settings.border)
  for fallback in (jnp.max(region, axis=1, keepdims=True), jnp.ones_like(region)):
    region = jnp.where(jnp.any(region > 0, axis=axes, keepdims=True), region, fallback)
  return -jnp.sum(values * region, axis=axes) / jnp.sum(region, axis=axes)


def learned(images, masks, probs, context, settings):
  """The Dice that a small network, trained on the labelled split, predicts."""
  del probs

  def apply(one_mask_each):
    return settings.learned_apply(context.learned_params, images, one_mask_each)

  return jax.vmap(apply, in_axes=1, out_axes=1)(masks)


def file(images, masks, probs, context, settings):
  """The score that came with a proposal from a file."""
  del images, masks, probs, settings
  return context.file_scores


def oracle(images, masks, probs, context, settings):
  """The true score; for studies."""
  del images, probs
  return true_scores(masks, context.labels, settings.num_classes)


def noisy_oracle(images, masks, probs, context, settings):
  """The true score, negated in a share of the images, plus normal noise; for studies."""
  del images, probs
  scores = true_scores(masks, context.labels, settings.num_classes)

  def disturb(key, row):
    flip_key, noise_key = jax.random.split(key)
    sign = jnp.where(jax.random.bernoulli(flip_key, settings.flip_rate), -1.0, 1.0)
    return sign * row + settings.noise_level * jax.random.normal(noise_key, row.shape)

  return jax.vmap(disturb)(context.keys, scores)


class Judge(NamedTuple):
  """A row of the table.

  Attributes:
    score: (images, masks, probs, Context, Settings) -> f32[b, K].
    needs: fields of `Context` that must be there.
    options: keys of `config.judge` that it alone reads.
    reads_own_probs: whether it looks at each proposal's own probabilities; a mask from a file has
      none.
  """

  score: Callable[..., jax.Array]
  needs: tuple[str, ...] = ()
  options: tuple[str, ...] = ()
  reads_own_probs: bool = False


JUDGES = {
  "agreement": Judge(agreement),
  "confidence": Judge(confidence),
  "entropy": Judge(entropy, options=("border",), reads_own_probs=True),
  "learned": Judge(learned, needs=("learned_params",), options=("learned",)),
  FILE: Judge(file, needs=("file_scores",)),
  "oracle": Judge(oracle, needs=("labels",)),
  "noisy_oracle": Judge(noisy_oracle, needs=("labels",), options=("flip_rate", "noise_level")),
}


def needs(name: str, field: str) -> bool:
  """Whether a judge needs a field of `Context`; one of your own needs none.

  A judge that needs `labels` is for studies: mining reads the truth of unlabelled images for it.
  """
  return name in JUDGES and field in JUDGES[name].needs


def _dilate(region, border):
  """Dilates f32[b, K, *S] by a box of 2 * border + 1 pixels, one axis at a time."""
  for axis in range(2, region.ndim):
    window = tuple(2 * border + 1 if a == axis else 1 for a in range(region.ndim))
    region = jax.lax.reduce_window(region, 0.0, jax.lax.max, window, (1,) * region.ndim, "SAME")
  return region
