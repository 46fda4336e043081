"""The same work in PyTorch, written as one would by hand; the extra `peers` installs it.

Arrays are handed over by DLPack, on the device that JAX computes on. Images are channels first,
the layout in which PyTorch's softmax is fastest.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

from rndpo_jax import errors
from rndpo_jax.benchmark import timing


def device() -> torch.device:
  """The device of JAX's platform; also sets PyTorch to use all cores or the fastest kernels.

  Raises:
    BenchmarkError: if PyTorch cannot use that platform.
  """
  platform = jax.default_backend()
  if platform == "cpu":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.device("cpu")
  if platform == "gpu" and torch.cuda.is_available():
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True  # as JAX's default precision does
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch.device("cuda:0")
  raise errors.BenchmarkError(
    f"--peers: JAX computes on {platform!r}, which this PyTorch ({torch.__version__}) cannot use; "
    "leave --peers out, or install a PyTorch for it"
  )


def from_jax(array: jax.Array) -> torch.Tensor:
  """The array as a tensor of the same memory; not to be written into."""
  return torch.from_dlpack(jax.block_until_ready(array))


def to_jax(outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[jax.Array, jax.Array]:
  """(value, gradient [B, C, *S]) -> the same with the channels last, as JAX arrays."""
  value, grad = (tensor.detach() for tensor in outputs)
  synchronize(value)
  return jnp.float32(value.item()), jnp.from_dlpack(grad.movedim(1, -1).contiguous())


def synchronize(outputs) -> None:
  """Waits for the queue of the device; on the CPU a call returns when it is done."""
  del outputs
  if torch.cuda.is_available() and torch.cuda.is_initialized():
    torch.cuda.synchronize()


def variant(
  name: str, work: timing.Work, run: Callable[[int], object], input_bytes: int, compiled: bool
) -> timing.Variant | timing.Missing:
  """A variant of `run`, called once here: what compiles does so now, and its memory is seen.

  Args:
    name: in tables.
    work: of a call.
    run: (turn) -> outputs.
    input_bytes: of one call's inputs.
    compiled: whether the first call compiles; if that fails, the variant is missing.
  """
  before = _reset_peak()
  start = time.perf_counter()
  try:
    synchronize(run(0))
  except Exception as error:
    if not compiled:
      raise
    # PyTorch has no common type for what its compiler, or the C++ compiler behind it, may raise.
    lines = str(error).strip().splitlines() or [""]
    return timing.Missing(name, "torch", f"{type(error).__name__}: {lines[0]}")
  seconds = time.perf_counter() - start
  if compiled:  # once more, since compiling takes memory too
    before = _reset_peak()
    synchronize(run(0))
  peak = None if before is None else torch.cuda.max_memory_allocated() - before + input_bytes
  return timing.Variant(
    name=name,
    framework="torch",
    work=work,
    run=run,
    wait=synchronize,
    compile_seconds=seconds if compiled else None,
    peak_bytes=peak,
    peak_source=None if peak is None else "torch.cuda.max_memory_allocated",
  )


def _reset_peak() -> int | None:
  """Starts counting again; bytes allocated now, or None on the CPU, where nobody counts."""
  if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
    return None
  torch.cuda.reset_peak_memory_stats()
  return torch.cuda.memory_allocated()


def loss_makers(
  inputs: Sequence[tuple[jax.Array, ...]], work: timing.Work, beta: float
) -> dict[str, Callable[[], timing.Variant | timing.Missing]]:
  """Variants of the preference loss by name, each made when called.

  Args:
    inputs: (logits, chosen, rejected, reference margin) as `benchmark.loss.make_inputs` returns.
    work: of a call.
    beta: of RN-DPO.
  """
  device()
  shared: list[tuple[torch.Tensor, ...]] = []

  def make(name, loss, compiled):
    if not shared:
      shared.extend(_to_torch(*arrays) for arrays in inputs)
    function = functools.partial(loss, beta=beta)
    if compiled:
      torch.compiler.reset()  # else a new size compiles for sizes that vary, which is slower
      function = torch.compile(function, dynamic=False, fullgraph=True)

    def run(turn):
      logits, chosen, rejected, reference = shared[turn % len(shared)]
      value = function(logits, chosen, rejected, reference)
      return value, torch.autograd.grad(value, logits)[0]

    return variant(name, work, run, sum(t.nbytes for t in shared[0]), compiled)

  return {
    name: functools.partial(make, name, loss, compiled) for name, (loss, compiled) in LOSSES.items()
  }


def _to_torch(logits, chosen, rejected, reference):
  """Logits [B, C, *S], contiguous; masks [B, P, *S]; reference [B, P]."""
  if chosen.ndim < logits.ndim:
    chosen, rejected, reference = chosen[:, None], rejected[:, None], reference[:, None]
  first = from_jax(logits).movedim(-1, 1).contiguous().requires_grad_()
  return (first, *(from_jax(array) for array in (chosen, rejected, reference)))


def log_softmax_loss(logits, chosen, rejected, reference, *, beta):
  """RN-DPO from its formula: log-probabilities of both masks, gathered; float32 sums."""
  if logits.shape[1] == 1:
    both = torch.cat([-logits, logits], dim=1)
    log_probs = F.logsigmoid(both.float())
  else:
    log_probs = F.log_softmax(logits, dim=1, dtype=torch.float32)
  space = tuple(range(2, logits.ndim))

  def log_prob(masks):
    picked = [log_probs.gather(1, masks[:, p : p + 1].long()) for p in range(masks.shape[1])]
    return torch.cat([p.sum(dim=space) for p in picked], dim=1)

  h = log_prob(chosen) - log_prob(rejected) - reference
  size = (chosen != rejected).sum(dim=space)
  return -F.logsigmoid(beta * h / size).mean()


def cancelled_loss(logits, chosen, rejected, reference, *, beta):
  """RN-DPO without the log-partition: the logits' differences alone, summed in float32."""
  space = tuple(range(2, logits.ndim))

  def picked(masks):
    if logits.shape[1] == 1:  # (2y - 1) z / 2, and the half's two differences make y z
      return masks * logits[:, 0:1].float()
    each = [logits.gather(1, masks[:, p : p + 1].long()) for p in range(masks.shape[1])]
    return torch.cat(each, dim=1).float()

  h = (picked(chosen) - picked(rejected)).sum(dim=space) - reference
  size = (chosen != rejected).sum(dim=space)
  return -F.logsigmoid(beta * h / size).mean()


LOSSES = {
  "PyTorch eager, log-softmax": (log_softmax_loss, False),
  "PyTorch compiled, log-softmax": (log_softmax_loss, True),
  "PyTorch eager, cancelled": (cancelled_loss, False),
  "PyTorch compiled, cancelled": (cancelled_loss, True),
}
