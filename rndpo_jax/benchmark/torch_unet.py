"""The U-Net of `models.unet` in PyTorch: the same architecture, with our parameters put in.

Two spatial dimensions or three, memory with the channels last, nearest upsampling, group or
instance normalisation, dropout in bottleneck and decoder.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rndpo_jax import errors, types
from rndpo_jax.benchmark import loss as loss_benchmark
from rndpo_jax.benchmark import network, timing, torch_losses
from rndpo_jax.benchmark.options import Options
from rndpo_jax.losses import bit_planes

# Largest difference of logits, loss and gradient norm from ours, relative to the largest logit,
# the loss, the norm. On GPUs both frameworks round the factors of float32 products to TF32.
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Block(nn.Sequential):
  """Twice: convolution, normalisation, ReLU."""

  def __init__(self, inputs: int, features: int, norm: str, dims: int):
    groups = features if norm == "instance" else max(1, features // 4)
    while features % groups:
      groups -= 1
    layers: list[nn.Module] = []
    for channels in (inputs, features):
      layers += [
        CONVOLUTIONS[dims](channels, features, 3, padding=1, bias=False),
        nn.GroupNorm(groups, features, eps=1e-6),
        nn.ReLU(inplace=True),
      ]
    super().__init__(*layers)


class UNet(nn.Module):
  """The network; `forward` takes f32[B, 1, *S] and returns logits f32[B, C, *S]."""

  def __init__(self, options: Options):
    super().__init__()
    model, dims = network.make_config(options).model, len(options.shape) - 1
    widths = [min(model.width * 2**level, model.max_width) for level in range(model.depth)]
    inputs = [network.CHANNELS, *widths[:-1]]
    self.down = nn.ModuleList(
      Block(i, w, model.norm, dims) for i, w in zip(inputs, widths, strict=True)
    )
    self.up = nn.ModuleList(
      Block(below + w, w, model.norm, dims)
      for w, below in zip(widths[:-1], widths[1:], strict=True)
    )
    self.head = CONVOLUTIONS[dims](widths[0], options.classes, 1)
    self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[dims]
    self.rate = model.dropout

  def forward(self, x: torch.Tensor, dropout: bool = False) -> torch.Tensor:
    features = []
    for level, block in enumerate(self.down):
      x = block(self.pool(x, 2) if level else x)
      features.append(x)
    x = F.dropout(x, self.rate, training=dropout)
    for skip, block in zip(features[-2::-1], reversed(self.up), strict=True):
      x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1))
      x = F.dropout(x, self.rate, training=dropout)
    with torch.autocast(x.device.type, enabled=False):  # ours computes the head in float32
      return self.head(x.float())


def make(options: Options, params: types.Params) -> UNet:
  """The network with `params` in it, on the device.

  Raises:
    BenchmarkError: if parameters differ in number or shape from ours.
  """
  net = UNet(options)
  load(net, params)
  count = sum(p.numel() for p in net.parameters())
  expected = sum(leaf.size for leaf in jax.tree.leaves(params))
  if count != expected:
    raise errors.BenchmarkError(f"PyTorch's U-Net has {count} parameters, ours {expected}")
  return net.to(torch_losses.device(), memory_format=CHANNELS_LAST[len(options.shape) - 1])


def check_logits(
  net: UNet, options: Options, segmenter: types.Segmenter, params, images: jax.Array
) -> None:
  """Compares the logits of `images`, without dropout, with ours.

  Raises:
    BenchmarkError: if they differ.
  """
  # Compiled as a whole: a GPU would look for the fastest form of every layer apart.
  ours = np.asarray(jax.jit(segmenter.apply)(params, images))
  shared = from_jax(images)
  with torch.no_grad(), precision(options, shared.device.type):
    other = net(shared).movedim(1, -1).cpu().numpy()
  check("logits", options, np.abs(other - ours).max() / np.abs(ours).max())


def load(net: UNet, params: dict[str, Any]) -> None:
  """Copies the parameters of `models.unet`: in each block, convolutions and norms in their order.

  Raises:
    BenchmarkError: if a shape differs, which is another architecture.
  """

  def put(target: torch.Tensor, values) -> None:
    values = torch.from_numpy(np.array(values))
    if target.shape != values.shape:
      raise errors.BenchmarkError(
        f"PyTorch's U-Net takes {tuple(target.shape)}, ours has {tuple(values.shape)}"
      )
    with torch.no_grad():
      target.copy_(values)

  def kernel(values):  # [*window, in, out] -> [out, in, *window]
    return np.moveaxis(np.asarray(values), (-1, -2), (0, 1))

  for name, blocks in (("down", net.down), ("up", net.up)):
    for level, block in enumerate(blocks):
      layers = params[f"{name}_{level}"]
      for kind, entry in ((CONVOLUTIONS[2], "kernel"), (nn.GroupNorm, "scale")):
        kinds = tuple(CONVOLUTIONS.values()) if entry == "kernel" else kind
        sources = [layers[key] for key in sorted(layers) if entry in layers[key]]
        targets = [layer for layer in block if isinstance(layer, kinds)]
        for source, target in zip(sources, targets, strict=True):
          put(target.weight, kernel(source[entry]) if entry == "kernel" else source[entry])
          if entry == "scale":
            put(target.bias, source["bias"])
  put(net.head.weight, kernel(params["head"]["kernel"]))
  put(net.head.bias, params["head"]["bias"])


def from_jax(images: jax.Array) -> torch.Tensor:
  """f32[B, *S, 1] as f32[B, 1, *S] with the channels last in memory."""
  format = CHANNELS_LAST[images.ndim - 2]
  return torch_losses.from_jax(images).movedim(-1, 1).contiguous(memory_format=format)


def precision(options: Options, device_type: str) -> contextlib.AbstractContextManager:
  """Autocast to bfloat16 if that is the dtype of the computation."""
  enabled = options.dtype == "bfloat16"
  return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


def check(what: str, options: Options, difference: float) -> None:
  """Refuses a relative difference above the tolerance of the precision.

  Raises:
    BenchmarkError: naming what differs.
  """
  tf32 = options.dtype == "float32" and torch_losses.device().type == "cuda"
  tolerance = TOLERANCE["tf32" if tf32 else options.dtype]
  if not difference <= tolerance:
    raise errors.BenchmarkError(
      f"PyTorch's U-Net: {what} differ from ours by {difference:.2g} (relative), expected at most "
      f"{tolerance}; it computes something else, so nothing was timed"
    )


def step_variant(
  options: Options,
  params: types.Params,
  batches: Sequence[dict[str, jax.Array]],
  work: timing.Work,
  expected: dict[str, jax.Array],
  compiled: bool,
) -> timing.Variant | timing.Missing:
  """Steps in a row: forward, loss, backward, AdamW.

  Args:
    options: of "step".
    params: to start from.
    batches: from `step.make_batches`: of labels, or of pairs.
    work: of a step.
    expected: our first step's metrics, loss and grad_norm among them.
    compiled: by torch.compile, network and loss together.

  Raises:
    BenchmarkError: if loss or gradient norm of the first batch are not ours.
  """
  net = make(options, params)
  optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
  shared = [_to_torch(batch, options) for batch in batches]
  of_batch = functools.partial(_loss, net, options)

  def loss_of(turn, function):
    optimizer.zero_grad(set_to_none=True)
    loss = function(*shared[turn % len(shared)])
    loss.backward()
    return loss.detach()

  other = float(loss_of(0, of_batch))
  other_norm = float(torch.sqrt(sum(p.grad.square().sum() for p in net.parameters())))
  value, norm = float(expected["loss"]), float(expected["grad_norm"])
  check("losses", options, abs(other - value) / value)
  check("gradient norms", options, abs(other_norm - norm) / norm)
  of_batch, form = _compile(of_batch, compiled)

  def run(turn):
    loss = loss_of(turn, of_batch)
    optimizer.step()
    return loss

  size = sum(tensor.nbytes for tensor in shared[0]) + 3 * sum(p.nbytes for p in net.parameters())
  pairs = work.pairs // work.images
  kind = f"RN-DPO, {pairs} pair{'s' if pairs > 1 else ''}" if pairs else "supervised"
  return torch_losses.variant(f"PyTorch {form}, {kind}", work, run, size, compiled)


def _to_torch(
  batch: dict[str, jax.Array] | types.FinetuneBatch, options: Options
) -> tuple[torch.Tensor, ...]:
  """(images, labels), or (images, chosen u8[B, P, *S], rejected, reference margin f32[B, P])."""
  if not isinstance(batch, types.FinetuneBatch):
    return from_jax(batch["image"]), torch_losses.from_jax(batch["label"])
  batch = batch.pairs
  unpack = jax.jit(lambda mask: bit_planes.unpack(mask, options.shape[1:], options.classes))
  arrays = (unpack(batch.chosen), unpack(batch.rejected), batch.reference_margin)
  return from_jax(batch.images), *(torch_losses.from_jax(array) for array in arrays)


def _loss(net: UNet, options: Options, images: torch.Tensor, *targets) -> torch.Tensor:
  """Cross-entropy of one target, the labels; RN-DPO of three, as `_to_torch` gives them."""
  with precision(options, images.device.type):
    logits = net(images)
  if len(targets) == 1:
    return F.cross_entropy(logits, targets[0].long())
  return torch_losses.cancelled_loss(logits, *targets, beta=loss_benchmark.BETA)


def _compile(function: Callable, compiled: bool) -> tuple[Callable, str]:
  """The function, compiled if asked for, and the word for it."""
  if not compiled:
    return function, "eager"
  torch.compiler.reset()
  # Whole: what the compiler cannot take would run between two programs, and make PyTorch slower.
  return torch.compile(function, dynamic=False, fullgraph=True), "compiled"


def sampling_variant(
  options: Options,
  segmenter: types.Segmenter,
  params: types.Params,
  images: Sequence[jax.Array],
  work: timing.Work,
  *,
  count: int,
  compiled: bool,
) -> timing.Variant | timing.Missing:
  """`count` forward passes with dropout and their masks.

  Raises:
    BenchmarkError: if the logits without dropout are not ours.
  """
  net = make(options, params)
  check_logits(net, options, segmenter, params, images[0])
  shared = [from_jax(batch) for batch in images]

  def masks(batch):
    with precision(options, batch.device.type):
      return net(batch, dropout=True).argmax(dim=1).to(torch.uint8)

  masks, form = _compile(masks, compiled)

  def run(turn):
    with torch.inference_mode():
      return [masks(shared[turn % len(shared)]) for _ in range(count)]

  size = shared[0].nbytes + sum(p.nbytes for p in net.parameters())
  name = f"PyTorch {form}, {count} dropout forward passes"
  return torch_losses.variant(name, work, run, size, compiled)
