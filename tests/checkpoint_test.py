"""checkpoint: round trip, background writing, corrupt ones refused, older ones taken instead."""

import errno
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import multihost, sharding
from rndpo_jax.training import checkpoint

TREE = {"layer": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(7)}


@pytest.fixture
def saved(tmp_path):
  for step in (2, 10, 1):
    checkpoint.save(tmp_path, step, TREE)
  return tmp_path


def test_round_trip_with_and_without_a_template(saved):
  plain = checkpoint.restore_params(saved, 10, stage_directory=saved)
  for tree in (plain, checkpoint.restore_latest(saved, TREE)[1]):
    np.testing.assert_array_equal(tree["layer"]["kernel"], TREE["layer"]["kernel"])
    assert tree["step"] == 7 and tree["step"].dtype == np.int32


def test_steps_are_those_that_are_whole_in_numeric_order(saved):
  assert checkpoint.steps(saved) == [1, 2, 10]
  (saved / "11").mkdir()
  (saved / "12.orbax-checkpoint-tmp").mkdir()
  assert checkpoint.steps(saved) == [1, 2, 10]
  checkpoint.keep_only(saved, (2, 10, 99))
  assert checkpoint.steps(saved) == [2, 10]
  assert checkpoint.steps(saved / "nowhere") == []


def test_corrupt_checkpoint_is_named_with_its_remedy(saved):
  checkpoint.keep_only(saved, (10,))
  for path in (saved / "10" / "ocdbt.process_0" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:10])
  for path in (saved / "10" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:10])
  for read in (
    lambda: checkpoint.restore_params(saved, 10, stage_directory=saved),
    lambda: checkpoint.restore_latest(saved, TREE),
  ):
    message = f"10 cannot be read.*Delete the folder {saved}"
    with pytest.raises(errors.CheckpointError, match=message):
      read()


def flip_one_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


def array_file(step_folder):
  """The file that holds the arrays' values: the largest that TensorStore wrote."""
  files = (step_folder / "ocdbt.process_0" / "d").iterdir()
  return max(files, key=lambda path: path.stat().st_size)


def test_one_changed_byte_of_an_array_is_not_read_as_a_value(tmp_path):
  random = {"x": jnp.asarray(np.random.default_rng(0).normal(size=5000), jnp.float32)}
  checkpoint.save(tmp_path, 1, random)
  flip_one_byte(array_file(tmp_path / "1"))
  with pytest.raises(errors.CheckpointError, match="1 cannot be read .the file .* is not what"):
    checkpoint.restore_latest(tmp_path, random)
  with pytest.raises(errors.CheckpointError, match="the file"):
    checkpoint.restore_params(tmp_path, 1, stage_directory=tmp_path)


def test_a_checkpoint_that_nothing_vouches_for_is_not_read(saved, capsys):
  (saved / "10" / "sha256.json").unlink()
  with pytest.raises(errors.CheckpointError, match="sha256.json is missing, which vouches"):
    checkpoint.restore_params(saved, 10, stage_directory=saved)
  assert checkpoint.restore_latest(saved, TREE)[0] == 2


def test_half_deleted_is_not_whole(saved, monkeypatch):
  """A kill while an old checkpoint is deleted."""

  def killed(path):
    raise KeyboardInterrupt

  monkeypatch.setattr(type(epath.Path(saved)), "rmtree", killed)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.keep_only(saved, (2, 10))
  assert checkpoint.steps(saved) == [2, 10]


def test_a_corrupt_latest_falls_back_to_the_one_before_and_says_so(saved, capsys):
  assert checkpoint.restore_latest(saved / "nowhere", TREE) is None
  assert checkpoint.restore_latest(saved, TREE)[0] == 10
  assert capsys.readouterr().out == ""
  flip_one_byte(array_file(saved / "10"))
  step, tree = checkpoint.restore_latest(saved, TREE)
  np.testing.assert_array_equal(tree["layer"]["kernel"], TREE["layer"]["kernel"])
  assert step == 2 and checkpoint.steps(saved) == [1, 2]
  assert f"{saved / '10'} cannot be read; going back to that of step 2" in capsys.readouterr().out


def test_no_readable_checkpoint_is_refused_and_none_deleted(saved):
  for step in (1, 2, 10):
    array_file(saved / str(step)).unlink()
  with pytest.raises(errors.CheckpointError, match="10 cannot be read .*is missing.*Delete"):
    checkpoint.restore_latest(saved, TREE)
  assert checkpoint.steps(saved) == [1, 2, 10]


def test_another_structure_is_refused(saved):
  other = {"layer": {"kernel": jnp.zeros((5, 5))}, "step": jnp.int32(0)}
  with pytest.raises(errors.CheckpointError, match="cannot be read"):
    checkpoint.restore_latest(saved, other)


