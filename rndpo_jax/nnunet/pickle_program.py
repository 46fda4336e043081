"""Runs a pickle's program on data alone: no name of it is ever looked up, imported or called.

A pickle is a list of instructions for a small machine with a stack. Python's own machine imports
whatever GLOBAL names and calls it in REDUCE, so that a file can run any command; a subclass that
allows some names still calls them with the file's arguments. Here a global is a `Global`, a call a
`Call` of it with its arguments, and both are values like a string; what they mean is up to the
reader. `pickletools.genops` splits the bytes and runs nothing.
"""

from __future__ import annotations

import pickletools
import reprlib
from collections.abc import Callable, Set
from typing import Any, NamedTuple

PROTOCOL = 2  # what torch.save writes unless asked otherwise
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, type(None))
_MARK = object()


class Global(NamedTuple):
  """A name that a pickle refers to, as in torch.FloatStorage."""

  name: str


class Call(NamedTuple):
  """A call that a pickle asks for."""

  function: Global
  arguments: tuple


class Persistent(NamedTuple):
  """What stands outside the pickle under this id."""

  id: Any


def run(data: bytes, allowed: Set[str], make: Callable[[Call], Any]) -> Any:
  """The value that a pickle describes.

  Args:
    data: the pickle, of protocol 2.
    allowed: names that it may refer to.
    make: what a call stands for; a `Call` itself, or a value in place of it.

  Returns:
    Dicts, lists, tuples, strings, numbers, True, False, None, Global, Persistent, and what `make`
    returned.

  Raises:
    ValueError: naming a global that is not allowed or an instruction that no such data need, or on
      bytes that are no pickle. Nothing of the pickle was executed.
  """
  machine = _Machine(allowed, make)
  try:
    instructions = list(pickletools.genops(data))
  except ValueError as error:
    raise ValueError(f"its pickle is damaged ({error})") from error
  try:
    for opcode, argument, _ in instructions[:-1]:  # the last one is STOP
      machine.step(opcode.name, argument)
    return machine.stack.pop()
  except (IndexError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


class _Machine:
  """The stack, and the memo of values that are used again."""

  def __init__(self, allowed: Set[str], make: Callable[[Call], Any]):
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.allowed = allowed
    self.make = make

  def step(self, name: str, argument: Any) -> None:
    """One instruction."""
    stack = self.stack
    if name in _LITERALS:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name == "MARK":
      stack.append(_MARK)
    elif name in ("BINPUT", "LONG_BINPUT"):
      self.memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(self.memo[argument])
    elif name in _COUNTS:
      stack.append(tuple(self._take(_COUNTS[name])))
    elif name == "TUPLE":
      stack.append(tuple(self._take_to_mark()))
    elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
      self._extend(name)
    else:
      self._refer(name, argument)

  def _refer(self, name: str, argument: Any) -> None:
    """Instructions that refer to something, or that change what a call made."""
    stack = self.stack
    if name == "GLOBAL":
      wanted = argument.replace(" ", ".", 1)
      if wanted not in self.allowed:
        raise ValueError(f"it refers to {wanted}, which no weights need; nothing of it was run")
      stack.append(Global(wanted))
    elif name == "REDUCE":
      function, arguments = self._take(2)
      if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError(f"its pickle calls {reprlib.repr(function)}, expected a global")
      stack.append(self.make(Call(function, arguments)))
    elif name == "BINPERSID":
      stack.append(Persistent(stack.pop()))
    elif name == "BUILD":  # sets attributes, such as the _metadata of weights: nothing reads them
      stack.pop()
    elif name == "PROTO":
      if argument != PROTOCOL:
        raise ValueError(f"it is a pickle of protocol {argument}, expected {PROTOCOL}")
    else:
      found = name if argument is None else f"{name} {argument!r}"
      raise ValueError(f"its pickle has the instruction {found}, which no weights need")

  def _extend(self, name: str) -> None:
    """Puts items into a dict or a list."""
    is_dict = name.startswith("SET")
    items = self._take_to_mark() if name.endswith("S") else self._take(2 if is_dict else 1)
    target = self.stack[-1]
    if type(target) is not (dict if is_dict else list):
      raise ValueError(f"its pickle puts items into {type(target).__name__}")
    if is_dict and not all(isinstance(key, _KEYS) for key in items[::2]):
      # Hashing tuples in tuples can take the stack, or for ever.
      raise ValueError("its pickle has keys that are no text or number, which no weights need")
    if is_dict:
      target.update(zip(items[::2], items[1::2], strict=True))
    else:
      target.extend(items)

  def _take(self, count: int) -> list[Any]:
    if len(self.stack) < count or _MARK in self.stack[-count:]:
      raise IndexError("too few values")
    taken = self.stack[-count:]
    del self.stack[-count:]
    return taken

  def _take_to_mark(self) -> list[Any]:
    place = len(self.stack) - 1
    while self.stack[place] is not _MARK:
      if place == 0:
        raise IndexError("no mark")
      place -= 1
    taken = self.stack[place + 1 :]
    del self.stack[place:]
    return taken
