"""The family of preference objectives, each a function of one pair's scaled log-ratios.

With the log-ratios of a pair over its disagreement region D,

    r+ = log pi(y+|x) - log ref(y+|x)     chosen,  sums over D
    r- = log pi(y-|x) - log ref(y-|x)     rejected
    h  = r+ - r-                          = margin(policy) - margin(reference), for any D

each objective reads s h, s r+, s r-, with the factor s of the normalization:

    none     s = 1                        sum over D
    region   s = 1 / |D|                  mean over D
    power    s = 1 / max(|D|, floor)^a    in between; a = 0 is none, a = 1 region

So `region` makes the RN- variant of any of them: RN-DPO is `dpo` under `region`. Objectives of h
alone need no log-partition; the others do, on D only: pixels where the two masks agree say
nothing about the preference, and are left out of r+ and r-.

An objective in which beta multiplies a log-ratio is the same on a pair under both when
beta_region = beta_none * |D|; ipo and sppo_hard, which aim at 1 / (2 beta), have the same minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


class Options(NamedTuple):
  """What an objective may read besides the log-ratios.

  Attributes:
    beta: strength, > 0.
    label_smoothing: probability that a pair is the wrong way round, in 0..0.5; a number, or for
      cdpo f32 like h.
    temperature: of discopop's blend.
    reference: s times the reference's margin, like h.
    informative: bool, like h: the pairs of the batch that carry information.
    mean: averages over the informative pairs of the batch, f32[...] -> f32[].
  """

  beta: float
  label_smoothing: jax.Array | float
  temperature: float
  reference: jax.Array
  informative: jax.Array
  mean: Callable[[jax.Array], jax.Array]


def dpo(h, chosen, rejected, options):
  """-log sigmoid(beta h). Rafailov et al., "Direct Preference Optimization", NeurIPS 2023."""
  del chosen, rejected
  return jax.nn.softplus(-options.beta * h)


def cdpo(h, chosen, rejected, options):
  """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing.

  Conservative DPO: Mitchell, "A note on DPO with noisy preferences", 2023. Its minimum is at
  sigmoid(beta h) = 1 - e.
  """
  del chosen, rejected
  x, e = options.beta * h, options.label_smoothing
  return (1.0 - e) * jax.nn.softplus(-x) + e * jax.nn.softplus(x)


def robust(h, chosen, rejected, options):
  """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e): unbiased under flips.

  Chowdhury et al., "Provably Robust DPO", ICML 2024.
  """
  del chosen, rejected
  x, e = options.beta * h, options.label_smoothing
  return ((1.0 - e) * jax.nn.softplus(-x) - e * jax.nn.softplus(x)) / (1.0 - 2.0 * e)


def ipo(h, chosen, rejected, options):
  """(h - 1 / (2 beta))^2. Azar et al., "A General Theoretical Paradigm", AISTATS 2024.

  TRL divides its log-ratios by their lengths here: that is this under `region`, where both lengths
  are |D|.
  """
  del chosen, rejected
  return jnp.square(h - 0.5 / options.beta)


def hinge(h, chosen, rejected, options):
  """max(0, 1 - beta h). SLiC: Zhao et al., "SLiC-HF", 2023; as in Liu et al., "RSO", ICLR 2024."""
  del chosen, rejected
  return jax.nn.relu(1.0 - options.beta * h)


def exo_pair(h, chosen, rejected, options):
  """KL from (sigmoid(beta h), sigmoid(-beta h)) to (1 - e, e), e > 0 the label smoothing.

  Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", ICML 2024.
  """
  del chosen, rejected
  x, e = options.beta * h, options.label_smoothing
  up = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-e))
  return up + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(e))


def nca_pair(h, chosen, rejected, options):
  """-log sigmoid(beta r+) - (log sigmoid(-beta r+) + log sigmoid(-beta r-)) / 2.

  Chen et al., "Noise Contrastive Alignment of Language Models", NeurIPS 2024.
  """
  del h
  up, down = options.beta * chosen, options.beta * rejected
  return jax.nn.softplus(-up) + 0.5 * (jax.nn.softplus(up) + jax.nn.softplus(down))


def bco_pair(h, chosen, rejected, options):
  """-log sigmoid(beta r+ - d) - log sigmoid(-(beta r- - d)), d the mean reward (r+ + r-) beta / 2.

  Jung et al., "Binary Classifier Optimization", 2024. There, and in TRL, d is a running mean; here
  it is the mean over the informative pairs of the batch, without gradient, so that a step stays a
  function of its batch.
  """
  del h
  up, down = options.beta * chosen, options.beta * rejected
  shift = jax.lax.stop_gradient(options.mean(0.5 * (up + down)))
  return jax.nn.softplus(shift - up) + jax.nn.softplus(down - shift)


def sppo_hard(h, chosen, rejected, options):
  """(r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2.

  Wu et al., "Self-Play Preference Optimization", 2024, with preference probabilities 0 and 1.
  """
  del h
  target = 0.5 / options.beta
  return jnp.square(chosen - target) + jnp.square(rejected + target)


def apo_zero(h, chosen, rejected, options):
  """1 - sigmoid(beta r+) + sigmoid(beta r-): chosen up, rejected down.

  D'Oosterlinck et al., "Anchored Preference Optimization", TACL 2025.
  """
  del h
  return jax.nn.sigmoid(-options.beta * chosen) + jax.nn.sigmoid(options.beta * rejected)


def apo_down(h, chosen, rejected, options):
  """sigmoid(beta r+) + 1 - sigmoid(beta h): both down, the rejected one more.

  D'Oosterlinck et al., as `apo_zero`; for pairs whose chosen mask is worse than the model's own.
  """
  del rejected
  return jax.nn.sigmoid(options.beta * chosen) + jax.nn.sigmoid(-options.beta * h)


def discopop(h, chosen, rejected, options):
  """(1 - m) -log sigmoid(beta h) + m exp(-beta h), m = sigmoid(beta h / temperature).

  Lu et al., "Discovering Preference Optimization Algorithms with and for LLMs", NeurIPS 2024.
  m exp(-x) is computed as exp(log m - x), finite for every x if temperature < 1.
  """
  del chosen, rejected
  x = options.beta * h
  log_blend = jax.nn.log_sigmoid(x / options.temperature)
  logistic = jax.nn.sigmoid(-x / options.temperature) * jax.nn.softplus(-x)
  return logistic + jnp.exp(log_blend - x)


def aot(h, chosen, rejected, options):
  """-log sigmoid(beta (m - q)), m the policy's margin and q the reference's of the same rank.

  Alignment via Optimal Transport, paired: Melnyk et al., "Distributional Preference Alignment of
  LLMs via Optimal Transport", NeurIPS 2024. Ranks are among the informative pairs of the batch and
  carry no gradient; a term has the weight of the pair that m is of. With equal weights this is
  TRL's `aot` without label smoothing. A batch of one pair makes it dpo.
  """
  del chosen, rejected
  margin = h + options.reference
  matched = _of_same_rank(margin, options.reference, options.informative)
  return jax.nn.softplus(-options.beta * (margin - matched))


def _of_same_rank(values, others, counted):
  """For each of `values` that counts the one of `others` with its rank among those that count."""
  known, wanted = (
    gathered(jax.lax.stop_gradient(jnp.where(counted, x, jnp.inf))).ravel()
    for x in (values, others)
  )
  rank = jnp.argsort(jnp.argsort(known))
  place = jax.typeof(values).sharding
  matched = _placed(jnp.sort(wanted)[rank].reshape(values.shape), place.spec, place.mesh)
  return jnp.where(counted, matched, others)


class Objective(NamedTuple):
  """A row of the table.

  Attributes:
    loss: (s h, s r+, s r-, Options) -> loss, like h.
    normalization: the default.
    reads: what else than h: "log_ratios" (r+ and r-), "label_smoothing" (which it needs above 0),
      "pair_smoothing" (label smoothing of each pair, which may be 0 and 1/2), "temperature",
      "batch" (the other pairs of the batch, so that a batch cannot be gone through in parts).
  """

  loss: Callable[..., jax.Array]
  normalization: str = "none"
  reads: tuple[str, ...] = ()


NORMALIZATIONS = ("none", "region", "power")
OBJECTIVES = {
  "dpo": Objective(dpo),
  "rn_dpo": Objective(dpo, normalization="region"),
  "cdpo": Objective(cdpo, reads=("label_smoothing", "pair_smoothing")),
  "robust": Objective(robust, reads=("label_smoothing",)),
  "ipo": Objective(ipo),
  "hinge": Objective(hinge),
  "exo_pair": Objective(exo_pair, reads=("label_smoothing",)),
  "nca_pair": Objective(nca_pair, reads=("log_ratios",)),
  "bco_pair": Objective(bco_pair, reads=("log_ratios", "batch")),
  "sppo_hard": Objective(sppo_hard, reads=("log_ratios",)),
  "apo_zero": Objective(apo_zero, reads=("log_ratios",)),
  "apo_down": Objective(apo_down, reads=("log_ratios",)),
  "discopop": Objective(discopop, reads=("temperature",)),
  "aot": Objective(aot, reads=("batch",)),
}


def parse(objective: str) -> tuple[str, ...]:
  """ "rn_dpo,ipo" -> ("rn_dpo", "ipo").

  Raises:
    ValueError: on a name that is not in OBJECTIVES, or stands twice.
  """
  names = tuple(name.strip() for name in objective.split(","))
  for place, name in enumerate(names):
    if name not in OBJECTIVES:
      raise ValueError(f"found {name!r}, expected one of {', '.join(OBJECTIVES)}")
    if name in names[:place]:
      raise ValueError(f"found {name!r} twice; name it once, with the sum of the weights")
  return names


def readers(objective: str, what: str) -> list[str]:
  """Those of "rn_dpo,ipo" that read one of the things in `Objective.reads`."""
  return [name for name in parse(objective) if what in OBJECTIVES[name].reads]


def known_readers(what: str) -> str:
  """All objectives that read it, for messages."""
  return ", ".join(name for name, row in OBJECTIVES.items() if what in row.reads)


def gathered(values: jax.Array) -> jax.Array:
  """The same numbers, whole on every device where a mesh has explicit axes: for a sort."""
  return _placed(values, PartitionSpec(*(None,) * values.ndim), jax.typeof(values).sharding.mesh)


def _placed(values, spec, mesh):
  """Placed by `spec` where it is not yet; outside explicit axes every spec is empty."""
  if jax.typeof(values).sharding.spec == spec:
    return values
  return jax.sharding.reshard(values, NamedSharding(mesh, spec))


def scale(size: jax.Array, normalization: str, exponent: float, floor: float) -> jax.Array:
  """The factor s of the normalization.

  Args:
    size: f32, |D|, in pixels or in volume units.
    normalization: a name of NORMALIZATIONS.
    exponent: a, of power.
    floor: smallest |D| that power divides by, in the unit of `size`.

  Returns:
    f32, like `size`; finite where |D| = 0.
  """
  if normalization == "none":
    return jnp.ones_like(size)
  if normalization == "region":
    return 1.0 / jnp.where(size > 0, size, 1.0)
  return jnp.maximum(size, floor) ** -exponent
