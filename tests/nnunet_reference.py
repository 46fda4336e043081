"""nnU-Net's networks in float64 NumPy, by the definitions of PyTorch's layers.

Reads weights by nnU-Net's names, in PyTorch's order of axes; an image is f[I, *S].
"""

import itertools

import numpy as np


def convolve(x, weight, bias, stride):
  """Cross-correlation with (k - 1) // 2 zeros at both ends, tap by tap."""
  kernel = weight.shape[2:]
  pads = [((k - 1) // 2,) * 2 for k in kernel]
  padded = np.pad(x, [(0, 0), *pads])
  size = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:], kernel, stride, strict=True)]
  y = np.zeros((weight.shape[0], *size))
  for tap in itertools.product(*map(range, kernel)):
    window = tuple(
      slice(r, r + s * (n - 1) + 1, s) for r, s, n in zip(tap, stride, size, strict=True)
    )
    y += np.tensordot(weight[(slice(None), slice(None), *tap)], padded[(slice(None), *window)], 1)
  return y if bias is None else y + by_channel(bias, y)


def upsample(x, weight, bias):
  """Transposed convolution: every entry is spread over a block of the kernel's size."""
  kernel = weight.shape[2:]
  y = np.zeros((weight.shape[1], *(n * s for n, s in zip(x.shape[1:], kernel, strict=True))))
  for place in itertools.product(*map(range, x.shape[1:])):
    block = tuple(slice(i * s, (i + 1) * s) for i, s in zip(place, kernel, strict=True))
    y[(slice(None), *block)] += np.tensordot(x[(slice(None), *place)], weight, 1)
  return y if bias is None else y + by_channel(bias, y)


def by_channel(values, x):
  return np.reshape(values, (-1, *(1,) * (x.ndim - 1)))


def normalize(x, scale, bias):
  space = tuple(range(1, x.ndim))
  x = x - x.mean(space, keepdims=True)
  x = x / np.sqrt((x**2).mean(space, keepdims=True) + 1e-5)
  return x * by_channel(scale, x) + by_channel(bias, x)


def leaky_relu(x):
  return np.where(x > 0, x, 0.01 * x)


def forward(weights, made, x):
  """Logits f[C, *S]."""
  weights = {name: np.float64(array) for name, array in weights.items()}
  ones = (1,) * (x.ndim - 1)

  def linear(name, x, stride=ones):
    y = convolve(x, weights[f"{name}.conv.weight"], weights.get(f"{name}.conv.bias"), stride)
    return normalize(y, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])

  def residual(name, x, stride):
    y = linear(f"{name}.conv2", leaky_relu(linear(f"{name}.conv1", x, stride)))
    if set(stride) != {1}:
      blocks = itertools.chain(*((n // s, s) for n, s in zip(x.shape[1:], stride, strict=True)))
      x = x.reshape(len(x), *blocks).mean(tuple(range(2, 2 * x.ndim - 1, 2)))
    for place in (0, 1):
      if f"{name}.skip.{place}.conv.weight" in weights:
        x = linear(f"{name}.skip.{place}", x)
    return leaky_relu(x + y)

  if made.is_residual:
    x = leaky_relu(linear("encoder.stem.convs.0", x))
  skips = []
  for level, count in enumerate(made.encoder_counts):
    for i in range(count):
      stride = made.strides[level] if i == 0 else ones
      if made.is_residual:
        x = residual(f"encoder.stages.{level}.blocks.{i}", x, stride)
      else:
        x = leaky_relu(linear(f"encoder.stages.{level}.0.convs.{i}", x, stride))
    skips.append(x)
  for n, count in enumerate(made.decoder_counts):
    name = f"decoder.transpconvs.{n}"
    up = upsample(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    x = np.concatenate([up, skips[-2 - n]])
    for i in range(count):
      x = leaky_relu(linear(f"decoder.stages.{n}.convs.{i}", x))
  name = f"decoder.seg_layers.{len(made.decoder_counts) - 1}"
  return convolve(x, weights[f"{name}.weight"], weights[f"{name}.bias"], ones)
