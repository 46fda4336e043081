"""population: a member is what an ordinary run would be, whatever the others do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import losses, types
from rndpo_jax.config import base_config
from rndpo_jax.errors import ConfigError
from rndpo_jax.losses import bit_planes
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import finetune
from rndpo_jax.sweep import population
from rndpo_jax.training import train_step, validation

SIZE, CLASSES, ROWS, STEPS = (6, 4), 3, 8, 4
BETAS, RATES, SEEDS = (0.5, 20.0), (0.01, 0.1), (3, 4)
GRID = [(beta, rate) for beta in BETAS for rate in RATES]
ONE, EIGHT = jax.devices()[:1], jax.devices()


def segmenter():
  """Two convolutions, enough for their gradients to be grouped ones under vmap."""

  def convolve(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

  def apply(params, images, key=None):
    del key
    return convolve(jnp.tanh(convolve(images, params["in"])), params["out"])

  return types.Segmenter(None, apply, None, None)


@functools.cache
def params():
  keys = jax.random.split(jax.random.key(0))
  return {
    "in": 0.5 * jax.random.normal(keys[0], (3, 3, 1, 4)),
    "out": 0.5 * jax.random.normal(keys[1], (3, 3, 4, CLASSES)),
  }


@functools.cache
def batch_of(seed, step):
  rng = np.random.default_rng([seed, step])
  masks = rng.integers(0, CLASSES, (2, ROWS, 2, *SIZE)).astype(np.uint8)
  image = rng.normal(size=(ROWS, *SIZE, 1)).astype(np.float32)
  frozen = segmenter().apply(params(), image)
  pairs = types.PairBatch(
    images=image,
    chosen=np.asarray(bit_planes.pack(masks[0], CLASSES, 2)),
    rejected=np.asarray(bit_planes.pack(masks[1], CLASSES, 2)),
    reference_margin=np.asarray(losses.pair_margin(frozen, *masks)),
    reference_log_prob=np.asarray(losses.pair_log_prob(frozen, *masks)),
    weight=rng.integers(0, 2, (ROWS, 2)).astype(np.float32),
    voxel_volume=np.ones(ROWS, np.float32),
  )
  return types.FinetuneBatch(pairs=pairs, unlabelled={"image": image[::-1]})


def options(chosen=0.0, weak_to_strong=0.0, **changes):
  config = base_config()
  config.finetune.terms.chosen.weight = chosen
  config.finetune.terms.weak_to_strong.weight = weak_to_strong
  config.augment.turn = 0.0  # a quarter needs H = W
  config.data.size = SIZE
  config.finetune.update({"num_steps": STEPS, "weight_decay": 0.1, "clip_norm": 0.5, **changes})
  return config


def loss_fn(config):
  return finetune.make_loss_fn(config, segmenter().apply, num_classes=CLASSES)


def key_of(seed):
  return jax.random.fold_in(jax.random.key(seed), 2)


def reference_of(config):
  return params() if config.finetune.reference == "online" else None


@functools.cache
def ordinary_step(**changes):
  """(config, optimizer, step) of runs alone, on one device."""
  config = options(**changes)
  optimizer, tuned = finetune.optimizer(config.finetune), config.finetune
  step = train_step.make_train_step(
    loss_fn(config), optimizer, sharding.make_mesh(ONE), tuned.accumulate_steps, tuned.ema_decay
  )
  return config, optimizer, step


def ordinary(seed, beta, rate, stop=STEPS, **changes):
  """(state, metrics of the last step) of one run alone, on one device."""
  config, optimizer, step = ordinary_step(beta=beta, learning_rate=rate, **changes)
  mesh, tuned = sharding.make_mesh(ONE), config.finetune
  state = train_step.make_state(params(), optimizer, mesh, with_ema=tuned.ema_decay > 0)
  for number in range(stop):
    batch = sharding.put_batch(batch_of(seed, number), mesh)
    state, aux = step(state, batch, key_of(seed), reference_of(config))
  return jax.device_get((state, aux))


@functools.cache
def step_together(form, mesh, **changes):
  """(config, optimizer, step) of all members; compiled once for the tests that take it."""
  config = options(learning_rate=1.0, **changes)
  optimizer, tuned = finetune.optimizer(config.finetune), config.finetune
  step = population.make_step(
    loss_fn(config), optimizer, mesh, form=form,
    accumulate_steps=tuned.accumulate_steps, ema_decay=tuned.ema_decay,
  )  # fmt: skip
  return config, optimizer, step


def trained(form, devices, settings=None, spoilt=None, **changes):
  """(State, metrics of the last step) of all members together; `spoilt` (seed, step) is a NaN."""
  settings = population.grid(BETAS, RATES) if settings is None else settings
  mesh = sharding.make_population_mesh(len(SEEDS), len(settings.beta), devices)
  assert mesh.size == len(devices)
  config, optimizer, step = step_together(form, mesh, **changes)
  tuned = config.finetune
  state = population.make_state(
    params(), optimizer, len(SEEDS), len(settings.beta), mesh, with_ema=tuned.ema_decay > 0
  )
  keys = jnp.stack([key_of(seed) for seed in SEEDS])
  for number in range(STEPS):
    rows = [batch_of(seed, number) for seed in SEEDS]
    if spoilt is not None and spoilt[1] == number:
      row = rows[spoilt[0]]
      image = row.pairs.images.copy()
      image[0, 0, 0] = np.nan
      rows[spoilt[0]] = row._replace(pairs=row.pairs._replace(images=image))
    batches = population.put_batches(dict(enumerate(rows)), len(rows), mesh)
    before = state
    state, aux = step(state, batches, keys, settings, reference_of(config))
  assert before.train.params["in"].is_deleted()
  assert step._cache_size() == 1
  return jax.device_get((state, aux))


def check_members(found, expected, rtol=2e-5):
  """Each member against the ordinary run of its seed, beta and rate."""
  state, aux = found
  assert int(state.train.step) == STEPS and not state.diverged.any()
  for i, j in np.ndindex(state.diverged.shape):
    alone, alone_aux = expected[i][j]
    for name in ("params", "ema"):
      member = jax.tree.map(lambda x, i=i, j=j: x[i, j], getattr(state.train, name))
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        member,
        getattr(alone, name),
      )
    for name in ("loss", "grad_norm", "accuracy", "num_pairs"):
      np.testing.assert_allclose(aux[name][i, j], alone_aux[name], rtol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def alone():
  return [[ordinary(seed, *setting) for setting in GRID] for seed in SEEDS]


@pytest.mark.parametrize("form", population.FORMS)
@pytest.mark.parametrize("devices", [ONE, EIGHT], ids=["one", "eight"])
def test_a_member_is_the_run_of_its_seed_beta_and_rate(alone, form, devices):
  moved = [alone[0][j][0].params["out"] for j in range(len(GRID))]
  assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(moved, moved[1:], strict=False))
  check_members(trained(form, devices), alone)


@pytest.mark.parametrize(
  "changes",
  [
    {"ema_decay": 0.5, "weak_to_strong": 0.5},
    {
      "accumulate_steps": 2,
      "chosen": 0.5,
      "reference": "online",
      "augment": True,
      "objective": "apo_zero",
      "schedule": "constant",
    },
  ],
  ids=["taught", "accumulated and augmented"],
)
@pytest.mark.usefixtures("emitters_in_use")
def test_options_act_on_members_as_on_a_run(alone, changes):
  settings = population.grid(BETAS[1:], RATES[:1])
  expected = [[ordinary(seed, BETAS[1], RATES[0], **changes)] for seed in SEEDS]
  for name in ("chosen", "weak_to_strong"):
    assert all((name in aux) == (name in changes) for ((_, aux),) in expected)
  # They do act: what is kept of the run is another than without them.
  kept, plain = (runs[0][j][0].evaluated() for runs, j in ((expected, 0), (alone, 2)))
  assert np.abs(kept["out"] - plain["out"]).max() > 1e-3
  check_members(trained("vmap", EIGHT[:2], settings, **changes), expected)


@pytest.mark.parametrize("form", population.FORMS)
def test_a_member_that_diverges_is_frozen_and_leaves_the_others_bit_equal(form):
  tame = population.grid(BETAS, (0.01, 0.1))
  wild = tame._replace(learning_rate=np.float32([0.01, 0.1, 3e38, 0.1]))
  (calm, _), (state, aux) = (trained(form, ONE, settings) for settings in (tame, wild))
  np.testing.assert_array_equal(state.diverged[:, 2], [2, 2])  # step 1 threw the parameters away
  assert not np.isfinite(aux["loss"][:, 2]).any()
  others = [0, 1, 3]
  assert not state.diverged[:, others].any() and np.isfinite(aux["loss"][:, others]).all()
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[:, others], b[:, others]),
    state.train._replace(step=None),
    calm.train._replace(step=None),
  )
  counts = [x for x in jax.tree.leaves(state.train.opt_state) if x.dtype == np.int32]
  assert counts and all((count[:, 2] == 1).all() for count in counts)  # Adam stands still, too


def test_a_seed_with_one_spoilt_batch_stays_as_it_was_before_it():
  state, aux = trained("vmap", EIGHT, spoilt=(1, 1))
  calm, _ = trained("vmap", EIGHT)
  np.testing.assert_array_equal(state.diverged, [[0] * 4, [2] * 4])
  assert np.isfinite(aux["loss"]).all()  # the later batches would do
  for name, kernel in state.train.params.items():
    np.testing.assert_array_equal(kernel[0], calm.train.params[name][0])
  alone, _ = ordinary(SEEDS[1], *GRID[3], stop=1)
  found = state.train.params["out"][1, 3]
  np.testing.assert_allclose(found, alone.params["out"], rtol=2e-5, atol=1e-6)


def test_validation_is_that_of_each_member():
  mesh = sharding.make_population_mesh(2, 4)
  many = jax.random.normal(jax.random.key(1), (2, 4, 3, 3, 4, CLASSES))
  members = {"in": jnp.broadcast_to(params()["in"], (2, 4, 3, 3, 1, 4)), "out": many}
  rng = np.random.default_rng(0)
  batch = types.Batch(
    rng.normal(size=(ROWS, *SIZE, 1)).astype(np.float32),
    rng.integers(0, CLASSES, (ROWS, *SIZE)).astype(np.uint8),
    np.arange(ROWS, dtype=np.int32),
    np.arange(ROWS) < 5,
  )
  apply, batches = segmenter().apply, lambda: [batch, batch]
  plain = validation.make_validate(apply, CLASSES, batches, sharding.make_mesh())
  expected = [
    [plain({"in": params()["in"], "out": many[i, j]})["val_dice"] for j in range(4)]
    for i in range(2)
  ]
  for form in population.FORMS:
    found = population.make_validate(apply, CLASSES, batches, mesh, form=form)(members)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.ptp(expected) > 0.01


@pytest.mark.parametrize(
  "seeds,settings,devices,shape",
  [(2, 4, 8, (2, 4)), (8, 4, 8, (8, 1)), (3, 6, 8, (3, 2)), (1, 5, 8, (1, 5)), (1, 7, 4, (1, 1))],
)
def test_members_share_the_most_devices_that_they_can_share_evenly(seeds, settings, devices, shape):
  mesh = sharding.make_population_mesh(seeds, settings, EIGHT[:devices])
  assert mesh.devices.shape == shape and mesh.axis_names == ("seeds", "settings")


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh looks at."""

  id: int
  process_index: int
  platform: str = "cpu"
  device_kind: str = "cpu"


@pytest.mark.parametrize(
  "seeds,settings,processes,each,grid",
  [
    (2, 4, 2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # a seed a process
    (1, 6, 2, 4, [[0, 1, 2, 4, 5, 6]]),  # three of each one's four
    (3, 2, 2, 8, [[0, 1], [2, 8], [9, 10]]),
    (4, 1, 4, 2, [[0], [2], [4], [6]]),
  ],
)
def test_every_process_gives_as_many_devices(seeds, settings, processes, each, grid):
  devices = [Device(i, i // each) for i in range(processes * each)]
  mesh = sharding.make_population_mesh(seeds, settings, devices)
  assert [[device.id for device in row] for row in mesh.devices] == grid


def test_members_that_the_processes_cannot_share_are_refused():
  devices = [Device(i, i // 2) for i in range(8)]
  with pytest.raises(ConfigError, match="4 processes cannot share 6 members.*a multiple of 4"):
    sharding.make_population_mesh(3, 2, devices)


def test_an_unknown_form_is_refused():
  with pytest.raises(ValueError, match="form: found 'loop', expected one of vmap, map"):
    population.make_validate(None, 2, None, sharding.make_population_mesh(1, 1), form="loop")
