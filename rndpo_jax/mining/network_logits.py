"""What the network says of an image for each entry of a mix of samplers.

That is all that a tile of a large image is needed for: proposals are made of logits, of one image
or of an image put together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import types
from rndpo_jax.mining import views

# Samplers that look at an image in another way, and those that need the network for each proposal.
VIEWS = frozenset({"tta", "zoom"})
RUN_AGAIN = VIEWS | {"mc_dropout"}


def compute(
  segmenter: types.Segmenter,
  params: types.Params,
  images: jax.Array,
  keys: jax.Array,
  mix: tuple[tuple[tuple[str, ...], int], ...],
  member_logits: jax.Array | None = None,
  *,
  zoom: float,
) -> types.NetworkLogits:
  """Logits of images, without and with views (`tta`, `zoom`) and dropout (`mc_dropout`).

  All entries without views share one encoder pass, and deterministic ones one decoder pass.

  Args:
    segmenter: pure functions of `params`.
    images: f32[b, *S, I].
    keys: [b], one key an image; proposal k of it drops out by fold_in(key, k).
    mix: as `proposals.parse_mix` returns it.
    member_logits: f32[b, M, *S, C] of the other base models, if there are any.
    zoom: the largest zoom of `zoom`, see `views.of_entry`.
  """
  features = segmenter.encode(params, images)
  base = segmenter.decode(params, features).astype(jnp.float32)
  entries, start = [], 0
  for atoms, count in mix:
    dropout_keys = proposal_keys(keys, start, count)[0] if "mc_dropout" in atoms else None
    if VIEWS & set(atoms):
      seen = views.of_entry(atoms, images.shape[1:-1], count, zoom)
      entries.append(_decode_views(segmenter, params, images, base, dropout_keys, seen))
    elif dropout_keys is not None:
      entries.append(_decode_dropout(segmenter, params, features, dropout_keys, features_axis=None))
    else:
      entries.append(None)
    start += count
  return types.NetworkLogits(base, tuple(entries), member_logits)


def proposal_keys(keys, start, count):
  """Keys ([b, count] for dropout, [b, count] for noise) of proposals start..start + count - 1."""

  def one(key, number):
    return jax.random.split(jax.random.fold_in(key, number))

  pairs = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, jnp.arange(start, start + count))
  return pairs[:, :, 0], pairs[:, :, 1]


def _decode_views(segmenter, params, images, base, dropout_keys, seen):
  """Logits f32[b, count, *S, C] of an entry's views of the images, undone; `seen` has count."""
  chosen = list(dict.fromkeys(seen))
  index = np.array([chosen.index(view) for view in seen])
  features = segmenter.encode(params, _merge(jnp.stack([v.apply(images) for v in chosen], axis=1)))
  split = (images.shape[0], len(chosen))
  if dropout_keys is None:
    logits = segmenter.decode(params, features).astype(jnp.float32)
    logits = logits.reshape(*split, *logits.shape[1:])
    undone = [view.undo(logits[:, n], base) for n, view in enumerate(chosen)]
    return jnp.stack([undone[n] for n in index], axis=1)
  features = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:])[:, index], features)
  logits = _decode_dropout(segmenter, params, features, dropout_keys, features_axis=0)
  return jnp.stack([view.undo(logits[:, n], base) for n, view in enumerate(seen)], axis=1)


def _decode_dropout(segmenter, params, features, keys, *, features_axis):
  """Logits f32[b, count, *S, C], each decoded under its own key; keys [b, count]."""

  def decode(item, key):
    batch_of_one = jax.tree.map(lambda x: x[None], item)
    return segmenter.decode(params, batch_of_one, key)[0].astype(jnp.float32)

  return jax.vmap(jax.vmap(decode, (features_axis, 0)))(features, keys)


def _merge(x):
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
