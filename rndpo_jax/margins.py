"""Margins of preference pairs from logits, at the cost of reading them once.

    margin(z) = sum_{p in D} (z_p[y+_p] - z_p[y-_p]),     D = {p : y+_p != y-_p}

is linear in the logits, and its gradient is g (onehot(y+) - onehot(y-)) on D and zero elsewhere,
where g is one number a pair. So the forward pass reads each logit and each mask byte once; the
backward pass reads masks and g, never the logits, and writes each gradient once.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from rndpo_jax import packing, types


def region(
  chosen: types.Array,
  rejected: types.Array,
  *,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """D, the pixels where two masks differ.

  Args:
    chosen: u8[..., *S] class ids.
    rejected: like `chosen`.
    ignore: bool, broadcastable to `chosen` with as many axes; True takes a pixel out of D.
    classes: only pixels count where one of the masks shows one of these class ids; None for all.

  Returns:
    bool[..., *S].
  """
  differ = chosen != rejected
  if classes is not None:
    counted = functools.reduce(
      jnp.logical_or, [(chosen == k) | (rejected == k) for k in classes], jnp.zeros_like(differ)
    )
    differ = differ & counted
  return differ if ignore is None else differ & ~ignore


def region_size(
  chosen: types.Array,
  rejected: types.Array,
  *,
  spatial_dims: int = 2,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """|D|, the number of pixels where two masks differ.

  Args:
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    spatial_dims: length of S.
    ignore: bool[B, *S], True where a pixel never counts; None for no such pixel.
    classes: see `region`.

  Returns:
    i32[B] or i32[B, P]; 0 for identical masks.
  """
  chex.assert_equal_shape([chosen, rejected])
  if ignore is not None and chosen.ndim == spatial_dims + 2:
    ignore = ignore[:, None]
  inside = region(chosen, rejected, ignore=ignore, classes=classes)
  return jnp.sum(inside, axis=tuple(range(-spatial_dims, 0)), dtype=jnp.int32)


def pair_margin(
  logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  packed: bool = False,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """margin(z) = sum_{p in D} (z_p[y+_p] - z_p[y-_p]), a sum over D (not a mean).

  With one logit a pixel (C = 1, sigmoid) z_p[y] is (2y - 1) z_p / 2. Sums run in float32 whatever
  the dtype of the logits; logits outside D are never looked at, so they may be infinite.

  The gradient is in closed form and needs the masks alone; it has the dtype of the logits, and P
  pairs of an image add up in it directly. Reverse mode may be applied again; forward mode (jvp)
  is refused by JAX.

  Args:
    logits: f[B, *S, C].
    chosen: u8[B, *S] class ids, or u8[B, P, *S] for P pairs of each image.
    rejected: like `chosen`.
    packed: the masks are bit planes from `packing.pack`, u8[B, bits, bytes] or
      u8[B, P, bits, bytes].
    ignore: bool[B, *S], True where a pixel never counts; None for no such pixel.
    classes: see `region`.

  Returns:
    f32[B] or f32[B, P]; 0 for identical masks.
  """
  chex.assert_equal_shape([chosen, rejected])
  single = chosen.ndim == (3 if packed else logits.ndim - 1)
  if single:
    chosen, rejected = chosen[:, None], rejected[:, None]
  if packed:
    chex.assert_axis_dimension(chosen, 0, logits.shape[0])
  else:
    chex.assert_shape(chosen, (logits.shape[0], None, *logits.shape[1:-1]))
  shape = (logits.shape[1:], jnp.dtype(logits.dtype).name)
  margin = _margin(logits, chosen, rejected, ignore, shape, packed, classes)
  return margin[:, 0] if single else margin


def pair_log_prob(
  logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """Log-probability of the chosen mask on D: sum_{p in D} log softmax(z_p)[y+_p].

  That of the rejected mask on D is this minus `pair_margin`. Here the log-partition does not
  cancel, so it costs a logsumexp a pixel, shared by the P pairs.

  Args:
    logits: f[B, *S, C].
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    ignore: bool[B, *S] or None, as in `pair_margin`.
    classes: see `region`.

  Returns:
    f32[B] or f32[B, P], <= 0; 0 for identical masks.
  """
  chex.assert_equal_shape([chosen, rejected])
  if chosen.ndim == logits.ndim - 1:
    return pair_log_prob(
      logits, chosen[:, None], rejected[:, None], ignore=ignore, classes=classes
    )[:, 0]
  logits = logits.astype(jnp.float32)
  if logits.shape[-1] == 1:
    # log sigmoid(+-z): z[y] - log partition, with the two logits z / 2 and -z / 2.
    logits = jnp.concatenate([-0.5 * logits, 0.5 * logits], axis=-1)
  log_partition = jax.nn.logsumexp(logits, axis=-1)
  columns = []
  for plus, minus in _slots(chosen, rejected, ignore, None, False, classes):
    terms = jnp.where(plus != minus, _pick(logits, plus) - log_partition, 0.0)
    columns.append(jnp.sum(terms, axis=tuple(range(1, terms.ndim))))
  return jnp.stack(columns, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _margin(logits, chosen, rejected, ignore, shape, packed, classes):
  space = tuple(range(1, logits.ndim - 1))
  columns = []
  for plus, minus in _slots(chosen, rejected, ignore, shape[0], packed, classes):
    if logits.shape[-1] == 1:
      single = logits[..., 0].astype(jnp.float32)
      difference = jnp.where(plus > minus, single, -single)
    else:
      difference = _pick(logits, plus) - _pick(logits, minus)
    # Outside D the factor is zero, yet 0 * inf is not: select, do not multiply.
    columns.append(jnp.sum(jnp.where(plus != minus, difference, 0.0), axis=space))
  return jnp.stack(columns, axis=1)


def _margin_forward(logits, chosen, rejected, ignore, shape, packed, classes):
  margin = _margin(logits, chosen, rejected, ignore, shape, packed, classes)
  return margin, (chosen, rejected, ignore)


def _margin_backward(shape, packed, classes, residual, cotangent):
  chosen, rejected, ignore = residual
  (*space, num_classes), dtype = shape
  ids = jnp.arange(num_classes, dtype=jnp.uint8).reshape((1,) * (1 + len(space)) + (-1,))
  gradient = jnp.zeros((chosen.shape[0], *space, num_classes), jnp.float32)
  pairs = _slots(chosen, rejected, ignore, shape[0], packed, classes)
  for slot, (plus, minus) in enumerate(pairs):
    plus, minus = plus[..., None], minus[..., None]
    if num_classes == 1:
      sign = (plus > minus).astype(jnp.float32) - (plus < minus).astype(jnp.float32)
    else:
      # The masks themselves are broadcast over the classes, not a float made of them: so the
      # compilers go from mask bytes to gradients in one fusion, without a plane of floats between.
      sign = (plus == ids).astype(jnp.float32) - (minus == ids).astype(jnp.float32)
    gradient += sign * cotangent[:, slot].reshape(-1, *(1,) * len(space), 1)
  return gradient.astype(dtype), None, None, None


_margin.defvjp(_margin_forward, _margin_backward)


def _slots(chosen, rejected, ignore, shape, packed, classes):
  """The P pairs of masks u8[B, *S] each, made equal where a pixel does not count."""
  for slot in range(chosen.shape[1]):
    plus, minus = chosen[:, slot], rejected[:, slot]
    if packed:
      # One sigmoid logit still tells two classes apart.
      size, num_classes = tuple(shape[:-1]), max(shape[-1], 2)
      plus, minus = (packing.unpack(mask, size, num_classes) for mask in (plus, minus))
    if ignore is not None or classes is not None:
      minus = jnp.where(region(plus, minus, ignore=ignore, classes=classes), minus, plus)
    yield plus, minus


def _pick(logits, masks):
  """z_p[y_p] in float32, f32[B, *S]: selections, which fuse where a gather would not."""
  picked = logits[..., 0].astype(jnp.float32)
  for k in range(1, logits.shape[-1]):
    picked = jnp.where(masks == k, logits[..., k].astype(jnp.float32), picked)
  return picked
