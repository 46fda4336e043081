"""parallel: what several devices share."""

from types import SimpleNamespace

import numpy as np
import pytest

from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import sharding


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
