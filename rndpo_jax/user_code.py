"""Functions of the user's own, named in a config as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import traceback
from collections.abc import Callable

import jax


def is_name(name: str) -> bool:
  """Whether a name reads as `package.module:function`."""
  module, colon, function = name.partition(":")
  return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


def load(name: str, expected: str, *args, **kwargs) -> Callable:
  """The function of that name, which can be called with such arguments.

  Args:
    name: `package.module:function`.
    expected: the arguments as text, for the message.
    *args: values of any kind in place of the arguments.
    **kwargs: likewise.

  Raises:
    ValueError: if the module cannot be imported or fails, or there is no such function, or it
      cannot be called so.
  """
  module, _, function_name = name.partition(":")
  try:
    function = getattr(importlib.import_module(module), function_name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"{error}; expected package.module:function, importable from here") from error
  except (Exception, SystemExit) as error:
    raise ValueError(f"importing {module} {what(error)}") from error
  if not callable(function):
    raise ValueError(f"it is of type {type(function).__name__}, expected a function")
  try:
    signature = inspect.signature(function)
  except ValueError:  # of a function in C
    return function
  try:
    signature.bind(*args, **kwargs)
  except TypeError as error:
    raise ValueError(f"it takes {signature}, expected {expected}") from error
  return function


def what(error: BaseException) -> str:
  """What was raised and where, in one line."""
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if "importlib" not in frame.filename][-1]
  where = f"{pathlib.Path(own.filename).name}, line {own.lineno}"
  return f"raised {type(error).__name__}: {line(error)[:300]} ({where})"


def line(error: BaseException) -> str:
  """The line that says what happened; of an error in a callback it is the last."""
  lines = str(error).strip().splitlines() or [""]
  return lines[-1 if isinstance(error, jax.errors.JaxRuntimeError) else 0]
