"""What can be asked of a benchmark, its defaults, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rndpo_jax.data.sources import phantom
from rndpo_jax.errors import BenchmarkError

BENCHMARKS = ("loss", "step", "mine", "input", "population")
MIN_REPEATS = 20  # fewer say little about the median


class Options(NamedTuple):
  """Settings of one benchmark; each reads those of its entry in DEFAULTS, and no other.

  Attributes:
    shape: (B, *S), images and their size.
    classes: C; 1 stands for one sigmoid logit a pixel.
    pairs: P, preference pairs of each image.
    dtype: of the logits in `loss`, of the network's computation elsewhere.
    disagreement: fraction of pixels on which the masks of a pair differ.
    sizes: `loss` is also timed at 2**n pixels for each n, images of the same S.
    width: channels of the U-Net's first level.
    depth: its levels.
    members: of a population.
    seeds: of a population; the members of each share its batch.
    workers: processes that read the `input`; 0 reads in threads of this one.
    repeats: samples of each variant.
    peers: whether PyTorch is timed beside.
  """

  shape: tuple[int, ...]
  classes: int
  dtype: str
  pairs: int = 0
  disagreement: float = 0.0
  sizes: tuple[int, ...] = ()
  width: int = 0
  depth: int = 0
  members: int = 0
  seeds: int = 0
  workers: int = 0
  repeats: int = MIN_REPEATS
  peers: bool = False


DEFAULTS: dict[str, dict[str, Any]] = {
  "loss": {
    "shape": (16, 256, 256),
    "classes": 4,
    "pairs": 1,
    "dtype": "float32",
    "disagreement": 0.05,
    "sizes": (16, 18, 20, 22),
    "peers": False,
  },
  "step": {
    "shape": (16, 96, 96),
    "classes": 2,
    "pairs": 4,
    "dtype": "float32",
    "disagreement": 0.05,
    "width": 12,
    "depth": 4,
    "peers": False,
  },
  # The default U-Net on the default grid.
  "mine": {
    "shape": (16, 64, 64),
    "classes": 2,
    "dtype": "float32",
    "width": 8,
    "depth": 4,
    "peers": False,
  },
  "input": {
    "shape": (16, 64, 64),
    "classes": 2,
    "pairs": 4,
    "dtype": "float32",
    "width": 8,
    "depth": 4,
    "workers": 0,
  },
  "population": {
    "shape": (16, 64, 64),
    "classes": 2,
    "pairs": 4,
    "dtype": "float32",
    "disagreement": 0.05,
    "width": 8,
    "depth": 4,
    "members": 4,
    "seeds": 2,
  },
}


def resolve(benchmark: str, given: Mapping[str, Any]) -> dict[str, Options]:
  """The options of each benchmark to run.

  Args:
    benchmark: one of BENCHMARKS, or "all".
    given: what was asked for, by name of the flag; None stands for the default.

  Raises:
    BenchmarkError: on an option that no benchmark to run reads, or a value that cannot work.
  """
  names = BENCHMARKS if benchmark == "all" else (benchmark,)
  if not set(names) <= set(BENCHMARKS):
    raise BenchmarkError(f"--benchmark: found {benchmark!r}, expected {', '.join(BENCHMARKS)}, all")
  given = {name: value for name, value in given.items() if value is not None}
  resolved = {}
  for name in names:
    reads = {"repeats": MIN_REPEATS, **DEFAULTS[name]}
    taken = {key: value for key, value in given.items() if key in reads}
    resolved[name] = Options(**{**reads, **taken})
  for key in given:
    if not any(key == "repeats" or key in DEFAULTS[name] for name in names):
      raise BenchmarkError(f"--{key}: --benchmark={benchmark} does not read it; leave it out")
  for name, options in resolved.items():
    _check(name, options)
  return resolved


def _check(name: str, options: Options) -> None:
  space = options.shape[1:]
  if len(space) not in (2, 3) or min(options.shape) < 1:
    raise BenchmarkError(f"--shape: found {options.shape}, expected B,H,W or B,H,W,Z, all above 0")
  least = 1 if name == "loss" else 2
  if not least <= options.classes <= 256:
    raise BenchmarkError(
      f"--classes: found {options.classes}, --benchmark={name} takes {least}..256"
    )
  if options.dtype not in ("float32", "bfloat16"):
    raise BenchmarkError(f"--dtype: found {options.dtype!r}, expected float32 or bfloat16")
  if options.repeats < MIN_REPEATS:
    raise BenchmarkError(f"--repeats: found {options.repeats}, expected at least {MIN_REPEATS}")
  if options.workers < 0:
    raise BenchmarkError(f"--workers: found {options.workers}, expected 0 or more")
  if "pairs" in DEFAULTS[name] and options.pairs < 1:
    raise BenchmarkError(f"--pairs: found {options.pairs}, expected at least 1")
  if "disagreement" in DEFAULTS[name] and not 0 < options.disagreement <= 1:
    raise BenchmarkError(
      f"--disagreement: found {options.disagreement}, expected a fraction above 0, at most 1"
    )
  if any(not 8 <= size <= 30 for size in options.sizes):
    raise BenchmarkError(
      f"--sizes: found {options.sizes}, expected exponents 8..30 (26 is 2**26 pixels)"
    )
  if name == "input" and options.classes not in phantom.CLASS_NAMES:
    raise BenchmarkError(f"--classes: found {options.classes}, the phantom draws 2 or 4")
  if name == "population" and (options.seeds < 1 or options.members % options.seeds):
    raise BenchmarkError(
      f"--members, --seeds: found {options.members} and {options.seeds}, expected as many members "
      "for each seed"
    )
  if "depth" in DEFAULTS[name]:
    multiple = 2 ** max(0, options.depth - 1)
    if options.depth < 1 or options.width < 1 or any(size % multiple for size in space):
      raise BenchmarkError(
        f"--shape, --width, --depth: a U-Net of {options.depth} levels and width {options.width} "
        f"takes sizes that are multiples of {multiple}, found {space}"
      )
