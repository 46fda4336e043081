"""checkpoint: round trip, ascending steps, and errors that name the folder and the remedy."""

import errno

import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import checkpoint

TREE = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(7)}


@pytest.fixture
def saved(tmp_path):
  for step in (2, 10, 1):
    checkpoint.save(tmp_path, step, TREE)
  return tmp_path


def test_round_trip_with_and_without_a_template(saved):
  plain = checkpoint.restore_params(saved, 10, stage_directory=saved)
  for tree in (plain, checkpoint.restore(saved, 10, TREE)):
    np.testing.assert_array_equal(tree["layer"]["kernel"], TREE["layer"]["kernel"])
    assert tree["step"] == 7 and tree["step"].dtype == np.int32


def test_steps_are_those_that_are_whole_in_numeric_order(saved):
  assert checkpoint.steps(saved) == [1, 2, 10]
  (saved / "11").mkdir()
  (saved / "12.orbax-checkpoint-tmp").mkdir()
  assert checkpoint.steps(saved) == [1, 2, 10]
  checkpoint.remove_before(saved, 10)
  assert checkpoint.steps(saved) == [10]
  assert checkpoint.steps(saved / "nowhere") == []


def test_corrupt_checkpoint_is_named_with_its_remedy(saved):
  for path in (saved / "10" / "ocdbt.process_0" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:10])
  for path in (saved / "10" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:10])
  for read in (
    lambda: checkpoint.restore_params(saved, 10, stage_directory=saved),
    lambda: checkpoint.restore(saved, 10, TREE),
  ):
    message = f"10 cannot be read.*Delete the folder {saved}"
    with pytest.raises(checkpoint.CheckpointError, match=message):
      read()


def test_another_structure_is_refused(saved):
  other = {"layer": {"kernel": jnp.zeros((5, 5))}, "step": jnp.int32(0)}
  with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
    checkpoint.restore(saved, 10, other)


def test_full_disk_is_an_os_error_that_names_the_checkpoint(tmp_path, monkeypatch):
  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
  with pytest.raises(OSError, match="checkpoint .*7 cannot be written") as error:
    checkpoint.save(tmp_path, 7, TREE)
  assert error.value.errno == errno.ENOSPC
