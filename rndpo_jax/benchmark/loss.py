"""The preference loss, value and gradient with respect to the logits, with a cached reference.

The least that must be moved: each logit read once, each byte of both masks of a pair read once,
each gradient written once. One number a pair, the reference margin, is left out of the count.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rndpo_jax import errors, losses
from rndpo_jax.benchmark import timing
from rndpo_jax.benchmark.options import Options
from rndpo_jax.runtime import progress, sharding

BETA = 10.0
OURS = "rndpo_jax"
# Largest difference from our value, relative to it, and from our gradient, relative to its
# largest entry. The log-softmax forms subtract sums of 65536 float32 terms.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
# A variant that would take longer for a call leaves the sweep over sizes.
MAX_SECONDS = 1.0


def run(options: Options, peers: Any | None) -> list[dict[str, Any]]:
  """Times every variant at `options.shape`, and at each size of the sweep.

  Args:
    options: of "loss".
    peers: the module `benchmark.torch_losses`, or None.

  Raises:
    BenchmarkError: if variants disagree; nothing is timed then.
  """
  per_image = math.prod(options.shape[1:])
  batches = {max(1, round(2**size / per_image)) for size in options.sizes} | {options.shape[0]}
  table: list[dict[str, Any]] = []
  seconds: dict[str, float] = {}  # of one image
  for batch in sorted(batches):
    at_size = options._replace(shape=(batch, *options.shape[1:]))
    reason = _too_large(at_size)
    if reason:
      progress.say(f"loss at {batch} images: left out, {reason}")
      continue
    slow = {
      name: f"about {scale * batch:.1f} s a call at this size, judged by a smaller one"
      for name, scale in seconds.items()
      if scale * batch > MAX_SECONDS and batch != options.shape[0]
    }
    rows = run_at(at_size, peers, slow)
    table += rows
    seconds |= {r["variant"]: r["seconds_median"] / batch for r in rows if r["status"] == "ok"}
  return table


def run_at(options: Options, peers: Any | None, slow: dict[str, str]) -> list[dict[str, Any]]:
  """Times the variants at one shape; `slow` are names to leave out, each with the reason."""
  inputs = make_inputs(jax.random.key(0), options)
  work = work_of(options)
  makers = {
    name: ("jax", functools.partial(timing.jax_variant, name, work, function, inputs))
    for name, function in VARIANTS.items()
  }
  if peers is not None:
    makers |= {
      name: ("torch", make) for name, make in peers.loss_makers(inputs, work, BETA).items()
    }
  variants = [timing.copy_variant([logits for logits, *_ in inputs])]
  for name, (framework, make) in makers.items():
    variants.append(timing.Missing(name, framework, slow[name]) if name in slow else make())
  check_agreement(variants, options.dtype, peers)
  setup = {
    "benchmark": "loss",
    "shape": list(options.shape),
    "classes": options.classes,
    "pairs": options.pairs,
    "dtype": options.dtype,
    "disagreement": options.disagreement,
    "inputs": len(inputs),
  }
  return timing.rows(variants, baseline=OURS, repeats=options.repeats, setup=setup)


def make_inputs(key: jax.Array, options: Options) -> list[tuple[jax.Array, ...]]:
  """Random (logits, chosen, rejected, reference margin) to rotate through, over all devices.

  Logits are normal, f[B, *S, C]; masks u8[B, *S], or [B, P, *S] if P > 1, see `draw_pair`.
  """
  mesh = sharding.make_mesh()
  sharding.check_batch_size("--shape", options.shape[0], mesh.size)
  batch, *space = options.shape
  lead = (batch,) if options.pairs == 1 else (batch, options.pairs)

  def draw(key):
    logits_key, pair_key, margin_key = jax.random.split(key, 3)
    logits = jax.random.normal(logits_key, (*options.shape, options.classes), options.dtype)
    chosen, rejected = draw_pair(pair_key, lead, space, options.classes, options.disagreement)
    return logits, chosen, rejected, jax.random.normal(margin_key, lead)

  count = timing.num_inputs(math.prod(options.shape) * _input_bytes(options))
  draw = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))
  return [draw(jax.random.fold_in(key, number)) for number in range(count)]


def draw_pair(
  key: jax.Array, lead: Sequence[int], space: Sequence[int], classes: int, disagreement: float
) -> tuple[jax.Array, jax.Array]:
  """Masks u8[*lead, *space], uniform over the classes (two if there is one logit).

  They differ on a random fraction `disagreement` of the pixels, and on the first one always, so
  that no pair is empty.
  """
  labels = max(2, classes)
  keys = jax.random.split(key, 3)
  chosen = jax.random.randint(keys[0], (*lead, *space), 0, labels, jnp.uint8)
  differs = jax.random.bernoulli(keys[1], disagreement, chosen.shape)
  differs = differs.at[(..., *(0,) * len(space))].set(True)
  shift = jax.random.randint(keys[2], chosen.shape, 1, labels, jnp.uint8)
  # In 16 bits: class ids of up to 256 classes add up to more than 255.
  other = ((chosen.astype(jnp.uint16) + shift) % labels).astype(jnp.uint8)
  return chosen, jnp.where(differs, other, chosen)


def work_of(options: Options) -> timing.Work:
  """Images, pairs, pixels, and the bytes that must be moved."""
  pixels = math.prod(options.shape)
  return timing.Work(
    images=options.shape[0],
    pairs=options.shape[0] * options.pairs,
    pixels=pixels,
    bytes_at_least=pixels * (_input_bytes(options) + _logit_bytes(options)),
  )


def _logit_bytes(options: Options) -> int:
  return options.classes * jnp.dtype(options.dtype).itemsize


def _input_bytes(options: Options) -> int:
  """Of a pixel: its logits and its entry in both masks of each pair."""
  return _logit_bytes(options) + 2 * options.pairs


def ours(logits, chosen, rejected, reference_margin) -> jax.Array:
  """RN-DPO as `stages.finetune` computes it."""
  margin, size = losses.margin_and_size(logits, chosen, rejected)
  return losses.preference_loss(margin, reference_margin, size, objective="rn_dpo", beta=BETA)[0]


def naive(logits, chosen, rejected, reference_margin) -> jax.Array:
  """RN-DPO as it is written from its formula: log-probabilities of both masks, gathered."""
  logits = logits.astype(jnp.float32)
  if logits.shape[-1] == 1:
    log_probs = jnp.concatenate([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
  else:
    log_probs = jax.nn.log_softmax(logits, axis=-1)
  space = tuple(range(2 - logits.ndim, 0))
  if chosen.ndim == logits.ndim:
    log_probs = log_probs[:, None]

  def log_prob(mask):
    index = mask[..., None].astype(jnp.int32)
    picked = jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]
    return jnp.sum(picked, axis=space)

  size = jnp.sum(chosen != rejected, axis=space)
  h = log_prob(chosen) - log_prob(rejected) - reference_margin
  return jnp.mean(-jax.nn.log_sigmoid(BETA * h / size))


VARIANTS = {
  OURS: jax.value_and_grad(ours),
  "JAX, log-softmax and gather": jax.value_and_grad(naive),
}


def check_agreement(variants, dtype: str, peers: Any | None) -> None:
  """Refuses variants whose value or gradient on the first input is not that of ours.

  Raises:
    BenchmarkError: naming the variant and the difference.
  """
  compared = [v for v in variants if isinstance(v, timing.Variant) and v.name != timing.COPY]
  value, grad = next(v for v in compared if v.name == OURS).run(0)
  scale = float(jnp.max(jnp.abs(grad)))
  for variant in compared:
    outputs = variant.run(0)
    other_value, other_grad = peers.to_jax(outputs) if variant.framework == "torch" else outputs
    apart = abs(float(other_value) - float(value)) / max(abs(float(value)), 1e-6)
    gap = jnp.max(jnp.abs(other_grad.astype(jnp.float32) - grad.astype(jnp.float32)))
    grad_apart = float(gap) / scale
    if not (apart <= TOLERANCE[dtype] and grad_apart <= TOLERANCE[dtype]):
      raise errors.BenchmarkError(
        f"{variant.name}: value {float(other_value)}, {OURS} has {float(value)}; gradients differ "
        f"by {grad_apart:.2g} of the largest (expected at most {TOLERANCE[dtype]} for both); it "
        "computes something else, so nothing was timed"
      )


def _too_large(options: Options) -> str | None:
  """Why inputs, outputs and temporaries of this shape would not fit; None if they do.

  Inputs are rotated, doubled for a peer, and the float32 temporaries of the log-softmax form are
  several times the logits.
  """
  pixels = math.prod(options.shape)
  each = pixels * _input_bytes(options)
  inputs = timing.num_inputs(each) * each * (2 if options.peers else 1)
  needed = inputs + 6 * 4 * pixels * options.classes
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    free = jax.local_device_count() * (stats["bytes_limit"] - stats["bytes_in_use"])
  else:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if needed > 0.8 * free:
    return f"it needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
  return None
