"""Judges of your own: `package.module:function`, called as function(images, masks, probs).

A function that JAX can trace runs inside the compiled program of mining, on the device. Any other,
as in NumPy or PyTorch, runs on the host between two such programs: it gets writable NumPy arrays,
and returns numbers of shape [b, K] as an array, a list or a PyTorch tensor. Python code inside a
compiled program (`jax.pure_callback`) would be no way to do that: with several CPU devices it can
wait for itself for ever, and a function that has one is run on the host too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rndpo_jax import errors, user_code


def load(name: str) -> Callable:
  """The function that `package.module:function` names.

  Raises:
    JudgeError: naming the judge, if the module cannot be imported or fails, or there is no such
      function, or it cannot be called with three arguments.
  """
  try:
    return user_code.load(name, "(images, masks, probs)", None, None, None)
  except ValueError as error:
    raise errors.JudgeError(f"judge {name!r}: {error}") from error


def why_on_host(name: str, images, masks, probs) -> str | None:
  """Why a judge must run on the host; None if it can be traced, and so run on the device.

  Args:
    name: `package.module:function`.
    images: f32[b, *S, I], as all three an array or its shape.
    masks: u8[b, K, *S].
    probs: f32[b, K, *S, C].

  Raises:
    JudgeError: as `load`, or if it can be traced and returns another shape.
  """
  judge = on_device(name)
  try:
    jaxpr = jax.make_jaxpr(lambda *args: judge(*args, None))(images, masks, probs)
  except errors.JudgeError:
    raise
  except Exception as error:  # whatever it is, the host shows whether it is the judge's fault
    own = not type(error).__module__.startswith("jax")  # JAX's own text is on tracers
    text = f": {user_code.line(error)[:80]}" if own else ""
    return f"JAX cannot trace it ({type(error).__name__}{text})"
  return "it calls back to Python" if _has_callback(jaxpr.jaxpr) else None


def on_device(name: str) -> Callable[..., jax.Array]:
  """judge(images, masks, probs, context) -> f32[b, K], for use inside a compiled program.

  Raises:
    JudgeError: as `load`; the judge, if the function returns another shape.
  """
  function = load(name)

  def judge(images, masks, probs, context):
    del context
    scores = jnp.asarray(function(images, masks, probs))
    _check_shape(name, scores.shape, masks.shape[:2])
    return scores.astype(jnp.float32)

  return judge


def on_host(name: str) -> Callable[..., np.ndarray]:
  """judge(images, masks, probs) -> f32[b, K], of NumPy arrays.

  Raises:
    JudgeError: as `load`; the judge, naming itself, if the function raises anything, or returns
      what is no numbers, or another shape.
  """
  function = load(name)

  def judge(images: np.ndarray, masks: np.ndarray, probs: np.ndarray) -> np.ndarray:
    try:
      result = function(*(np.array(x) for x in (images, masks, probs)))  # copies can be written to
      scores = _as_numpy(result)
    except Exception as error:
      raise errors.JudgeError(f"judge {name!r} {user_code.what(error)}") from error
    if scores.dtype.kind not in "biuf":
      raise errors.JudgeError(
        f"judge {name!r} returned {type(result).__name__} of {scores.dtype}, expected numbers of "
        f"shape (images, proposals) = {masks.shape[:2]}"
      )
    _check_shape(name, scores.shape, masks.shape[:2])
    return scores.astype(np.float32)

  return judge


def _as_numpy(result: Any) -> np.ndarray:
  """Also of a PyTorch tensor, on whatever device and with whatever gradient."""
  return np.asarray(result.detach().cpu() if hasattr(result, "detach") else result)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
  if found != expected:
    raise errors.JudgeError(
      f"judge {name!r} returned shape {found}, expected (images, proposals) = {expected}"
    )


def _has_callback(jaxpr) -> bool:
  return any(
    "callback" in eqn.primitive.name or any(map(_has_callback, core.jaxprs_in_params(eqn.params)))
    for eqn in jaxpr.eqns
  )
