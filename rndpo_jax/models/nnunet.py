"""nnU-Net's two networks, PlainConvUNet and ResidualEncoderUNet, in two and three dimensions.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, and "nnU-Net Revisited", MICCAI 2024; the
same functions as their code in PyTorch, so that its weights can be taken over (`rndpo_jax.nnunet`).
A block is a convolution with bias, padded with (k - 1) // 2 zeros at both ends, instance
normalisation (epsilon 1e-5) and leaky ReLU (0.01). The first convolution of a level has its stride.
The decoder's transposed convolutions have a kernel of the size of their stride.

nnU-Net has no dropout. `encode` is the encoder and `decode` the decoder, as in `unet`, but a key
that is handed to `decode` or `apply` changes nothing: K samples of an image would all be the same.
Computed in float32 as the platform does that: a GPU may round factors to TF32, as PyTorch does too.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from rndpo_jax import types
from rndpo_jax.models import layers, normalization
from rndpo_jax.models.nnunet_architecture import Architecture

EPSILON = 1e-5  # added to the variance
SLOPE = 0.01  # of leaky ReLU below 0
_HE = 2 / (1 + SLOPE**2)
_he_normal = nn.initializers.variance_scaling(_HE, "fan_in", "normal")
# PyTorch counts the outputs of a transposed convolution as its inputs.
_he_normal_transposed = nn.initializers.variance_scaling(_HE, "fan_out", "normal")


class _Conv(nn.Module):
  """Convolution, (k - 1) // 2 zeros at both ends: 'SAME' would put one zero less at the start."""

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  has_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    shape = (*self.kernel, x.shape[-1], self.features)
    x = x.astype(self.dtype)
    kernel = self.param("kernel", _he_normal, shape).astype(self.dtype)
    pads = [(k - 1) // 2 for k in self.kernel]
    if set(self.stride) == {1} and len(set(self.kernel)) == 1:
      y = layers.convolve(x, kernel, pads[0])  # its gradients are fast in loops on CPU too
    else:
      space = "HWD"[: len(pads)]
      layout = (f"N{space}C", f"{space}IO", f"N{space}C")
      padding = [(pad, pad) for pad in pads]
      y = jax.lax.conv_general_dilated(x, kernel, self.stride, padding, dimension_numbers=layout)
    return _add_bias(self, y) if self.has_bias else y


class _Upsample(nn.Module):
  """Transposed convolution whose kernel is as large as its stride: no two outputs overlap."""

  features: int
  stride: tuple[int, ...]
  has_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    """f[B, *S, I] -> f[B, *(S * stride), F]: y[i * s + r] = x[i] @ kernel[r] + bias."""
    batch, *space, channels = x.shape
    shape = (*self.stride, channels, self.features)
    kernel = self.param("kernel", _he_normal_transposed, shape).astype(self.dtype)
    matrix = jnp.moveaxis(kernel, -2, 0).reshape(channels, -1)
    y = (x.astype(self.dtype) @ matrix).reshape(batch, *space, *self.stride, self.features)
    dims = len(space)
    order = [n for axis in range(dims) for n in (1 + axis, 1 + dims + axis)]
    sizes = [size * s for size, s in zip(space, self.stride, strict=True)]
    y = y.transpose(0, *order, 2 * dims + 1).reshape(batch, *sizes, self.features)
    return _add_bias(self, y) if self.has_bias else y


def _add_bias(module, y):
  bias = module.param("bias", nn.initializers.zeros, y.shape[-1:])
  return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class _InstanceNorm(nn.Module):
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", self.scale_init, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return normalization.normalize_instances(x, scale, bias, EPSILON).astype(x.dtype)


class _Block(nn.Module):
  """Convolution, instance normalisation and, unless `is_linear`, leaky ReLU."""

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  has_bias: bool
  dtype: jnp.dtype
  is_linear: bool = False
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x):
    conv = _Conv(self.features, self.kernel, self.stride, self.has_bias, self.dtype, name="conv")
    x = _InstanceNorm(self.scale_init, name="norm")(conv(x))
    return x if self.is_linear else nn.leaky_relu(x, SLOPE)


class _ResidualBlock(nn.Module):
  """Two convolutions beside a skip that is pooled and projected where the shapes differ.

  Source: He et al., "Deep Residual Learning", CVPR 2016, in the form 'D' of He et al., "Bag of
  Tricks for Image Classification", CVPR 2019.
  """

  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  has_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    ones = (1,) * len(self.kernel)
    rest = (self.has_bias, self.dtype)
    y = _Block(self.features, self.kernel, self.stride, *rest, name="conv1")(x)
    # Starts as the skip alone.
    zeros = nn.initializers.zeros
    y = _Block(self.features, self.kernel, ones, *rest, True, zeros, name="conv2")(y)
    if self.stride != ones:
      x = nn.avg_pool(x, self.stride, self.stride)
    if x.shape[-1] != self.features:
      x = _Block(self.features, ones, ones, False, self.dtype, True, name="skip")(x)
    return nn.leaky_relu(x + y, SLOPE)


