"""What a compiled XLA program moves, read from its text.

`cost_analysis()` of a TPU program counts traffic inside the chip's vector memory like traffic to
HBM, a prefetch several times, and a custom call not at all. The scheduled text says where each
array lives: a layout with `S(1)` is in vector memory, one without is in HBM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
  "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
}  # fmt: skip
_COLLECTIVES = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
  "collective-broadcast", "ragged-all-to-all", "send", "recv",
)  # fmt: skip
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
  "replica-id", "opt-barrier",
}  # fmt: skip
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Array(NamedTuple):
  """Bytes of an array, also with the padding of its tiles, and whether it lives in HBM."""

  num_bytes: float
  padded_bytes: float
  in_hbm: bool


class Instruction(NamedTuple):
  """One instruction: its operands' names, the arrays read and written, the rest of its line."""

  name: str
  opcode: str
  operands: list[str]
  reads: list[Array]
  writes: list[Array]
  rest: str


def instructions(text: str) -> dict[str, list[Instruction]]:
  """Computation -> its instructions; the program itself is "ENTRY"."""
  computations: dict[str, list[Instruction]] = {}
  current, arrays = None, {}
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%(\S+) .*\{$", line)
    if head:
      current = computations.setdefault("ENTRY" if head[1] else head[2], [])
      arrays = {}
    found = _INSTRUCTION.match(line)
    if current is None or not found:
      continue
    name, kind, opcode, rest = found.groups()
    arrays[name] = _arrays(kind)
    operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    reads = [array for operand in operands for array in arrays.get(operand, [])]
    current.append(Instruction(name, opcode, operands, reads, arrays[name], rest))
  return computations


def hbm_bytes(text: str) -> float:
  """Bytes that a program reads from HBM and writes to it, as far as its text says.

  Loops count as often as they are known to run, else once; of the branches of a conditional the
  costliest counts. Of an array that is sliced at an index, as a loop slices what it goes through,
  the slice counts. An update in place counts as if it wrote the whole array.
  """
  computations = instructions(text)
  return sum(_total(i, computations, _traffic) for i in computations["ENTRY"])


def kernels(text: str) -> int:
  """Kernels that one run of a GPU program launches, library calls and copies among them.

  Counted as in `hbm_bytes`: loops as often as they are known to run, and what a command buffer
  holds one by one.
  """
  computations = instructions(text)
  return sum(_total(i, computations, _launches) for i in computations["ENTRY"])


def cycles(text: str) -> float:
  """The TPU compiler's own estimate of a program's clock cycles, as it scheduled it.

  Counted as in `hbm_bytes`. It is an estimate for choosing between programs, not a measured time.
  """
  computations = instructions(text)
  return sum(_total(i, computations, _cycles) for i in computations["ENTRY"])


def largest(text: str, least: float) -> list[tuple[str, float]]:
  """(opcode name, HBM bytes) of the program's own instructions that move `least` bytes or more."""
  computations = instructions(text)
  rows = [
    (f"{i.opcode} {i.name}", _total(i, computations, _traffic)) for i in computations["ENTRY"]
  ]
  return [row for row in rows if row[1] >= least]


def collectives(text: str) -> list[tuple[str, float]]:
  """(kind, bytes of its results) of each collective, as often as the loops around it run."""
  computations = instructions(text)
  times = dict.fromkeys(computations, 1)

  def enter(name: str, count: int) -> None:
    times[name] = count
    for instruction in computations[name]:
      if instruction.opcode == "while":
        trips, body = _loop(instruction, computations)
        enter(body, count * trips)

  enter("ENTRY", 1)
  found = []
  for name, body in computations.items():
    for instruction in body:
      kind = instruction.opcode.removesuffix("-start")
      if kind in _COLLECTIVES:
        size = sum(array.num_bytes for array in _results(instruction))
        found += [(kind, size)] * times[name]
  return found


def _loop(instruction: Instruction, computations: dict[str, list[Instruction]]) -> tuple[int, str]:
  """How often a loop runs (1 if that is unknown), and its body.

  A program for GPU or CPU says it; in one for TPU the condition compares a counter, which a scan
  starts at 0, with a constant.
  """
  body = re.search(r"body=%([\w.\-]+)", instruction.rest)[1]
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
    return int(known[1]), body
  condition = re.search(r"condition=%([\w.\-]+)", instruction.rest)
  parts = {i.name: i for i in computations.get(condition[1] if condition else "", [])}
  for part in parts.values():
    if part.opcode == "compare" and "direction=LT" in part.rest:
      counter, limit = (parts[name] for name in re.findall(r"%([\w.\-]+)", part.rest)[:2])
      number = re.match(r"(\d+)\)", limit.rest) if limit.opcode == "constant" else None
      if counter.opcode == "get-tuple-element" and number:
        return int(number[1]), body
  return 1, body


def _results(instruction: Instruction) -> list[Array]:
  """What an instruction writes. A start gives (operands, results, contexts), but for all-reduce."""
  opcode, count = instruction.opcode, len(instruction.reads)
  if opcode.endswith("-start") and opcode != "all-reduce-start":
    return instruction.writes[count : 2 * count]
  return instruction.writes


def _total(
  instruction: Instruction,
  computations: dict[str, list[Instruction]],
  cost: Callable[[Instruction, dict[str, list[Instruction]]], float],
) -> float:
  """`cost` of one instruction, or of what the loop, branch or call that it is holds."""

  def total(name: str) -> float:
    return sum(_total(inner, computations, cost) for inner in computations[name])

  opcode, rest = instruction.opcode, instruction.rest
  if opcode == "while":
    trips, body = _loop(instruction, computations)
    return trips * total(body)
  if opcode == "conditional":
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    names = listed[1] if listed else " ".join(re.findall(r"_computation=(%[\w.\-]+)", rest))
    return max(total(name) for name in re.findall(r"%([\w.\-]+)", names))
  if opcode == "call":
    return total(re.search(r"to_apply=%([\w.\-]+)", rest)[1])
  return cost(instruction, computations)


def _cycles(instruction: Instruction, _) -> float:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  return float(found[1]) if found else 0.0


def _launches(instruction: Instruction, _) -> int:
  return int(not (instruction.opcode in _FREE or instruction.opcode.endswith("-done")))


def _traffic(instruction: Instruction, computations: dict[str, list[Instruction]]) -> float:
  """HBM bytes of one instruction."""
  opcode, rest = instruction.opcode, instruction.rest
  if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in rest:
    return 0.0
  if opcode in ("copy-start", "slice-start"):
    # A prefetch or eviction gives (to, from, context) or (from, to, context): the smaller moves.
    ends = instruction.writes[:2]
    return min(end.padded_bytes for end in ends) * sum(end.in_hbm for end in ends)
  moved = sum(array.padded_bytes for array in _results(instruction) if array.in_hbm)
  # Operands that are tuples have several arrays: no fusion takes them.
  aligned = len(instruction.operands) == len(instruction.reads)
  for place, array in enumerate(instruction.reads):
    if array.in_hbm:
      part = _sliced(instruction, place, computations) if aligned else math.inf
      moved += min(array.padded_bytes, part)
  return moved


def _sliced(
  instruction: Instruction, place: int, computations: dict[str, list[Instruction]]
) -> float:
  """Bytes that an instruction reads of an operand by slicing it; infinite if it reads it all."""
  if instruction.opcode == "dynamic-slice" and place == 0:
    return sum(array.padded_bytes for array in instruction.writes)
  called = re.search(r"calls=%([\w.\-]+)", instruction.rest)
  inner = computations.get(called[1], []) if called else []
  name = [i.name for i in inner if i.opcode == "parameter" and i.rest.startswith(f"{place})")]
  uses = [(i, at) for i in inner for at, used in enumerate(i.operands) if [used] == name]
  return sum(_sliced(i, at, computations) for i, at in uses) if uses else math.inf


def _arrays(kind: str) -> list[Array]:
  """Arrays of a type, be it a tuple; `S(1)` and up are not HBM."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(kind):
    if dtype in _BITS:
      sizes = [int(n) for n in dims.split(",") if n]
      item = _BITS[dtype] / 8
      padded = math.prod(_padded(sizes, layout)) * item
      found.append(Array(math.prod(sizes) * item, padded, "S(" not in layout))
  return found


def _padded(dims: list[int], layout: str) -> list[int]:
  """Dimensions rounded up to the tile of a layout such as {2,0,1:T(8,128)}, minor axis first."""
  dims = list(dims)
  order = re.match(r"\{([\d,]+):[^}]*?T\(([\d,]+)\)", layout)
  if order:
    axes, tile = ([int(n) for n in part.split(",")] for part in order.groups())
    for axis, step in zip(axes, reversed(tile), strict=False):
      dims[axis] = -(-dims[axis] // step) * step
  return dims
