"""Writes values as the instructions of pickle's protocol 2, for readers such as `torch.load`.

The counterpart of `pickle_program`: what that gives back as Global, Call and Persistent is written
from them, and nothing of Python's pickle is used. Every instruction is of those that PyTorch's own
reader takes with `weights_only=True`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from typing import Any

from rndpo_jax.nnunet.pickle_program import PROTOCOL, Call, Global, Persistent

_SMALL = 2**31  # BININT holds -2**31 .. 2**31 - 1


class Ordered(dict):
  """A dict that is written as `collections.OrderedDict`."""


def dump(value: Any) -> bytes:
  """The pickle of a value, as `encode` writes it."""
  return b"\x80" + bytes([PROTOCOL]) + encode(value) + b"."


def encode(value: Any) -> bytes:
  """The instructions that make a value.

  Args:
    value: of None, bool, int, float, str, tuple, list, dict, Ordered, Global, Call, Persistent.

  Raises:
    TypeError: on any other value.
  """
  match value:
    case None:
      return b"N"
    case bool():
      return b"\x88" if value else b"\x89"
    case int():
      return _integer(value)
    case float():
      return b"G" + struct.pack(">d", value)
    case str():
      text = value.encode()
      return b"X" + struct.pack("<I", len(text)) + text
    case Global():
      module, _, name = value.name.rpartition(".")
      return f"c{module}\n{name}\n".encode()
    case Call():
      return encode(value.function) + encode(value.arguments) + b"R"
    case Persistent():
      return encode(value.id) + b"Q"
    case tuple():
      return b"(" + b"".join(map(encode, value)) + b"t"
    case list():
      return b"](" + b"".join(map(encode, value)) + b"e"
    case Ordered():
      return encode(Call(Global("collections.OrderedDict"), ())) + _items(value)
    case dict():
      return b"}" + _items(value)
  raise TypeError(f"found {type(value).__name__}, expected plain data")


def _integer(value: int) -> bytes:
  if -_SMALL <= value < _SMALL:
    return b"J" + struct.pack("<i", value)
  size = value.bit_length() // 8 + 1
  return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _items(value: Mapping) -> bytes:
  return b"(" + b"".join(map(encode, itertools.chain(*value.items()))) + b"u"
