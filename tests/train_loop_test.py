"""training: resume equals uninterrupted, devices do not matter, non-finite losses stop a run."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rndpo_jax import errors, provenance
from rndpo_jax.runtime import preemption, sharding
from rndpo_jax.training import checkpoint, checkpoint_manager, metric_writer, train_loop, train_step

OPTIMIZER = optax.adam(0.1)


def loss_fn(params, batch, inputs):
  noise = jax.random.normal(inputs.key, ())
  error = batch @ params["w"] - 1.0 + 0.01 * noise
  return jnp.mean(error**2), {"noise": noise}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh()


@pytest.fixture(scope="module")
def step(mesh):
  return train_step.make_train_step(loss_fn, OPTIMIZER, mesh)


def start(mesh):
  return train_step.make_state({"w": jnp.ones(3)}, OPTIMIZER, mesh)


def batch_at(step):
  return np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)


def run(
  step, mesh, directory, *, num_steps, stop=None, data=batch_at, state=None, fingerprints=(),
  **options,
):  # fmt: skip
  def batches(start_step):
    for number in itertools.count(start_step):
      if number == stop:
        raise KeyboardInterrupt
      yield sharding.put_batch(data(number), mesh)

  return train_loop.fit(
    step,
    start(mesh) if state is None else state,
    batches,
    train_loop.Schedule(num_steps, log_every_steps=2, eval_every_steps=3),
    key=jax.random.key(5),
    checkpoints=checkpoint_manager.CheckpointManager(
      directory, description="test", fingerprints=dict(fingerprints), **options
    ),
    metrics=metric_writer.MetricWriter(directory),
    validate=lambda params: {"val_dice": float(params["w"][0])},
  )


def test_resume_equals_uninterrupted(step, mesh, tmp_path):
  whole = run(step, mesh, tmp_path / "whole", num_steps=10)
  with pytest.raises(KeyboardInterrupt):
    run(step, mesh, tmp_path / "cut", num_steps=10, stop=8)
  assert checkpoint.steps(tmp_path / "cut" / "params") == [3, 6]
  # Half a line, as a kill leaves it.
  with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "ki')
  resumed = run(step, mesh, tmp_path / "cut", num_steps=10)
  np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
  assert int(resumed.step) == 10
  for name in ("whole", "cut"):
    assert checkpoint.steps(tmp_path / name / "params") == [3, 6, 9, 10]
    assert checkpoint.steps(tmp_path / name / "state") == [9, 10]
  lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
  assert lines[0] == lines[1]
  rows = [json.loads(line) for line in lines[0].splitlines()]
  assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 10]
  assert [row["step"] for row in rows if row["kind"] == "val"] == [3, 6, 9, 10]


def test_params_lost_by_a_kill_are_written_again_from_their_state(step, mesh, tmp_path):
  whole = run(step, mesh, tmp_path, num_steps=6)
  shutil.rmtree(tmp_path / "params" / "6")
  run(step, mesh, tmp_path, num_steps=6)
  kept = checkpoint.restore_params(tmp_path / "params", 6, stage_directory=tmp_path)
  np.testing.assert_array_equal(kept["w"], whole.params["w"])


def test_states_by_the_clock_serve_to_go_on_and_change_nothing(step, mesh, tmp_path):
  whole = run(step, mesh, tmp_path / "whole", num_steps=10)
  often = dict(num_steps=10, minutes=1e-9, keep_checkpoints=3)
  with pytest.raises(KeyboardInterrupt):
    run(step, mesh, tmp_path / "cut", stop=8, **often)
  assert checkpoint.steps(tmp_path / "cut" / "state") == [4, 6, 8]
  assert checkpoint.steps(tmp_path / "cut" / "params") == [3, 6]
  resumed = run(step, mesh, tmp_path / "cut", **often)
  np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
  for name in ("whole", "cut"):
    assert checkpoint.steps(tmp_path / name / "params") == [3, 6, 9, 10]
  rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
  assert rows[0] == rows[1]


def test_a_corrupt_latest_state_costs_steps_and_not_the_result(step, mesh, tmp_path, capsys):
  whole = run(step, mesh, tmp_path / "whole", num_steps=10)
  with pytest.raises(KeyboardInterrupt):
    run(step, mesh, tmp_path / "cut", num_steps=10, stop=8)
  (tmp_path / "cut" / "state" / "6" / "_METADATA").write_text("{")
  resumed = run(step, mesh, tmp_path / "cut", num_steps=10)
  assert "going back to that of step 3" in capsys.readouterr().out
  np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
  rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
  assert rows[0] == rows[1]


def test_a_signal_saves_the_step_and_the_run_goes_on_from_there(step, mesh, tmp_path, monkeypatch):
  def stop_at(number):
    monkeypatch.setattr(preemption, "reached", lambda step: step == number)

  whole = run(step, mesh, tmp_path / "whole", num_steps=10)
  for number in (5, 6, 10):
    stop_at(number)
    with pytest.raises(preemption.Preempted, match=f"test: saved at step {number}"):
      run(step, mesh, tmp_path / "cut", num_steps=10)
    assert checkpoint.steps(tmp_path / "cut" / "state")[-1] == number
  stop_at(None)
  resumed = run(step, mesh, tmp_path / "cut", num_steps=10)
  np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
  for name in ("whole", "cut"):
    assert checkpoint.steps(tmp_path / name / "params") == [3, 6, 9, 10]
  rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
  assert rows[0] == rows[1]


def test_best_and_latest_parameters_are_kept(step, mesh, tmp_path):
  # By the clock there is a state before the first validation, too.
  run(step, mesh, tmp_path, num_steps=12, keep_params="best", minutes=1e-9)
  rows = metric_writer.read_rows(tmp_path, "val")
  best = max(rows, key=lambda row: row["val_dice"])["step"]
  assert checkpoint.steps(tmp_path / "params") == sorted({best, 12}) != [12]
  assert checkpoint.steps(tmp_path / "state") == [10, 12]


def test_the_first_of_equals_is_best():
  rows = [{"step": n, "val_dice": dice} for n, dice in ((3, 0.5), (6, 0.7), (9, 0.7))]
  assert checkpoint_manager.best_row(rows)["step"] == 6


def test_another_reference_is_refused(step, mesh, tmp_path):
  first, second = ({"data": provenance.fingerprint({"w": np.full(3, x)})} for x in (1.0, 2.0))
  run(step, mesh, tmp_path, num_steps=6, fingerprints=first)
  run(step, mesh, tmp_path, num_steps=6, fingerprints=first)
  there, here = first["data"][:12], second["data"][:12]
  with pytest.raises(errors.ProvenanceError, match=f"6 was not made .*{there}.*{here}.*delete"):
    run(step, mesh, tmp_path, num_steps=9, fingerprints=second)
  assert checkpoint.steps(tmp_path / "state") == [3, 6]


def test_keys_differ_from_step_to_step(step, mesh, tmp_path):
  run(step, mesh, tmp_path, num_steps=6)
  noise = [row["noise"] for row in metric_writer.read_rows(tmp_path, "train")]
  assert len(set(noise)) == 3


def test_one_device_equals_eight(step, mesh):
  single = sharding.make_mesh(jax.devices()[:1])
  one_step = train_step.make_train_step(loss_fn, OPTIMIZER, single)
  states = []
  for used_step, used_mesh in ((step, mesh), (one_step, single)):
    state = start(used_mesh)
    for number in range(3):
      batch = sharding.put_batch(batch_at(number), used_mesh)
      state, _ = used_step(state, batch, jax.random.key(5))
    states.append(state)
  np.testing.assert_allclose(states[0].params["w"], states[1].params["w"], rtol=1e-6)


def test_average_of_parameters_is_what_is_kept_and_validated(step, mesh, tmp_path):
  plain = run(step, mesh, tmp_path / "plain", num_steps=4)
  averaging = train_step.make_train_step(loss_fn, OPTIMIZER, mesh, ema_decay=0.75)

  def begin():
    return train_step.make_state({"w": jnp.ones(3)}, OPTIMIZER, mesh, with_ema=True)

  state = begin()
  expected = np.ones(3)
  for number in range(4):
    state, _ = averaging(state, sharding.put_batch(batch_at(number), mesh), jax.random.key(5))
    expected = 0.75 * expected + 0.25 * np.asarray(state.params["w"])
  np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
  kept = run(averaging, mesh, tmp_path / "ema", num_steps=4, state=begin())
  np.testing.assert_array_equal(kept.params["w"], plain.params["w"])
  saved = checkpoint.restore_params(tmp_path / "ema" / "params", 4, stage_directory=tmp_path)
  np.testing.assert_array_equal(saved["w"], state.ema["w"])
  last = metric_writer.read_rows(tmp_path / "ema", "val")[-1]
  assert last["val_dice"] == float(state.ema["w"][0]) != float(state.params["w"][0])


def weighted_loss(params, batch, inputs):
  error = (batch["x"] @ params["w"] - inputs.reference["w"][0]) ** 2
  total = jnp.sum(batch["weight"])
  loss = jnp.sum(error * batch["weight"]) / jnp.maximum(total, 1e-12)
  known = jnp.where(total > 0, 3.0, jnp.nan)  # as the quantiles of no pair are
  return loss, {"num_rows": total, "mean": loss, "known": known, "weight": total}


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_step_of_the_whole_batch(mesh, parts):
  batch = {
    "x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32),
    # The parts weigh differently: rows 0, 4, 8, ... of each four count, and few of the others.
    "weight": (np.arange(32) % 4 == 0).astype(np.float32) + (np.arange(32) == 7),
  }
  batch = sharding.put_batch(batch, mesh)
  reference = {"w": jnp.full(3, 2.0)}
  results = []
  for count in (1, parts):
    made = train_step.make_train_step(weighted_loss, optax.sgd(0.1), mesh, count)
    state = train_step.make_state({"w": jnp.ones(3)}, optax.sgd(0.1), mesh)
    results.append(made(state, batch, jax.random.key(0), reference))
  (whole, whole_aux), (state, aux) = results
  assert (np.asarray(whole.params["w"]) != 1).all()
  np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-6)
  assert set(aux) == set(whole_aux) == {"num_rows", "mean", "known", "loss", "grad_norm"}
  assert float(aux["num_rows"]) == 9
  for name in whole_aux:
    np.testing.assert_allclose(aux[name], whole_aux[name], rtol=1e-6)


def test_a_batch_without_any_weight_moves_nothing(mesh):
  batch = sharding.put_batch({"x": np.ones((16, 3)), "weight": np.zeros(16)}, mesh)
  made = train_step.make_train_step(weighted_loss, optax.sgd(0.1), mesh, 2)
  state = train_step.make_state({"w": jnp.ones(3)}, optax.sgd(0.1), mesh)
  state, aux = made(state, batch, jax.random.key(0), {"w": jnp.zeros(3)})
  np.testing.assert_array_equal(state.params["w"], np.ones(3))
  assert float(aux["loss"]) == 0


def test_state_is_donated_and_the_parameters_it_was_made_from_are_not(step, mesh):
  params = {"w": jnp.ones(3)}
  state = train_step.make_state(params, OPTIMIZER, mesh)
  step(state, sharding.put_batch(batch_at(0), mesh), jax.random.key(5))
  assert state.params["w"].is_deleted()
  np.testing.assert_array_equal(params["w"], np.ones(3))


def test_stops_at_the_first_loss_that_is_not_finite(step, mesh, tmp_path):
  def data(number):
    return batch_at(number) * (np.nan if number >= 4 else 1.0)

  with pytest.raises(errors.TrainingError, match="loss nan.* at step 5.*step 3 in"):
    run(step, mesh, tmp_path, num_steps=10, data=data)
  assert checkpoint.steps(tmp_path / "params") == [3]
  kept = checkpoint.restore_params(tmp_path / "params", 3, stage_directory=tmp_path)
  assert np.isfinite(kept["w"]).all()


def test_batch_that_devices_cannot_share_is_refused():
  with pytest.raises(ValueError, match="config.base.batch_size: found 12.*use 8 or 16"):
    sharding.check_batch_size("config.base.batch_size", 12, 8)
  sharding.check_batch_size("config.base.batch_size", 16, 8)
