"""parallel: what several devices share."""

import numpy as np
import pytest

from rndpo_jax import parallel
from rndpo_jax.config import ConfigError


def test_split_and_join_undo_each_other():
  tree = {"a": np.arange(48).reshape(16, 3)}
  split = parallel.split_over_local_devices(tree)
  assert split["a"].shape == (8, 2, 3)
  np.testing.assert_array_equal(parallel.join_local_devices(split)["a"], tree["a"])


def test_batch_size_that_cannot_be_shared_is_refused():
  with pytest.raises(ConfigError, match="config.x: found 12.*use 8 or 16"):
    parallel.check_batch_size("config.x", 12, 8)
