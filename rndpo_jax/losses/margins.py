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

from rndpo_jax import types
from rndpo_jax.losses import bit_planes, class_ids


def region(
  chosen: types.Array,
  rejected: types.Array,
  *,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """D, the pixels where two masks differ.

  A pixel counts whatever the ids: 255 or another mark in one of the masks is not left out. Say
  which pixels do not count with `ignore`.

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


def margin_and_size(
  logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  packed: bool = False,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`pair_margin` and `region_size` together, at the cost of one of them.

  margin(z) = sum_{p in D} (z_p[y+_p] - z_p[y-_p]) is a sum over D (not a mean). With one logit a
  pixel (C = 1, sigmoid) z_p[y] is (2y - 1) z_p / 2. Sums run in float32 whatever the dtype of the
  logits; logits outside D are never looked at, so they may be infinite.

  Class ids are below C (below 2 where C = 1). This is checked on concrete arrays; inside `jit` a
  larger id is silently read as class 0. Ignored pixels may hold any id.

  The gradient is in closed form and needs the masks alone; it has the dtype of the logits, and P
  pairs of an image add up in it directly. Reverse mode may be applied again; forward mode (jvp)
  is refused by JAX.

  Args:
    logits: f[B, *S, C].
    chosen: u8[B, *S] class ids, or u8[B, P, *S] for P pairs of each image.
    rejected: like `chosen`.
    packed: the masks are bit planes from `bit_planes.pack`, u8[B, bits, bytes] or
      u8[B, P, bits, bytes].
    ignore: bool[B, *S], True where a pixel never counts; None for no such pixel.
    classes: see `region`.

  Returns:
    (margin f32, size i32), [B] or [B, P] each; 0 for identical masks.

  Raises:
    ValueError: on a class id that is not below C, where it can be seen.
  """
  chex.assert_equal_shape([chosen, rejected])
  single = chosen.ndim == (3 if packed else logits.ndim - 1)
  if single:
    chosen, rejected = chosen[:, None], rejected[:, None]
  if packed:
    chex.assert_axis_dimension(chosen, 0, logits.shape[0])
  else:
    chex.assert_shape(chosen, (logits.shape[0], None, *logits.shape[1:-1]))
    class_ids.check(logits, ignore, chosen=chosen, rejected=rejected)
  codes = _codes(chosen, rejected, ignore, logits.shape[1:], packed, classes)
  margin, size = _coded(logits, codes, logits.shape[-1], jnp.dtype(logits.dtype).name)
  return (margin[:, 0], size[:, 0]) if single else (margin, size)


def pair_margin(
  logits: types.Array,
  chosen: types.Array,
  rejected: types.Array,
  *,
  packed: bool = False,
  ignore: types.Array | None = None,
  classes: tuple[int, ...] | None = None,
) -> jax.Array:
  """The margin alone, f32[B] or f32[B, P]; see `margin_and_size`."""
  return margin_and_size(logits, chosen, rejected, packed=packed, ignore=ignore, classes=classes)[0]


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
  cancel, so it costs a logsumexp a pixel, shared by the P pairs. Logits outside D are never looked
  at, neither for the value nor for the gradient, so they may be infinite or NaN.

  Args:
    logits: f[B, *S, C].
    chosen: u8[B, *S] or u8[B, P, *S].
    rejected: like `chosen`.
    ignore: bool[B, *S] or None, as in `pair_margin`.
    classes: see `region`.

  Returns:
    f32[B] or f32[B, P], <= 0; 0 for identical masks.

  Raises:
    ValueError: as `margin_and_size`.
  """
  chex.assert_equal_shape([chosen, rejected])
  if chosen.ndim == logits.ndim - 1:
    return pair_log_prob(
      logits, chosen[:, None], rejected[:, None], ignore=ignore, classes=classes
    )[:, 0]
  class_ids.check(logits, ignore, chosen=chosen, rejected=rejected)
  pairs = list(_slots(chosen, rejected, ignore, None, False, classes))
  # Selected before the logsumexp: a zero gradient times one that is infinite would be NaN.
  inside = functools.reduce(jnp.logical_or, [plus != minus for plus, minus in pairs])
  logits = jnp.where(inside[..., None], logits.astype(jnp.float32), 0.0)
  if logits.shape[-1] == 1:
    # log sigmoid(+-z): z[y] - log partition, with the two logits z / 2 and -z / 2.
    logits = jnp.concatenate([-0.5 * logits, 0.5 * logits], axis=-1)
  log_partition = jax.nn.logsumexp(logits, axis=-1)
  columns = []
  for plus, minus in pairs:
    terms = jnp.where(plus != minus, _pick(logits, plus) - log_partition, 0.0)
    columns.append(jnp.sum(terms, axis=tuple(range(1, terms.ndim))))
  return jnp.stack(columns, axis=1)


# Both masks of a pair in one number a pixel, chosen * 2**shift + rejected: the forward pass makes
# it, reads the logits through it and keeps it, so that the backward pass reads half the bytes.
# Where a pixel does not count the code is 0, as where both masks show the background.


def _codes(chosen, rejected, ignore, shape, packed, classes):
  """Codes [B, *S] of each of the P pairs: u8 up to 16 classes, else u16."""
  shift, dtype = (4, jnp.uint8) if shape[-1] <= 16 else (8, jnp.uint16)
  codes = []
  for plus, minus in _slots(chosen, rejected, ignore, shape, packed, classes):
    codes.append((plus.astype(dtype) << shift) | minus.astype(dtype))
  return tuple(codes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _coded(logits, codes, num_classes, dtype):
  """(margin f32[B, P], size i32[B, P]) from codes."""
  del dtype
  space = tuple(range(1, logits.ndim - 1))
  shift = 4 if num_classes <= 16 else 8
  margins, sizes = [], []
  for code in codes:
    plus, minus = code >> shift, code & (2**shift - 1)
    if num_classes == 1:
      single = logits[..., 0].astype(jnp.float32)
      difference = jnp.where(plus > minus, single, -single)
    else:
      difference = _pick(logits, plus) - _pick(logits, minus)
    inside = plus != minus
    # Outside D the factor is zero, yet 0 * inf is not: select, do not multiply.
    sums = _sum_and_count(jnp.where(inside, difference, 0.0), inside, space)
    margins.append(sums[0])
    sizes.append(sums[1])
  return jnp.stack(margins, axis=1), jnp.stack(sizes, axis=1)


def _sum_and_count(terms, inside, axes):
  """Both sums: in one pass on accelerators, where XLA does not merge two; apart on CPU."""

  def apart(terms, inside):
    # Counted in bytes along up to 255 rows first, which vectorises: 3 times as fast as one sum.
    # Planes of a volume stay apart: devices may share them, and bands across would be gathered.
    *lead, height, width = inside.shape
    rows = max(n for n in range(1, 256) if height % n == 0)
    bands = inside.reshape(*lead, height // rows, rows, width)
    count = jnp.sum(bands, axis=-2, dtype=jnp.uint8)
    # Columns first, and a barrier that keeps XLA from making one sum of the two: it then selects
    # and adds in one pass, where it else writes every term to memory. 0.7 of the time.
    columns = jax.lax.optimization_barrier(jnp.sum(terms, axis=axes[:-1]))
    return jnp.sum(columns, axis=-1), jnp.sum(count, axis=axes, dtype=jnp.int32)

  def together(terms, inside):
    return jax.lax.reduce(
      (terms, inside.astype(jnp.int32)),
      (jnp.float32(0), jnp.int32(0)),
      lambda a, b: (a[0] + b[0], a[1] + b[1]),
      axes,
    )

  return jax.lax.platform_dependent(terms, inside, cpu=apart, default=together)


def _coded_forward(logits, codes, num_classes, dtype):
  return _coded(logits, codes, num_classes, dtype), codes


def _coded_backward(num_classes, dtype, codes, cotangents):
  by_margin, _ = cotangents
  shift = 4 if num_classes <= 16 else 8
  rank = codes[0].ndim
  ids = jnp.arange(max(num_classes, 2), dtype=codes[0].dtype)[-num_classes:]
  ids = ids.reshape((1,) * rank + (-1,))
  gradient = jnp.zeros((), jnp.float32)
  for slot, code in enumerate(codes):
    # The class ids stand inside the comparisons with the code itself, so that the compilers go
    # from codes to gradients in one fusion, without a plane of numbers between.
    code = code[..., None]
    up = (code ^ (ids << shift)) < 2**shift
    down = ((code ^ ids) & (2**shift - 1)) == 0
    sign = up.astype(jnp.float32) - down.astype(jnp.float32)  # 0 where the masks agree
    factor = by_margin[:, slot].reshape(-1, *(1,) * rank)
    gradient = sign * factor if slot == 0 else gradient + sign * factor
  return gradient.astype(dtype), None


_coded.defvjp(_coded_forward, _coded_backward)


def _slots(chosen, rejected, ignore, shape, packed, classes):
  """The P pairs of masks u8[B, *S] each, both 0 where a pixel does not count."""
  for slot in range(chosen.shape[1]):
    plus, minus = chosen[:, slot], rejected[:, slot]
    if packed:
      # One sigmoid logit still tells two classes apart.
      size, num_classes = tuple(shape[:-1]), max(shape[-1], 2)
      plus, minus = (bit_planes.unpack(mask, size, num_classes) for mask in (plus, minus))
    if ignore is not None or classes is not None:
      counted = region(plus, minus, ignore=ignore, classes=classes)
      plus, minus = jnp.where(counted, plus, 0), jnp.where(counted, minus, 0)
    yield plus, minus


def _pick(logits, masks):
  """z_p[y_p] in float32, f32[B, *S]: selections, which fuse where a gather would not."""
  picked = logits[..., 0].astype(jnp.float32)
  for k in range(1, logits.shape[-1]):
    picked = jnp.where(masks == k, logits[..., k].astype(jnp.float32), picked)
  return picked
