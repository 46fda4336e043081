"""sharding: what several devices share."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from mesh_problem import MIN_SIZE, PAIRS, PLANE, VOLUME, mesh_of, problem

from rndpo_jax import models, types
from rndpo_jax.config import base_config
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import sharding
from rndpo_jax.training import checkpoint, train_step


def test_the_mesh_goes_through_the_processes_in_order(monkeypatch):
  """As a TPU slice of two hosts may be wired: its rows belong to both of them."""
  devices = [SimpleNamespace(process_index=i // 2 % 2, id=i) for i in range(8)]
  monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
  wired = lambda shape, devices, **_: np.array(devices).reshape(shape)  # noqa: E731
  monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", wired)
  placed = sharding.make_mesh(devices, space=2)
  assert placed.shape == (4, 1, 2)
  assert [device.id for device in placed.flat] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_split_and_join_undo_each_other():
  tree = {"a": np.arange(48).reshape(16, 3)}
  split = sharding.split_over_local_devices(tree)
  assert split["a"].shape == (8, 2, 3)
  np.testing.assert_array_equal(sharding.join_local_devices(split)["a"], tree["a"])


def test_batch_size_that_cannot_be_shared_is_refused():
  with pytest.raises(ConfigError, match="config.x: found 12.*use 8 or 16"):
    sharding.check_batch_size("config.x", 12, 8)


def test_the_default_network_stays_whole_in_two_and_three_dimensions():
  config = base_config()
  for dims in (2, 3):
    net = models.build(config.model, num_classes=2, spatial_dims=dims)
    images = np.zeros((1, *(8,) * dims, 1), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    placed = sharding.param_shardings(shapes, mesh_of(1, 8, 1), config.mesh.fsdp_min_size)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(placed))


def test_no_device_gets_more_of_a_batch_than_its_part():
  _, batch = problem(VOLUME)
  labelled = types.Batch(*batch.labelled.values(), *[np.ones(4)] * 2)
  placed, validated = sharding.put_batch((batch, labelled), mesh_of(2, 1, 2))
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), batch, placed)
  for array, shape in (
    (placed.pairs.images, (2, 6, 44, 2, 1)),
    (placed.pairs.chosen, (2, PAIRS, 2, 132)),
    (placed.pairs.weight, (2, PAIRS)),
    (placed.labelled["image"], (2, 6, 44, 2, 1)),
    (placed.labelled["label"], (2, 6, 44, 2)),
    (validated.images, (2, 6, 44, 2, 1)),
    (validated.labels, (2, 6, 44, 2)),
  ):
    assert {s.data.shape for s in array.addressable_shards} == {shape}


@pytest.mark.parametrize("axes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_a_state_goes_on_on_another_mesh(axes, tmp_path):
  params, optimizer = problem(PLANE)[0], optax.adam(0.1)

  def start(mesh):
    state = train_step.make_state(params, optimizer, mesh, True, MIN_SIZE)
    return state._replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))

  there = start(mesh_of(2, 2, 2))
  checkpoint.save(tmp_path, 3, there)
  like = train_step.make_state(
    jax.tree.map(np.zeros_like, params), optimizer, mesh_of(*axes), True, MIN_SIZE
  )
  _, here = checkpoint.restore_latest(tmp_path, like)
  for x, y, z in zip(*map(jax.tree.leaves, (there, here, like)), strict=True):
    np.testing.assert_array_equal(x, y)
    assert y.sharding == z.sharding
  whole = sharding.fetch(here.params)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), whole, params)
