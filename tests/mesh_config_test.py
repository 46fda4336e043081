"""Meshes by config: what the devices cannot make, and a job that goes on with another."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rndpo_jax import pipeline
from rndpo_jax.checks import config_checks
from rndpo_jax.errors import ConfigError
from rndpo_jax.runtime import files, sharding
from rndpo_jax.training import checkpoint, metric_writer


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"mesh__fsdp": 3}, "config.mesh: found fsdp=3 and space=1, but 8 .* product of 1, 2, 4, 8"),
    ({"mesh__fsdp": 4, "mesh__space": 4}, "config.mesh: found fsdp=4 and space=4.* grouped by 16"),
    (
      {"base__batch_size": 6, "mesh__space": 2},
      "base.batch_size: found 6, which 4 groups of 2 dev",
    ),
    (
      {"finetune__accumulate_steps": 4, "mesh__space": 2},
      "accumulate_steps: found 4, but batch_size=8 on 4 groups of 2 devices .* no multiple of 16",
    ),
  ],
)
def test_a_mesh_that_the_devices_cannot_make_is_refused(tiny_config, changes, message):
  pipeline.check_here(tiny_config(mesh__fsdp=2, mesh__space=2, finetune__accumulate_steps=2))
  pipeline.check_here(tiny_config(**changes), ["prepare", "mine", "evaluate"])  # they use none
  with pytest.raises(ConfigError, match=message):
    pipeline.check_here(tiny_config(**changes))


@pytest.mark.parametrize(
  "changes,message",
  [
    (
      {"mesh__space": 16, "model__depth": 2},
      "mesh.space: found 16, but the deepest .* has 8 rows; use 1, 2, 4, 8",
    ),
    ({"mesh__space": 0}, "mesh.space: found 0"),
    ({"mesh__fsdp": -1}, "mesh.fsdp: found -1"),
    ({"mesh__fsdp_min_size": 0}, "mesh.fsdp_min_size: found 0"),
  ],
)
def test_values_of_the_mesh_that_cannot_work_are_refused(tiny_config, changes, message):
  with pytest.raises(ConfigError, match=message):
    config_checks.validate(tiny_config(**changes))


def test_an_image_stays_within_a_process():
  sharding.check_mesh(8, 2, 2, num_local=2)
  with pytest.raises(
    ConfigError, match="mesh.space: found 4.* one process, and each has 2; use 1, 2"
  ):
    sharding.check_mesh(8, 1, 4, num_local=2)


def test_a_job_goes_on_with_another_mesh(tiny_run, tmp_path, capsys):
  """Begun with all devices on `data`; the second half of the fine-tuning on 2 x 2 x 2."""
  config, there = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(there, workdir)
  for step in ("state/8", "params/8"):
    shutil.rmtree(workdir / "finetune" / step)
  (workdir / "finetune" / "done.json").unlink()
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict({"mesh.fsdp": 2, "mesh.space": 2, "mesh.fsdp_min_size": 500})
  pipeline.run(config, workdir, ("finetune",))
  assert "finetune: going on from step 4" in capsys.readouterr().out
  assert files.read_json(workdir / "config.json")["config"]["mesh"]["space"] == 2
  last = [metric_writer.read_rows(path / "finetune", "val")[-1] for path in (there, workdir)]
  assert last[0]["step"] == last[1]["step"] == 8
  np.testing.assert_allclose(last[1]["val_dice"], last[0]["val_dice"], atol=0.01)
  params = [
    checkpoint.restore_params(path / "finetune" / "params", 8, stage_directory="")
    for path in (there, workdir)
  ]
  # Four steps of Adam, each of at most the learning rate 1e-3, amplify what rounding differs by.
  for x, y in zip(*map(jax.tree.leaves, params), strict=True):
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  "shape,fsdp,min_size,spec",
  [
    ((3, 3, 8, 16), 2, 1000, (None, None, None, "fsdp")),
    ((3, 3, 16, 8), 2, 1000, (None, None, "fsdp")),
    ((3, 3, 16, 16), 2, 1000, (None, None, None, "fsdp")),
    ((3, 3, 64, 3), 2, 1000, (None, None, "fsdp")),
    ((64, 6), 4, 384, ("fsdp",)),
    ((3, 3, 8, 16), 2, 1153, ()),  # one element too few
    ((27, 27, 3), 2, 1000, ()),  # no axis divides
    ((3, 3, 8, 16), 1, 1000, ()),
    ((), 2, 0, ()),
  ],
)
def test_the_largest_axis_that_divides_is_split(shape, fsdp, min_size, spec):
  array = jax.ShapeDtypeStruct(shape, np.float32)
  mesh = sharding.make_mesh(fsdp=fsdp)
  assert sharding.param_shardings({"a": array}, mesh, min_size)["a"].spec == PartitionSpec(*spec)
