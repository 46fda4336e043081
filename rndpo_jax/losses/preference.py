"""Preference losses, normalised on the device.

A segmenter gives logits z with pixels independent given the image, so that
log pi(y|x) = sum_p log softmax(z_p)[y_p]. For a pair of masks (chosen y+, rejected y-) the
log-partition cancels: see `margins`, and `objectives` for what is made of the margins.

Sources: DPO is Rafailov et al., "Direct Preference Optimization", NeurIPS 2023. RN-DPO, which
divides the preference update by |D|, is Kalisch et al., "Region-Normalized DPO for Medical Image
Segmentation under Noisy Judges", 2026.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.losses import objectives
from rndpo_jax.losses.margins import margin_and_size, pair_margin

Metrics = dict[str, jax.Array]

# Region sizes, in pixels, between which the shares of the gradient's mass are told apart.
REGION_SIZE_EDGES = (16, 64, 256, 1024, 4096)


def preference_loss(
  policy_margin: types.Array,
  reference_margin: types.Array,
  size: types.Array,
  *,
  objective: str = "rn_dpo",
  objective_weights: tuple[float, ...] = (),
  beta: float,
  weight: types.Array | None = None,
  normalization: str | None = None,
  exponent: float = 0.5,
  floor: float = 1.0,
  label_smoothing: types.Array | float = 0.0,
  temperature: float = 0.05,
  policy_log_prob: types.Array | None = None,
  reference_log_prob: types.Array | None = None,
  voxel_volume: types.Array | float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """A preference objective on margins, mean over the pairs that carry information.

      h      = policy_margin - reference_margin           summed over D
      dpo    = -log sigmoid(beta * h)                     sum over D
      rn_dpo = -log sigmoid(beta * h / |D|)               mean over D

  and the others of `objectives.OBJECTIVES`, each under the normalization none (sum over D),
  region (mean over D) or power (sum over D, divided by max(|D|, floor)**exponent).

  On a pair with |D| pixels dpo and rn_dpo agree when beta_rn_dpo = beta_dpo * |D|; to move a DPO
  beta over, multiply it by the typical |D| of the pairs. With both lengths taken as |D|, rn_dpo is
  TRL's `sigmoid_norm`. A pair with |D| = 0 says nothing: it gets
  weight zero, is counted in `num_empty`, and leaves loss and gradient finite. With no informative
  pair at all the loss is 0.

  Args:
    policy_margin: f32[B] or f32[B, P].
    reference_margin: like `policy_margin`; no gradient flows into it. Zeros for a reference-free
      objective.
    size: i32, like `policy_margin`: |D| in pixels.
    objective: a name of `objectives.OBJECTIVES`, or several as in "rn_dpo,ipo": their weighted sum,
      each under its own normalization, all with the same beta.
    objective_weights: one for each of several; () for ones.
    beta: strength; with rn_dpo near 10, with dpo near 10 / typical |D|.
    weight: f32, like `policy_margin`, or None for ones; 0 marks a slot without a pair.
    normalization: a name of `objectives.NORMALIZATIONS`, for one objective; None takes the
      objective's own, region for rn_dpo and none for the others.
    exponent: of power.
    floor: of power, in the unit of size * voxel_volume.
    label_smoothing: probability in 0..0.5 that a pair is the wrong way round; a number, read by
      cdpo, robust and exo_pair, or f32 like `policy_margin`, read by cdpo alone.
    temperature: of discopop.
    policy_log_prob: `pair_log_prob` of the policy, like `policy_margin`; needed by objectives of
      the separate log-ratios, for the others it only adds metrics.
    reference_log_prob: the same of the reference.
    voxel_volume: f32, like `policy_margin`, or a number: what a pixel stands for, such as mm^3;
      sums over D and |D| are multiplied by it. It makes no difference under region.

  Returns:
    (loss f32[], metrics): loss, accuracy (share of pairs with h > 0, ties one half), weight (the
    sum that the loss is a mean over), num_pairs, num_empty; h_mean and the quantiles p5, p50, p95
    of h (sum over D), region_size and gradient_weight (the mean over y+ and y- of
    |d loss / d log pi|); gradient_share_N, the share of the gradient's L1 mass on pairs with |D|
    below N and not below the edge before; and, with log-probabilities, chosen_log_ratio and
    rejected_log_ratio (means, sums over D).

  Raises:
    ValueError: on an unknown name, an option that the objective does not read, or missing
      log-probabilities.
  """
  chex.assert_equal_shape([policy_margin, reference_margin, size])
  terms = _terms(objective, objective_weights, normalization)
  _check_options(objective, label_smoothing, policy_log_prob)
  policy_margin = policy_margin.astype(jnp.float32)
  reference_margin = jax.lax.stop_gradient(reference_margin)
  h = (policy_margin - reference_margin) * voxel_volume
  chosen = jnp.zeros_like(h)
  if policy_log_prob is not None:
    chex.assert_equal_shape([policy_margin, policy_log_prob, reference_log_prob])
    chosen = (policy_log_prob - jax.lax.stop_gradient(reference_log_prob)) * voxel_volume
  weight = jnp.ones_like(h) if weight is None else weight.astype(jnp.float32)
  informative = jnp.where(size > 0, weight, 0.0)
  total = jnp.maximum(jnp.sum(informative), 1e-12)

  def mean(values):
    return jnp.sum(values * informative) / total

  def pair_losses(h, chosen):
    losses = []
    for term_weight, loss_fn, norm in terms:
      factor = objectives.scale(size.astype(jnp.float32) * voxel_volume, norm, exponent, floor)
      reference = factor * (reference_margin * voxel_volume)
      options = objectives.Options(
        beta, label_smoothing, temperature, reference, informative > 0, mean
      )
      values = loss_fn(factor * h, factor * chosen, factor * (chosen - h), options)
      losses.append(values if len(terms) == 1 else term_weight * values)
    return sum(losses[1:], losses[0])

  values = pair_losses(h, chosen)
  loss = mean(jnp.where(size > 0, values, 0.0))
  metrics = {
    "loss": loss,
    "accuracy": mean(jnp.where(h > 0, 1.0, jnp.where(h == 0, 0.5, 0.0))),
    "h_mean": mean(h),
    "weight": jnp.sum(informative),
    "num_pairs": jnp.sum(informative > 0),
    "num_empty": jnp.sum((size == 0) & (weight > 0)),
    **_distribution(pair_losses, h, chosen, size, informative),
  }
  if policy_log_prob is not None:
    metrics["chosen_log_ratio"] = mean(chosen)
    metrics["rejected_log_ratio"] = mean(chosen - h)
  return loss, metrics


def _terms(objective, objective_weights, normalization):
  """[(weight, loss function, normalization)] of the objectives of a sum."""
  try:
    names = objectives.parse(objective)
  except ValueError as error:
    raise ValueError(f"objective: {error}") from None
  weights = tuple(objective_weights) or (1.0,) * len(names)
  if len(weights) != len(names) or (objective_weights and len(names) == 1):
    raise ValueError(
      f"objective_weights: found {objective_weights} for {objective!r}, expected one for each of "
      "several objectives, or ()"
    )
  if normalization is not None and len(names) > 1:
    raise ValueError(
      f"normalization: found {normalization!r}, but each of {objective!r} has its own; leave it out"
    )
  rows = [objectives.OBJECTIVES[name] for name in names]
  norms = [row.normalization if normalization is None else normalization for row in rows]
  for name, norm in zip(names, norms, strict=True):
    if norm not in objectives.NORMALIZATIONS:
      raise ValueError(
        f"normalization: found {norm!r}, expected one of {', '.join(objectives.NORMALIZATIONS)}"
      )
    if name == "rn_dpo" and norm != "region":
      raise ValueError(
        f"normalization: found {norm!r}, but 'rn_dpo' is 'dpo' under 'region'; use objective 'dpo'"
      )
  return [(w, row.loss, norm) for w, row, norm in zip(weights, rows, norms, strict=True)]


def _check_options(objective, label_smoothing, policy_log_prob):
  smoothed = bool(objectives.readers(objective, "label_smoothing"))
  if jnp.ndim(label_smoothing):
    if objectives.readers(objective, "pair_smoothing") != list(objectives.parse(objective)):
      raise ValueError(
        f"label_smoothing: found one for each pair with objective {objective!r}; it is read by "
        f"{objectives.known_readers('pair_smoothing')} alone"
      )
  elif not 0.0 <= label_smoothing < 0.5 or (label_smoothing > 0) != smoothed:
    raise ValueError(
      f"label_smoothing: found {label_smoothing} with objective {objective!r}; it is read by "
      f"{objectives.known_readers('label_smoothing')}, which need it between 0 and 0.5, and must "
      "be 0 elsewhere"
    )
  if policy_log_prob is None and (needing := objectives.readers(objective, "log_ratios")):
    raise ValueError(f"policy_log_prob: objective {needing[0]!r} needs it, see pair_log_prob")


def _distribution(pair_losses, h, chosen, size, informative) -> Metrics:
  """Quantiles over the informative pairs, and where the gradient's mass lies."""
  by_margin, by_chosen = jax.grad(lambda *x: jnp.sum(pair_losses(*x)), argnums=(0, 1))(
    *jax.lax.stop_gradient((h, chosen))
  )
  # d loss / d log pi(y+) is by_margin + by_chosen, d loss / d log pi(y-) is -by_margin.
  gradient_weight = 0.5 * (jnp.abs(by_margin + by_chosen) + jnp.abs(by_margin))
  metrics = {}
  rows = {"h": h, "region_size": size, "gradient_weight": gradient_weight}
  for name, values in rows.items():
    known = jnp.where(informative > 0, jax.lax.stop_gradient(values).astype(jnp.float32), jnp.nan)
    quantiles = jnp.nanquantile(objectives.gathered(known), jnp.array([0.05, 0.5, 0.95]))
    for place, value in zip(("p5", "p50", "p95"), quantiles, strict=True):
      metrics[f"{name}_{place}"] = value
  mass = gradient_weight * informative * size
  whole = jnp.maximum(jnp.sum(mass), 1e-30)
  lower = 0
  for upper in (*REGION_SIZE_EDGES, jnp.inf):
    inside = (size >= lower) & (size < upper)
    metrics[f"gradient_share_{upper}"] = jnp.sum(jnp.where(inside, mass, 0.0)) / whole
    lower = upper
  return metrics


