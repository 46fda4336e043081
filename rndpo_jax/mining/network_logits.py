"""What the network says of an image for each entry of a mix of samplers.

That is all that a tile of a large image is needed for: proposals are made of logits, of one image
or of an image put together.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import types


def compute(
  segmenter: types.Segmenter,
  params: types.Params,
  images: jax.Array,
  keys: jax.Array,
  mix: tuple[tuple[tuple[str, ...], int], ...],
  member_logits: jax.Array | None = None,
) -> types.NetworkLogits:
  """Logits of images, without and with views (`tta`) and dropout (`mc_dropout`).

  All entries without `tta` share one encoder pass, and deterministic ones one decoder pass.

  Args:
    segmenter: pure functions of `params`.
    images: f32[b, *S, I].
    keys: [b], one key an image; proposal k of it drops out by fold_in(key, k).
    mix: as `proposals.parse_mix` returns it.
    member_logits: f32[b, M, *S, C] of the other base models, if there are any.
  """
  features = segmenter.encode(params, images)
  base = segmenter.decode(params, features).astype(jnp.float32)
  entries, start = [], 0
  for atoms, count in mix:
    dropout_keys = proposal_keys(keys, start, count)[0] if "mc_dropout" in atoms else None
    if "tta" in atoms:
      entries.append(_decode_views(segmenter, params, images, dropout_keys, count))
    elif dropout_keys is not None:
      entries.append(_decode_dropout(segmenter, params, features, dropout_keys, features_axis=None))
    else:
      entries.append(None)
    start += count
  return types.NetworkLogits(base, tuple(entries), member_logits)


def views(shape: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
  """Views of an image other than itself, as (quarter turns in the plane H, W; axes flipped).

  Flips of every set of axes; if H equals W, also those after a quarter turn: 3 or 7 views of
  an image, 7 or 15 of a volume, each another symmetry of the grid.

  Args:
    shape: S.
  """
  axes = range(len(shape))
  flips = [f for n in range(len(shape) + 1) for f in itertools.combinations(axes, n)]
  turns = (0, 1) if shape[0] == shape[1] else (0,)
  return [(turn, flip) for turn in turns for flip in flips if turn or flip]


def proposal_keys(keys, start, count):
  """Keys ([b, count] for dropout, [b, count] for noise) of proposals start..start + count - 1."""

  def one(key, number):
    return jax.random.split(jax.random.fold_in(key, number))

  pairs = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, jnp.arange(start, start + count))
  return pairs[:, :, 0], pairs[:, :, 1]


def _decode_views(segmenter, params, images, dropout_keys, count):
  """Logits f32[b, count, *S, C] of views of the images, undone; views repeat in a cycle."""
  chosen = views(images.shape[1:-1])[:count]
  seen = jnp.stack(
    [
      jnp.flip(jnp.rot90(images, turn, axes=(1, 2)), [a + 1 for a in flip]) for turn, flip in chosen
    ],
    axis=1,
  )
  features = segmenter.encode(params, _merge(seen))
  split = (images.shape[0], len(chosen))
  index = np.arange(count) % len(chosen)
  if dropout_keys is None:
    logits = segmenter.decode(params, features).astype(jnp.float32)
    logits = logits.reshape(*split, *logits.shape[1:])
  else:
    features = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:])[:, index], features)
    logits = _decode_dropout(segmenter, params, features, dropout_keys, features_axis=0)
  undone = [_undo(logits[:, n], *chosen[index[n]]) for n in range(logits.shape[1])]
  return jnp.stack([undone[n % len(undone)] for n in range(count)], axis=1)


def _undo(logits, turn, flip):
  return jnp.rot90(jnp.flip(logits, [a + 1 for a in flip]), -turn, axes=(1, 2))


def _decode_dropout(segmenter, params, features, keys, *, features_axis):
  """Logits f32[b, count, *S, C], each decoded under its own key; keys [b, count]."""

  def decode(item, key):
    batch_of_one = jax.tree.map(lambda x: x[None], item)
    return segmenter.decode(params, batch_of_one, key)[0].astype(jnp.float32)

  return jax.vmap(jax.vmap(decode, (features_axis, 0)))(features, keys)


def _merge(x):
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