def test_full_disk_is_an_os_error_that_names_the_checkpoint(tmp_path, monkeypatch):
  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

  # In the background thread, where the bytes are written.
  monkeypatch.setattr(checkpoint.Writer, "_write_sums", full)
  with pytest.raises(OSError, match="checkpoint .*7 cannot be written") as error:
    checkpoint.save(tmp_path, 7, TREE)
  assert error.value.errno == errno.ENOSPC
  assert checkpoint.steps(tmp_path) == []


def test_a_write_that_takes_too_long_is_one_line_that_names_the_checkpoint(tmp_path, monkeypatch):
  def late(*_):
    raise TimeoutError("Timed out after 86400.1 seconds.")

  monkeypatch.setattr(checkpoint.Writer, "_write_sums", late)
  message = "7 was not whole in time .*86400.*: .*the same command again"
  with pytest.raises(errors.CheckpointError, match=message):
    checkpoint.save(tmp_path, 7, TREE)
  assert checkpoint.steps(tmp_path) == []


def test_a_folder_that_is_gone_is_one_line_and_a_programming_error_is_none(tmp_path, monkeypatch):
  raised = [ValueError("NOT_FOUND: Error reading local file x"), ValueError("bad shape")]

  def fails(*_):
    raise raised.pop(0)

  monkeypatch.setattr(checkpoint.Writer, "_write_sums", fails)
  with pytest.raises(errors.CheckpointError, match="7 cannot be written .NOT_FOUND.*again"):
    checkpoint.save(tmp_path, 7, TREE)
  with pytest.raises(ValueError, match="bad shape"):
    checkpoint.save(tmp_path, 8, TREE)


@pytest.fixture
def first_of_two(saved, monkeypatch):
  """Process 0 of two; what the other one says in each round is in the list."""
  other = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost, "broadcast_list", lambda ask: ask())
  monkeypatch.setattr(multihost, "processes_where", lambda here: [0] * here + [1] * other.pop(0))
  monkeypatch.setattr(checkpoint, "_read", lambda path, like: path.name)
  return other


def test_what_one_of_two_processes_cannot_read_neither_goes_on_from(saved, first_of_two, capsys):
  first_of_two += [True, False]
  assert checkpoint.restore_latest(saved, TREE) == (2, "2")
  assert checkpoint.steps(saved) == [1, 2]
  message = f"checkpoint {saved / '10'} cannot be read by process 1; going back to that of step 2"
  assert message in capsys.readouterr().out


def test_where_no_checkpoint_is_readable_for_all_the_refusal_says_for_whom(saved, first_of_two):
  first_of_two += [True, True, True]
  message = "10 cannot be read by process 1 .see its output.. Delete the folder"
  with pytest.raises(errors.CheckpointError, match=message):
    checkpoint.restore_latest(saved, TREE)
  assert checkpoint.steps(saved) == [1, 2, 10]


def test_a_checkpoint_is_not_called_unreadable_when_another_process_is_gone(saved, monkeypatch):
  def broken(_):
    raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

  monkeypatch.setattr(multihost, "processes_where", broken)
  with pytest.raises(ValueError, match="Gloo"):
    checkpoint.restore_latest(saved, TREE)
  assert checkpoint.steps(saved) == [1, 2, 10]


def test_a_step_goes_on_and_donates_while_its_state_is_written(tmp_path, monkeypatch):
  gate = threading.Event()
  real = checkpoint.Writer._write_sums
  monkeypatch.setattr(checkpoint.Writer, "_write_sums", lambda self: gate.wait(60) and real(self))
  replicated = sharding.replicated(sharding.make_mesh())
  step = jax.jit(lambda x: 2 * x + 1, donate_argnums=0, out_shardings=replicated)
  values = np.arange(1000.0, dtype=np.float32)
  array = jax.device_put(values, replicated)
  writer = checkpoint.Writer(tmp_path)
  writer.save(3, {"x": array})
  for _ in range(3):
    array = step(array)
  array.block_until_ready()
  assert checkpoint.steps(tmp_path) == []  # the three steps ran before the checkpoint was whole
  gate.set()
  writer.close()
  read = checkpoint.restore_params(tmp_path, 3, stage_directory=tmp_path)
  np.testing.assert_array_equal(read["x"], values)


def test_what_a_killed_writer_left_is_removed(tmp_path):
  (tmp_path / "4.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
  checkpoint.save(tmp_path, 5, TREE)
  assert [path.name for path in tmp_path.iterdir()] == ["5"]


def test_small_arrays_of_several_devices_are_written_without_a_program_of_each(tmp_path, caplog):
  mesh = sharding.make_mesh()
  tree = sharding.put_params({"w": np.ones((8, 13), np.float32)}, mesh, 2**20)
  with jax.log_compiles():
    checkpoint.save(tmp_path, 1, tree)
  assert "Compiling" not in caplog.text
  read = checkpoint.restore_params(tmp_path, 1, stage_directory="")
  np.testing.assert_array_equal(read["w"], tree["w"])
