"""The loss of fine-tuning: a weighted sum of terms on pairs, labelled and unlabelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.data import augment
from rndpo_jax.training import image_terms, pair_terms, term_inputs

# What is drawn from a step's key beside the view of the pairs, which takes the places from 0 up.
_FIRST_PLACE = 2**31
_PLACES = ("weak", "strong", "student", "pair_view", "pair_dropout", *image_terms.TERMS)


def make_loss_fn(
  pairs: pair_terms.Settings,
  images: term_inputs.Settings,
  terms: Mapping[str, Mapping[str, Any]],
  *,
  weak: Mapping[str, float],
  ramp_steps: int = 0,
):
  """(params, types.FinetuneBatch, types.StepInputs) -> (loss f32[], metrics of f32[]).

      loss = sum over the terms of weight * rise(step) * term,
      rise(t) = exp(-5 (1 - min(1, t / ramp_steps))^2)   for terms on the model's own predictions,

  1 for the others and with ramp_steps 0 (Laine and Aila, "Temporal Ensembling", ICLR 2017). Each
  term is in the metrics under its name. A term that is not in `terms` costs nothing.

  Args:
    pairs: settings of the terms on pairs.
    images: settings of the terms on images.
    terms: name -> its options, "weight" above 0 among them; names of `image_terms.TERMS`.
    weak: options of `augment.augment` that make the weak view of unlabelled images.
    ramp_steps: see above.

  The params are those of the policy, or `types.Partners`.
  """
  read = image_terms.reads(terms)
  on_pairs = {name: terms[name] for name in terms if image_terms.TERMS[name].loss is None}
  of_pairs = pair_terms.make(pairs, on_pairs)

  def loss_fn(params, batch: types.FinetuneBatch, inputs: types.StepInputs):
    keys = dict(zip(_PLACES, _keys(inputs.key), strict=True))
    found, metrics = {}, {}
    if on_pairs:
      found, metrics = of_pairs(
        types.policy_of(params), batch.pairs, inputs, keys["pair_view"], keys["pair_dropout"]
      )
    if len(on_pairs) < len(terms):
      shared = _shared_inputs(images, params, batch, inputs, keys, read, weak)
      for name in terms:
        if name not in on_pairs:
          own = shared._replace(key=keys[name])
          found[name], more = image_terms.TERMS[name].loss(own, terms[name])
          metrics |= {f"{name}_{what}": value for what, value in more.items()}
    if len(terms) > 1 or not on_pairs:
      metrics |= found
    rise = _rise(inputs.step, ramp_steps)
    loss = sum(_weighted(name, value, terms[name]["weight"], rise) for name, value in found.items())
    return loss, metrics

  return loss_fn


def _keys(key) -> list[jax.Array]:
  return [jax.random.fold_in(key, _FIRST_PLACE + n) for n in range(len(_PLACES))]


def _rise(step, ramp_steps: int):
  """In 0..1, or None if no weight rises."""
  if not ramp_steps:
    return None
  done = jnp.minimum(jnp.asarray(step, jnp.float32) / ramp_steps, 1.0)
  return jnp.exp(-5.0 * jnp.square(1.0 - done))


def _weighted(name: str, value, weight: float, rise):
  """A weight of 1 leaves the value as it is, to the last bit."""
  value = value if weight == 1 else weight * value
  return value * rise if rise is not None and image_terms.TERMS[name].rises else value


def _shared_inputs(settings, params, batch, inputs, keys, read, weak) -> term_inputs.Inputs:
  """What terms on images read, their own key left out."""
  weak_view = strong = student = None
  policy = types.policy_of(params)
  if "unlabelled" in read:
    shown = batch.unlabelled["image"]
    masks = jnp.zeros((shown.shape[0], 0, *shown.shape[1:-1]), jnp.uint8)
    weak_view = augment.augment(keys["weak"], shown, masks, **weak)[0]
  if "strong" in read:
    strong = term_inputs.strong_view(keys["strong"], weak_view, settings.strong)
  if "student" in read:
    student = settings.apply(policy, strong, keys["student"])
  return term_inputs.Inputs(
    settings=settings,
    params=policy,
    partner=params.partner if isinstance(params, types.Partners) else None,
    teacher=None if inputs.teacher is None else types.policy_of(inputs.teacher),
    base=inputs.reference,
    labelled=batch.labelled,
    weak=weak_view,
    strong=strong,
    student_logits=student,
    key=inputs.key,
    beta=inputs.beta,
  )
