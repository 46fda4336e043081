"""Layers of the U-Net, written for the work they leave out.

Their parameters have the names and shapes of Flax's `Conv` and `GroupNorm`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from rndpo_jax.models import dropout_bits, folding


def pool(x: jax.Array, fold: int = 1) -> jax.Array:
  """Maximum over 2 x 2 (x 2) blocks of [B, *S, F], one axis at a time; it halves `fold` above 1.

  The gradient of a windowed maximum (select-and-scatter) is several times slower on CPU. That of
  `jnp.max` divides by the number of entries equal to the maximum: where XLA computes the entries
  again inside a fusion and rounds them otherwise, none is, and the gradient is NaN (seen at
  80 x 80). A selection has neither fault.
  """
  for axis in range(1, x.ndim - 1 - (fold > 1)):
    halves = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    first, second = jnp.split(halves, 2, axis=axis + 1)
    x = jnp.squeeze(jnp.where(first >= second, first, second), axis + 1)
  return x if fold == 1 else folding.pool(x, fold)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, pad: int = 1) -> jax.Array:
  """Convolution of f[B, *S, I] with f[*window, I, F], `pad` zeros at either end of each axis.

  On CPU its gradients are written in the one order of dimensions for which XLA has fast code. It
  finds that order by itself outside of loops alone: within `lax.scan` a step took 20 times as long.
  """
  return _convolve(x, kernel, pad)


def _convolve(x, kernel, pad):
  axes = tuple(range(x.ndim - 2))
  images = (0, x.ndim - 1, *(axis + 1 for axis in axes))
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1,) * len(axes),
    padding=[(pad, pad)] * len(axes),
    dimension_numbers=jax.lax.ConvDimensionNumbers(images, (x.ndim - 1, x.ndim - 2, *axes), images),
  )


def _convolve_forward(x, kernel, pad):
  return _convolve(x, kernel, pad), (x, kernel)


def _convolve_backward(pad, inputs, by_y):
  def ordered(x, kernel, by_y):
    space = tuple(range(x.ndim - 2))
    turned = jnp.swapaxes(jnp.flip(kernel, space), -1, -2)
    by_x = _convolve(by_y, turned, kernel.shape[0] - 1 - pad)
    # Channels stand where images do, and images where channels do.
    by_kernel = _convolve(jnp.swapaxes(x, 0, -1), jnp.moveaxis(by_y, 0, -2), pad)
    return by_x, jnp.moveaxis(by_kernel, 0, -2)

  def plain(x, kernel, by_y):
    return jax.vjp(lambda x, kernel: _convolve(x, kernel, pad), x, kernel)[1](by_y)

  return jax.lax.platform_dependent(*inputs, by_y, cpu=ordered, default=plain)


convolve.defvjp(_convolve_forward, _convolve_backward)


def upsample(x: jax.Array, repeats: tuple[int, ...]) -> jax.Array:
  """Repeats each entry of [B, *S, F] so many times along each spatial axis."""
  batch, *space, features = x.shape
  ones, many = [batch], [batch]
  for size, times in zip(space, repeats, strict=True):
    ones += [size, 1]
    many += [size, times]
  x = jnp.broadcast_to(x.reshape(*ones, features), (*many, features))
  shape = (size * times for size, times in zip(space, repeats, strict=True))
  return x.reshape(batch, *shape, features)


def convolve_joined(x: jax.Array, below: jax.Array, kernel: jax.Array) -> jax.Array:
  """`convolve` of concat([upsampled below, x]), in the dtype of x.

  Args:
    x: f[B, *S, I].
    below: f[B, *(S / 2), J].
    kernel: f32[*(3 an axis), J + I, F].

  Returns:
    f[B, *S, F].
  """
  below = upsample(below, (2,) * (x.ndim - 2))
  return convolve(jnp.concatenate([below, x], axis=-1), kernel.astype(x.dtype))


def convolve_folded(
  x: jax.Array, below: jax.Array | None, kernel: jax.Array, fold: int
) -> jax.Array:
  """`convolve` of x, or `convolve_joined`, where x is folded; along its axis nothing is repeated.

  Args:
    x: f[B, *S', fold I].
    below: f[B, *(S' / 2 but for the last axis), fold / 2 J], or None.
    kernel: f32[*(3 an axis), J + I, F].

  Returns:
    f[B, *S', fold F].
  """
  if below is None:
    return convolve(x, folding.fold_kernel(kernel, fold).astype(x.dtype))
  split = below.shape[-1] * 2 // fold
  kernels = (
    folding.fold_kernel(kernel[..., :split, :], fold, repeats=2),
    folding.fold_kernel(kernel[..., split:, :], fold),
  )
  below = upsample(below, (*(2,) * (x.ndim - 3), 1))
  inputs = jnp.concatenate([below, x], axis=-1)
  return convolve(inputs, jnp.concatenate(kernels, axis=-2).astype(x.dtype))


def convolve_apart(x: jax.Array, below: jax.Array, kernel: jax.Array) -> jax.Array:
  """`convolve_joined` without making what it convolves: it is linear in the input channels.

  Under a vmap in which only `below` differs the part of x is computed once.
  """
  split = below.shape[-1]
  y = convolve(x, kernel[..., split:, :].astype(x.dtype))
  return y + _upsample_and_convolve(below, kernel[..., :split, :])


def _upsample_and_convolve(x, kernel):
  """`convolve` of upsampled x f[B, *S, I] with f32[*(3 an axis), I, F], without the repeats.

  Of three neighbours along an axis two are the same entry. With taps a, b, c and entries
  x[i - 1], x[i], outputs 2i - 1 and 2i are (a + b) x[i - 1] + c x[i] and a x[i - 1] + (b + c) x[i]:
  4/9 (8/27 in three dimensions) of the multiplications, and as little in both gradients.
  Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
  Sub-Pixel Convolutional Neural Network", CVPR 2016.
  """
  dims, features = x.ndim - 2, kernel.shape[-1]
  for axis in range(dims):
    a, b, c = jnp.split(kernel, 3, axis)
    odd, even = jnp.concatenate([a + b, c], axis), jnp.concatenate([a, b + c], axis)
    kernel = jnp.stack([odd, even], axis=-2)  # [*window, I, 2, ..., 2, F]
  kernel = kernel.reshape(*kernel.shape[: dims + 1], -1).astype(x.dtype)
  # Padded apart from the convolution: XLA's fast path on CPU takes no gradient window that is
  # larger than the image.
  y = convolve(jnp.pad(x, [(0, 0), *[(1, 1)] * dims, (0, 0)]), kernel, 0)
  batch, *space = y.shape[:-1]
  y = y.reshape(batch, *space, *(2,) * dims, features)
  order = [n for axis in range(dims) for n in (1 + axis, 1 + dims + axis)]
  y = y.transpose(0, *order, 2 * dims + 1).reshape(batch, *(2 * s for s in space), features)
  return y[(slice(None), *(slice(1, -1),) * dims)]  # the first output is number -1


class Conv(nn.Module):
  """'SAME' convolution with three taps an axis and no bias.

  Attributes:
    features: F.
    dtype: of the computation; the kernel is float32.
    fold: of the input x and the result (`folding`).
  """

  features: int
  dtype: jnp.dtype
  fold: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, below: jax.Array | None = None) -> jax.Array:
    """f[B, *S, I] -> f[B, *S, F].

    With `below`, f[B, *(S / 2), J], it is the convolution of concat([upsampled below, x]): on CPU
    as `convolve_apart` computes it, elsewhere as it stands. On TPU v5e the sum of two
    convolutions took more of HBM, by the program compiled ahead of time.
    """
    dims = x.ndim - 2
    channels = x.shape[-1] // self.fold
    if below is not None:
      channels += below.shape[-1] // max(1, self.fold // 2)
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (*(3,) * dims, channels, self.features)
    )
    x = x.astype(self.dtype)
    below = None if below is None else below.astype(self.dtype)
    if self.fold > 1:
      return convolve_folded(x, below, kernel, self.fold)
    if below is None:
      return convolve(x, kernel.astype(self.dtype))
    return jax.lax.platform_dependent(x, below, kernel, cpu=convolve_apart, default=convolve_joined)


class Head(nn.Module):
  """Logits of each pixel from its features, in float32: a margin adds up thousands of them.

  Attributes:
    features: C.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, fold: int) -> jax.Array:
    """f[B, *S', fold F] -> f32[B, *S, C]."""
    window = (1,) * (x.ndim - 2)
    shape = (*window, x.shape[-1] // fold, self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[-1:])
    y = _convolve(x.astype(jnp.float32), folding.fold_pointwise(kernel, fold), 0)
    y = y + jnp.tile(bias, fold).reshape(1, *window, -1)
    return folding.unfold(y, fold)


class Dropout(nn.Module):
  """Zeroes entries with probability `rate` and divides the others by 1 - rate.

  Draws from the collection "dropout", the same bits as `nn.Dropout`.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    if deterministic or self.rate == 0:
      return x
    if self.rate == 1:  # no division by zero, in the gradient neither
      return jnp.zeros_like(x)
    keep = 1.0 - self.rate
    kept = dropout_bits.bernoulli(self.make_rng("dropout"), keep, x.shape)
    return jnp.where(kept, x / keep, jnp.zeros_like(x))
