"""trained: the checkpoint that is asked for."""

import shutil

import jax
import numpy as np
import pytest
from etils import epath

from rndpo_jax import errors
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.runtime import files


def test_checkpoints_by_name(tiny_run, tmp_path):
  workdir = tiny_run[1]
  network = trained_lib.load(workdir, "last")
  found = {name: trained_lib.load(workdir, name) for name in ("base", "best", "delivered", "4")}
  results = files.read_json(epath.Path(workdir) / "results.json")
  assert network.step == 8 and found["base"].step == 0 and found["4"].step == 4
  assert found["best"].step == results["selected"]["step"]
  assert found["delivered"].step == results["delivered"]["step"]
  by_step = {0: found["base"], 4: found["4"], 8: network}
  for name in ("best", "delivered"):
    jax.tree.map(
      np.testing.assert_array_equal, found[name].params, by_step[found[name].step].params
    )
  with pytest.raises(
    errors.ConfigError, match="no checkpoint of step 5; there are those of 0, 4, 8"
  ):
    trained_lib.load(workdir, "5")
  with pytest.raises(errors.ConfigError, match="--checkpoint: found 'final', expected delivered"):
    trained_lib.load(workdir, "final")
  with pytest.raises(errors.ConfigError, match="config.json is missing"):
    trained_lib.load(tmp_path, "base")
  shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("cases", "delivered"))
  with pytest.raises(
    errors.ConfigError, match="delivered.json is missing; run the stage 'evaluate'"
  ):
    trained_lib.load(tmp_path / "run", "delivered")
  assert trained_lib.load(tmp_path / "run", "last").step == 8  # the data are not read
