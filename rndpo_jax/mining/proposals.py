"""Samplers: K mask proposals of each image from one segmenter.

A mix is a list of entries, each a composition of samplers and a count. A proposal is made in
this order: a view of the image (`zoom`, `tta`), the decoder with or without dropout
(`mc_dropout`), the view undone, or another base model (`member`); `temperature`, `logit_noise`,
`threshold`, argmax, and what `mask_edits` changes in the mask. Proposal k of an image draws from
fold_in(key of the image, k) alone, so that it does not depend on the batch it is in.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data.noise import smooth_noise
from rndpo_jax.mining import file_masks, mask_edits, network_logits


def sample(
  segmenter: types.Segmenter,
  params: types.Params,
  images: jax.Array,
  keys: jax.Array,
  *,
  mix: tuple[tuple[tuple[str, ...], int], ...],
  member_logits: jax.Array | None = None,
  zoom: float,
  **options,
) -> types.Proposals:
  """Samples K proposals of each image: `of_logits` of what the network says of it.

  Args:
    segmenter: pure functions of `params`.
    images: f32[b, *S, I].
    keys: [b], one key an image.
    mix: as `parse_mix` returns it.
    member_logits: f32[b, M, *S, C] of the other base models, which `member` takes in turn.
    zoom: how many times as large the proposals of `zoom` see things at most, see `views.zooms`.
    **options: the others of `of_logits`.
  """
  network = network_logits.compute(segmenter, params, images, keys, mix, member_logits, zoom=zoom)
  return of_logits(network, keys, mix=mix, **options)


def of_logits(
  network: types.NetworkLogits,
  keys: jax.Array,
  *,
  mix: tuple[tuple[tuple[str, ...], int], ...],
  noise_scale: float,
  noise_smoothing: float,
  temperature_low: float,
  temperature_high: float,
  threshold_shift: float,
  files: types.FileProposals | None = None,
  inside: jax.Array | None = None,
) -> types.Proposals:
  """K proposals of each image, made of what `network_logits.compute` says of it.

  The logits of a mask from a file are those of certainty: its probabilities are zeros and ones.

  Args:
    network: of b images, with the same keys and mix.
    keys: [b], one key an image.
    mix: as `parse_mix` returns it; K is the sum of its counts.
    noise_scale: standard deviation of the field that `logit_noise` adds to each class's logit.
    noise_smoothing: standard deviation, in pixels, of the Gaussian that smooths that field.
    temperature_low: first divisor of the logits in `temperature`, a geometric sweep over the
      proposals of an entry.
    temperature_high: the last one.
    threshold_shift: `threshold` subtracts from the background logit a shift that runs linearly
      from minus this to plus this over the proposals of an entry: more foreground each time.
    files: what the entry `file` takes, leading axis b.
    inside: bool[b, *S], False where an image ends: no proposal shows anything there. None for none.

  Returns:
    types.Proposals: masks u8[b, K, *S], logits f32[b, K, *S, C], base_logits f32[b, *S, C].
  """
  base_logits, logits, start = network.base, [], 0
  for (atoms, count), own in zip(mix, network.entries, strict=True):
    noise_keys = network_logits.proposal_keys(keys, start, count)[1]
    entry = _unchanged(atoms, count, own, network, files)
    if "temperature" in atoms:
      entry = entry / _per_proposal(np.geomspace(temperature_low, temperature_high, count), entry)
    if "logit_noise" in atoms:
      entry = entry + noise_scale * _noise(noise_keys, entry.shape[2:], noise_smoothing)
    if "threshold" in atoms:
      shift = _per_proposal(np.linspace(-threshold_shift, threshold_shift, count), entry)
      entry = entry - shift * _background(entry)
    entry = mask_edits.edit(atoms, noise_keys, entry)
    logits.append(entry)
    start += count
  logits = jnp.concatenate(logits, axis=1)
  if inside is not None:
    nothing = file_masks.CERTAIN * _background(base_logits)
    base_logits = jnp.where(inside[..., None], base_logits, nothing)
    logits = jnp.where(inside[:, None, ..., None], logits, nothing[:, None])
  sampled = types.Proposals(jnp.argmax(logits, axis=-1).astype(jnp.uint8), logits, base_logits)
  return sampled if files is None else file_masks.add(sampled, mix, files)


def _unchanged(atoms, count: int, own, network: types.NetworkLogits, files) -> jax.Array:
  """Logits f32[b, count, *S, C] of an entry of a mix, before its atoms change them."""
  if "file" in atoms:
    return file_masks.logits(files, network.base.shape[-1])
  if "member" in atoms:
    members = network.members
    return members[:, np.arange(count) % members.shape[1]].astype(jnp.float32)
  if own is not None:
    return own
  return jnp.repeat(network.base[:, None], count, axis=1)


class Sampler(NamedTuple):
  """A row of the table.

  Attributes:
    options: keys of `config.proposals` that it alone reads.
    strength: the key that makes it act; at 0 its proposals would all be the same.
    random: whether it draws again for each proposal.
  """

  options: tuple[str, ...] = ()
  strength: str | None = None
  random: bool = False


# In the order in which `sample` applies them.
SAMPLERS = {
  "file": Sampler(),  # masks of config.data.proposals, by themselves
  "base": Sampler(),
  "member": Sampler(),
  "zoom": Sampler(options=("zoom",), strength="proposals.zoom"),
  "tta": Sampler(),
  "mc_dropout": Sampler(strength="model.dropout", random=True),
  "temperature": Sampler(options=("temperature_low", "temperature_high")),
  "logit_noise": Sampler(
    options=("noise_scale", "noise_smoothing"), strength="proposals.noise_scale", random=True
  ),
  "threshold": Sampler(options=("threshold_shift",), strength="proposals.threshold_shift"),
  "corrupt": Sampler(random=True),
  "largest_component": Sampler(),
  "drop_component": Sampler(random=True),
}
MAX_PROPOSALS = 1024


def parse_mix(mix: str) -> tuple[tuple[tuple[str, ...], int], ...]:
  """Parses `config.proposals.mix` into ((sampler names, count), ...).

  Raises:
    ConfigError: on an unknown sampler, a bad count, a composition without effect, K < 2, or more
      than MAX_PROPOSALS.
  """
  entries = [_parse_entry(entry) for entry in mix.split(",")]
  total = sum(count for _, count in entries)
  if not 2 <= total <= MAX_PROPOSALS:
    raise errors.ConfigError(
      f"config.proposals.mix: K = {total} proposals; a pair needs K >= 2, and K may be at most "
      f"{MAX_PROPOSALS}"
    )
  return tuple(entries)


def _parse_entry(entry: str) -> tuple[tuple[str, ...], int]:
  names, _, count = entry.strip().partition(":")
  atoms = tuple(names.strip().split("+"))
  unknown = [name for name in atoms if name not in SAMPLERS]
  if unknown:
    raise errors.ConfigError(
      f"config.proposals.mix: unknown sampler {unknown[0]!r}; known: {', '.join(SAMPLERS)}"
    )
  # Of few ASCII digits: what Python's own parser takes besides, or cannot take, is no count.
  if not re.fullmatch(r"0*[1-9][0-9]{0,5}", count.strip()):
    raise errors.ConfigError(
      f"config.proposals.mix: found {entry[:80]!r}, expected NAME[+NAME...]:COUNT with COUNT from "
      f"1 to {MAX_PROPOSALS}"
    )
  if "temperature" in atoms and not {"logit_noise", "threshold"} & set(atoms):
    raise errors.ConfigError(
      "config.proposals.mix: a temperature alone leaves every argmax as it is; compose it, "
      "as in 'temperature+logit_noise:8'"
    )
  if "file" in atoms and len(atoms) > 1:
    raise errors.ConfigError(
      f"config.proposals.mix: found {entry[:80]!r}; 'file' takes masks as they are: use 'file:"
      f"{int(count)}', a mask for each folder of config.data.proposals"
    )
  others = network_logits.RUN_AGAIN & set(atoms)
  if "member" in atoms and others:
    raise errors.ConfigError(
      f"config.proposals.mix: found {'+'.join(atoms)!r}, but 'member' is another model's own "
      f"prediction: take {min(others)!r} out of it"
    )
  if "base" in atoms and (len(atoms) > 1 or int(count) > 1):
    raise errors.ConfigError("config.proposals.mix: 'base' is one deterministic mask: use 'base:1'")
  return atoms, int(count)


def perturbed(
  logits: jax.Array,
  key: jax.Array,
  count: int,
  *,
  noise_scale: float,
  noise_smoothing: float,
  threshold_shift: float,
) -> jax.Array:
  """Proposals of logits alone: themselves, and the others of `threshold+logit_noise`.

  Args:
    logits: f32[b, *S, C].
    key: one key.
    count: K, at least 2.
    noise_scale: as in `sample`, and so the next two.
    noise_smoothing: see there.
    threshold_shift: see there.

  Returns:
    f32[b, K, *S, C].
  """
  others = jnp.repeat(logits[:, None], count - 1, axis=1).astype(jnp.float32)
  if noise_scale > 0:
    keys = jax.random.split(key, (len(logits), count - 1))
    others = others + noise_scale * _noise(keys, others.shape[2:], noise_smoothing)
  shift = _per_proposal(np.linspace(-threshold_shift, threshold_shift, count - 1), others)
  others = others - shift * _background(others)
  return jnp.concatenate([logits[:, None].astype(jnp.float32), others], axis=1)


def _noise(keys, shape, smoothing):
  """f32[b, count, *S, C] for keys [b, count] and shape (*S, C)."""

  def one(key):
    return smooth_noise(key, shape, smoothing)

  return jax.vmap(jax.vmap(one))(keys)


def _per_proposal(values, logits):
  """One number a proposal, shaped to broadcast against logits [b, count, *S, C]."""
  return jnp.asarray(values, jnp.float32).reshape(1, -1, *(1,) * (logits.ndim - 2))


def _background(logits):
  ones = np.zeros((1,) * (logits.ndim - 1) + (logits.shape[-1],), np.float32)
  ones[..., 0] = 1
  return jnp.asarray(ones)