def _logits_loss(
  policy_logits, reference_logits, chosen, rejected, objective, beta, **region_options
):
  margin, size = margin_and_size(policy_logits, chosen, rejected, **region_options)
  return preference_loss(
    margin,
    pair_margin(reference_logits, chosen, rejected, **region_options),
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
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> tuple[jax.Array, Metrics]:
  """RN-DPO from logits: -log sigmoid(beta * h / |D|), a mean over D.

  Args:
    policy_logits: f[B, *S, C].
    reference_logits: f[B, *S, C]; no gradient flows into it.
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    beta: near 10; beta_rn_dpo = beta_dpo * |D|.
    ignore: bool[B, *S], True where a pixel never counts; None for no such pixel.
    classes: see `margins.region`.

  Returns:
    (loss f32[], metrics of `preference_loss`).
  """
  return _logits_loss(
    policy_logits, reference_logits, chosen, rejected, "rn_dpo", beta,
    ignore=ignore, classes=classes,
  )  # fmt: skip


def dpo_loss(
  policy_logits: types.Array,
  reference_logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  beta: float,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> tuple[jax.Array, Metrics]:
  """DPO from logits: -log sigmoid(beta * h), a sum over D. Arguments as in `rn_dpo_loss`."""
  return _logits_loss(
    policy_logits, reference_logits, chosen, rejected, "dpo", beta,
    ignore=ignore, classes=classes,
  )  # fmt: skip