class _Stage(nn.Module):
  """Blocks one after another, of which the first has the stride."""

  block: type[nn.Module]
  count: int
  features: int
  kernel: tuple[int, ...]
  stride: tuple[int, ...]
  has_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    for n in range(self.count):
      stride = self.stride if n == 0 else (1,) * len(self.stride)
      name = f"{'convs' if self.block is _Block else 'blocks'}_{n}"
      options = (self.features, self.kernel, stride, self.has_bias, self.dtype)
      x = self.block(*options, name=name)(x)
    return x


class _Encoder(nn.Module):
  architecture: Architecture
  dtype: jnp.dtype
  stage: type[nn.Module]

  @nn.compact
  def __call__(self, x):
    made = self.architecture
    x = x.astype(self.dtype)
    if made.is_residual:
      ones = (1,) * len(made.kernels[0])
      options = (1, made.features[0], made.kernels[0], ones, made.has_bias, self.dtype)
      x = self.stage(_Block, *options, name="stem")(x)
    block = _ResidualBlock if made.is_residual else _Block
    features = []
    levels = zip(made.encoder_counts, made.features, made.kernels, made.strides, strict=True)
    for n, options in enumerate(levels):
      x = self.stage(block, *options, made.has_bias, self.dtype, name=f"stages_{n}")(x)
      features.append(x)
    return tuple(features)


class _Decoder(nn.Module):
  architecture: Architecture
  num_classes: int
  dtype: jnp.dtype
  stage: type[nn.Module]

  @nn.compact
  def __call__(self, features):
    made = self.architecture
    ones = (1,) * len(made.kernels[0])
    x = features[-1]
    for n, count in enumerate(made.decoder_counts):
      level = len(made.features) - 2 - n
      options = (made.has_bias, self.dtype)
      up = _Upsample(made.features[level], made.strides[level + 1], *options, name=f"up_{n}")
      x = jnp.concatenate([up(x), features[level]], axis=-1)
      shape = (made.features[level], made.kernels[level], ones)
      x = self.stage(_Block, count, *shape, *options, name=f"stages_{n}")(x)
    return _Conv(self.num_classes, ones, ones, True, jnp.float32, name="head")(x)


class _Network(nn.Module):
  architecture: Architecture
  num_classes: int
  dtype: jnp.dtype
  remat: bool

  def setup(self):
    stage = nn.remat(_Stage) if self.remat else _Stage
    self.encoder = _Encoder(self.architecture, self.dtype, stage)
    self.decoder = _Decoder(self.architecture, self.num_classes, self.dtype, stage)

  def encode(self, images):
    return self.encoder(images)

  def decode(self, features):
    return self.decoder(features)

  def __call__(self, images):
    return self.decode(self.encode(images))


def build(
  architecture: Architecture,
  *,
  num_classes: int,
  dtype: jnp.dtype = jnp.float32,
  remat: bool = False,
) -> types.Segmenter:
  """Builds a network as pure functions.

  Args:
    architecture: of `nnunet_architecture.derive`, or of a plans.json.
    num_classes: C; the last axis of the logits.
    dtype: of the computation; parameters and logits stay float32.
    remat: computes a level's inside again in the backward pass instead of keeping it.

  Returns:
    A Segmenter for images f32[B, *S, I] with S a multiple of `architecture.divisors`; `apply` and
    `encode` raise ValueError on other sizes. Its features are the levels, finest first.

  Raises:
    ValueError: if the architecture's parts do not fit each other.
  """
  architecture.check()
  module = _Network(architecture, num_classes, dtype, remat)

  def init(key, images):
    return module.init(key, images)["params"]

  def encode(params, images):
    divisors, size = architecture.divisors, images.shape[1:-1]
    if len(size) != len(divisors) or any(s % d for s, d in zip(size, divisors, strict=True)):
      raise ValueError(f"images of size {size}: expected multiples of {divisors}")
    return module.apply({"params": params}, images, method="encode")

  def decode(params, features, key=None):
    del key  # no dropout
    return module.apply({"params": params}, features, method="decode")

  def apply(params, images, key=None):
    return decode(params, encode(params, images), key)

  return types.Segmenter(init, apply, encode, decode)
