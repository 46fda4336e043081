"""One step of training: its state, the update, and the same compiled over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rndpo_jax import types
from rndpo_jax.runtime import sharding
from rndpo_jax.training import accumulation

# (params, batch, inputs) -> (loss, metrics); their names: see `accumulation.in_micro_batches`.
LossFn = Callable[[types.Params, Any, types.StepInputs], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
  """What a step reads and replaces: step i32[], params, opt_state. No reference network.

  `ema`, None if it is off, is the exponential moving average of the parameters.
  """

  step: jax.Array
  params: types.Params
  opt_state: optax.OptState
  ema: types.Params | None = None

  def evaluated(self) -> types.Params:
    """The policy's parameters that are validated and kept: the average if there is one."""
    return types.policy_of(self.params if self.ema is None else self.ema)


def make_state(
  params: types.Params,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  with_ema: bool = False,
  fsdp_min_size: int = 0,
):
  """A TrainState at step 0; it owns copies, since the step donates its buffers.

  Arrays of `fsdp_min_size` elements or more are split over the mesh's `fsdp` axis, by
  `sharding.param_shardings`.
  """

  def init(params):
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

  shardings = sharding.param_shardings(jax.eval_shape(init, params), mesh, fsdp_min_size)
  return jax.jit(init, out_shardings=shardings)(params)


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  accumulate_steps: int = 1,
  ema_decay: float = 0.0,
  fsdp_min_size: int = 0,
  log_every_steps: int = 1,
):
  """Compiles `make_update` over a mesh.

  Args:
    loss_fn: a mean over the global batch, so its gradient is that of one device holding all of it.
    optimizer: as in `make_update`, and so the next two.
    mesh: from `sharding.make_mesh`; the batch comes from `sharding.put_batch`.
    fsdp_min_size: as in `make_state`; gradients are placed as the parameters are, before
      micro-batches add up.
    log_every_steps: as in `make_update`.

  Returns:
    step(state, batch, key, reference=None) -> (state, metrics); `state` is donated.
  """

  def place(tree):
    return jax.lax.with_sharding_constraint(
      tree, sharding.param_shardings(tree, mesh, fsdp_min_size)
    )

  update = make_update(loss_fn, optimizer, accumulate_steps, ema_decay, place, log_every_steps)
  return jax.jit(update, donate_argnums=0, out_shardings=(None, sharding.replicated(mesh)))


def make_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  accumulate_steps: int = 1,
  ema_decay: float = 0.0,
  place: Callable = lambda tree: tree,
  log_every_steps: int = 1,
):
  """One update, pure.

  Args:
    loss_fn: (params, batch, types.StepInputs) -> (loss f32[], metrics of f32[]).
    optimizer: an Optax transformation.
    accumulate_steps: micro-batches that a batch is gone through in, for less memory; see
      `accumulation.in_micro_batches`.
    ema_decay: d of ema = d ema + (1 - d) params, where the state holds an average; it starts at
      the first parameters.
    place: says where gradients and states are on a mesh.
    log_every_steps: steps between those whose metrics are logged, which the loss is told.

  Returns:
    update(state, batch, key, reference=None, beta=None) -> (state, metrics, loss and grad_norm
    among them). `key` is the same at every step and folded with the step's number; `reference`,
    `beta` and the average, as the teacher, are handed to the loss.
  """

  def gradient(params, batch, inputs):
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, inputs)
    return value, place(grads)

  if accumulate_steps > 1:
    gradient = accumulation.in_micro_batches(gradient, accumulate_steps)

  def update(state: TrainState, batch, key, reference=None, beta=None):
    is_logged = log_every_steps == 1 or (state.step + 1) % log_every_steps == 0
    step_key = jax.random.fold_in(key, state.step)
    inputs = types.StepInputs(step_key, reference, beta, is_logged, state.ema, state.step)
    (loss, aux), grads = gradient(state.params, batch, inputs)
    aux.pop("weight", None)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    aux = {**aux, "loss": loss, "grad_norm": optax.tree.norm(grads)}
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    return place(TrainState(state.step + 1, params, opt_state, ema)), aux

  return update
