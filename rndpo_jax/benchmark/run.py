"""Runs benchmarks by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import jax

from rndpo_jax import errors
from rndpo_jax.benchmark.options import Options
from rndpo_jax.runtime import progress


def run(resolved: Mapping[str, Options]) -> list[dict[str, Any]]:
  """Runs each benchmark and returns all rows.

  Args:
    resolved: from `options.resolve`.

  Raises:
    BenchmarkError: if variants disagree, or PyTorch is asked for and cannot be used.
  """
  rows = []
  for name, options in resolved.items():
    progress.say(f"{name}: {options.shape}, {options.repeats} samples of each variant")
    # Imported when asked for: the loss then needs none of the libraries that read data.
    module = importlib.import_module(f"rndpo_jax.benchmark.{name}")
    rows += module.run(options, load_peers() if options.peers else None)
  return rows


def load_peers() -> Any:
  """The module `benchmark.torch_losses`.

  Raises:
    BenchmarkError: without PyTorch, or with several devices, over which it does not spread work.
  """
  if jax.device_count() > 1:
    raise errors.BenchmarkError(
      f"--peers: found {jax.device_count()} devices, and PyTorch is timed on one; set --devices=1"
    )
  try:
    from rndpo_jax.benchmark import torch_losses
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise errors.BenchmarkError(
      "--peers: PyTorch is not installed; install the extra, as in pip install -e '.[peers]', or "
      "leave --peers out"
    ) from error
  return torch_losses
