"""Many fine-tunings as one program: seeds x (beta, learning rate), for sweeps.

Members of a population start from the same parameters and differ in their seed (the order of the
batches, the key), in beta and in the learning rate. Those of a seed share its batch, so that it is
loaded, moved and augmented once. Each member is `train_step.make_update`, nothing of its own:
AdamW's update is linear in the learning rate, so an optimiser of peak rate 1 is followed by a
factor.

The members are spread over the devices, which never talk to each other. Dimensions, beside those of
`types`: N seeds, R settings (pairs of beta and learning rate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from rndpo_jax import types
from rndpo_jax.runtime import sharding
from rndpo_jax.training import train_step, validation

FORMS = ("vmap", "map")
_WHOLE, _SEEDS, _SETTINGS = PartitionSpec(), PartitionSpec("seeds"), PartitionSpec("settings")
_MEMBERS = PartitionSpec("seeds", "settings")


class Settings(NamedTuple):
  """What the members of a seed differ in.

  Attributes:
    beta: f32[R].
    learning_rate: f32[R], the peak.
  """

  beta: types.Array
  learning_rate: types.Array


class State(NamedTuple):
  """The population between two steps.

  Attributes:
    train: step i32[], all other leaves with leading axes [N, R].
    diverged: i32[N, R], the first step whose loss or gradient was not finite, 0 if there is
      none. From it on the member stays as it was before that step.
  """

  train: train_step.TrainState
  diverged: jax.Array

  def evaluated(self) -> types.Params:
    """As `train_step.TrainState.evaluated`, with leading axes [N, R]."""
    return self.train.evaluated()


_STATE = State(train_step.TrainState(_WHOLE, _MEMBERS, _MEMBERS, _MEMBERS), _MEMBERS)


def grid(betas: Sequence[float], learning_rates: Sequence[float]) -> Settings:
  """Every beta with every learning rate, the latter going round first."""
  pairs = np.array([(b, r) for b in betas for r in learning_rates], np.float32)
  return Settings(*pairs.T)


def make_state(
  params: types.Params,
  optimizer: optax.GradientTransformation,
  num_seeds: int,
  num_settings: int,
  mesh: Mesh,
  with_ema: bool = False,
) -> State:
  """Every member at step 0, from the same parameters, on its device.

  Args:
    params: of the base segmenter; copied.
    optimizer: as `make_step` takes it.
    num_seeds: N.
    num_settings: R.
    mesh: from `sharding.make_population_mesh`.
    with_ema: whether averages of the parameters are kept.
  """

  def init(params):
    opt_state = _at_rate(optimizer, 1.0).init(params)
    train = train_step.TrainState(None, params, opt_state, params if with_ema else None)
    train = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_seeds, num_settings, *x.shape)), train)
    diverged = jnp.zeros((num_seeds, num_settings), jnp.int32)
    return State(train._replace(step=jnp.zeros((), jnp.int32)), diverged)

  return jax.jit(init, out_shardings=sharding.shardings(mesh, _STATE))(params)


def make_step(
  loss_fn: train_step.LossFn,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  form: str,
  accumulate_steps: int = 1,
  ema_decay: float = 0.0,
  log_every_steps: int = 1,
):
  """Compiles one update of every member.

  Args:
    loss_fn: as `train_step.make_update` takes it, a mean over the batch; it is handed the member's
      beta.
    optimizer: of peak learning rate 1; its update is multiplied by a member's rate.
    mesh: from `sharding.make_population_mesh`.
    form: one of FORMS. "vmap" takes all members of a device at once, which keeps an accelerator
      busy that a small network leaves idle. "map" takes one after another, in the memory of one
      member's activations; on CPU that is faster.
    accumulate_steps: as in `train_step.make_update`.
    ema_decay: likewise.
    log_every_steps: likewise.

  Returns:
    step(state, batches, keys, settings, reference=None) -> (state, metrics f32[N, R]); `state` is
    donated. Leaves of `batches` are [N, B, ...]; keys are [N], each that of a run; settings is a
    Settings; all share the parameters of the reference. In the metrics, `diverged` among them, of
    a diverged member is what its frozen parameters give.
  """

  def member(carry, step, batch, reference, key, setting):
    train, diverged = carry
    update = train_step.make_update(
      loss_fn,
      _at_rate(optimizer, setting.learning_rate),
      accumulate_steps,
      ema_decay,
      log_every_steps=log_every_steps,
    )
    moved, aux = update(train._replace(step=step), batch, key, reference, setting.beta)
    finite = jnp.isfinite(aux["loss"]) & jnp.isfinite(aux["grad_norm"])
    moves = finite & (diverged == 0)
    train = jax.tree.map(lambda x, y: jnp.where(moves, x, y), moved._replace(step=None), train)
    diverged = jnp.where(finite | (diverged > 0), diverged, step + 1)
    return State(train, diverged), {**aux, "diverged": diverged}

  specs = (_MEMBERS, _WHOLE, _SEEDS, _WHOLE, _SEEDS, _SETTINGS)
  update_all = _over_members(member, mesh, form, specs)

  def step(state, batches, keys, settings, reference=None):
    # Without an axis for members, the number of the step leaves a seed's key and augmentation so.
    number = state.train.step
    carry = state._replace(train=state.train._replace(step=None))
    (train, diverged), aux = update_all(carry, number, batches, reference, keys, settings)
    return State(train._replace(step=number + 1), diverged), aux

  placed = sharding.shardings(mesh, (_STATE, _MEMBERS))
  return jax.jit(step, donate_argnums=0, out_shardings=placed)


def make_validate(
  apply: Callable,
  num_classes: int,
  batches: Callable[[], Iterable[types.Batch]],
  mesh: Mesh,
  *,
  form: str,
) -> Callable[[types.Params], np.ndarray]:
  """validate(params with leading axes [N, R]) -> mean foreground Dice f64[N, R].

  Arguments and figure as in `validation.make_validate`, but every process has whole batches: every
  device goes through them with its own members.
  """

  def member(params, batch):
    return validation.image_figures(apply, num_classes, params, None, batch)["val_dice"]

  per_image = jax.jit(_over_members(member, mesh, form, (_MEMBERS, _WHOLE)))

  def validate(params):
    dice = [sharding.fetch(per_image(params, batch))[..., batch.valid] for batch in batches()]
    return np.mean(np.concatenate(dice, axis=-1), axis=-1, dtype=np.float64)

  return validate


def local_seeds(num_seeds: int, mesh: Mesh) -> list[int]:
  """The places of the seeds whose members are on devices of this process."""
  parts = sharding.shardings(mesh, _SEEDS).addressable_devices_indices_map((num_seeds,)).values()
  return sorted({place for (part,) in parts for place in range(num_seeds)[part]})


def put_batches(
  batches: dict[int, types.FinetuneBatch], num_seeds: int, mesh: Mesh
) -> types.FinetuneBatch:
  """Batches on the host -> leaves [N, B, ...], each seed's where its members are.

  Args:
    batches: a seed's place -> its batch, for `local_seeds`.
    num_seeds: N.
    mesh: from `sharding.make_population_mesh`.
  """
  of_seeds, places = sharding.shardings(mesh, _SEEDS), list(batches)

  def put(*rows):
    of = dict(zip(places, rows, strict=True))
    return jax.make_array_from_callback(
      (num_seeds, *rows[0].shape),
      of_seeds,
      lambda part: np.stack([of[place] for place in range(num_seeds)[part[0]]]),
    )

  return jax.tree.map(put, *batches.values())


def _at_rate(optimizer, learning_rate):
  return optax.chain(optimizer, optax.scale(learning_rate))


def default_form(mesh: Mesh) -> str:
  """That for a platform: on CPU "map", since grouped convolutions take twice as long there."""
  return "map" if mesh.devices.flat[0].platform == "cpu" else "vmap"


def _over_members(function: Callable, mesh: Mesh, form: str, specs: tuple) -> Callable:
  """Applies a function of one member to all: each device its own, in one of FORMS.

  Args:
    function: its arguments are a member's; what it returns gets leading axes [N, R].
    mesh: from `sharding.make_population_mesh`.
    form: of FORMS.
    specs: one an argument; it says which of the leading axes that argument has.
  """
  if form not in FORMS:
    raise ValueError(f"form: found {form!r}, expected one of {', '.join(FORMS)}")

  def over(inner, axis):
    mapped = [axis in spec for spec in specs]
    if form == "vmap":
      return jax.vmap(inner, in_axes=tuple(0 if m else None for m in mapped))

    def one_by_one(*args):
      def at(own):
        own = iter(own)
        return inner(*(next(own) if m else arg for m, arg in zip(mapped, args, strict=True)))

      own = [arg for m, arg in zip(mapped, args, strict=True) if m]
      return jax.lax.map(at, own)

    return one_by_one

  every = over(over(function, "settings"), "seeds")
  return jax.shard_map(every, mesh=mesh, in_specs=specs, out_specs=_MEMBERS, check_vma=False)
