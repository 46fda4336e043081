"""Two real processes on the loopback: the same job as one process, and what a loss of one does."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import quick_xla

from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files
from rndpo_jax.training import checkpoint, metric_writer

ROOT = pathlib.Path(__file__).parent.parent
OPTIONS = (
  "--config=tests/tiny_config.py",
  # Few and small steps: rounding, which differs with the order of the sums, has no time to grow.
  "--config.finetune.num_steps=4", "--config.finetune.eval_every_steps=2",
  "--config.judge.compare=()",
  # A phase before, which mines and trains on its own.
  "--config.phases=({'finetune.terms.labelled.weight': 1.0, 'finetune.num_steps': 2}, {})",
)  # fmt: skip


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(workdir, *arguments, devices, program="launch.run"):
  """One process of the job, on so many simulated devices."""
  flags = f"--xla_force_host_platform_device_count={devices} {quick_xla.FLAGS}"
  return subprocess.Popen(
    [sys.executable, "-m", program, f"--workdir={workdir}", *OPTIONS, *arguments],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": flags},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_two(workdir, *arguments, **options):
  """Two processes of two devices each."""
  address = f"--coordinator_address=127.0.0.1:{free_port()}"
  shared = (address, "--num_processes=2", "--heartbeat_seconds=15", *arguments)
  return [start(workdir, *shared, f"--process_id={i}", devices=2, **options) for i in range(2)]


def finish(processes):
  outputs = [process.communicate(timeout=400)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output
  return outputs


def wait_for(path, processes):
  end = time.monotonic() + 300
  while not path.exists():
    assert time.monotonic() < end and all(p.poll() is None for p in processes)
    time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The job as one process of four devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  finish([start(workdir, devices=4)])
  return workdir


def test_one_killed_stops_the_other_and_both_go_on_to_the_same_results(alone, tmp_path):
  first, second = start_two(tmp_path)
  wait_for(tmp_path / "base" / "state" / "20", [first, second])
  second.send_signal(signal.SIGKILL)
  output, _ = first.communicate(timeout=60)
  assert first.returncode != 0
  # Where a collective fails it finds out who is gone; elsewhere JAX misses heartbeats, and says so.
  assert "see its own output (process 1: " in output or "heartbeats):\n1\n" in output, output
  second.communicate()

  outputs = finish(start_two(tmp_path))
  for index, output in enumerate(outputs):
    assert f"[process {index}] base: going on from step" in output
    assert output.count(f"[process {index}] mine pairs-0000{index}-of-00002") >= 2  # a phase each
  assert "fine-tuned (last)" in outputs[0] and "fine-tuned (last)" not in outputs[1]
  results = [files.read_json(workdir / "results.json") for workdir in (alone, tmp_path)]
  margins = [found["harm"].pop("last") for found in results]  # no counts: they differ by rounding
  wrong = [found["region"]["wrong_mass"] for found in margins]
  assert wrong[0] == pytest.approx(wrong[1], rel=1e-2)
  free = [found.pop("label_free")["checkpoints"] for found in results]
  for ours, theirs in zip(*free, strict=True):
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-2)
  assert results[0] == results[1] and results[0]["pairs"]["region_size"]["p50"] > 0
  # Masks of nothing would be equal whatever went wrong.
  dice = [results[0][name]["test"]["dice"] for name in ("base", "finetuned")]
  assert min(dice) > 0.2 and dice[0] != dice[1]
  # Each batch's gradients are added up in another order, which is all that differs.
  params = [
    checkpoint.restore_params(workdir / "finetune" / "params", 4, stage_directory="")
    for workdir in (alone, tmp_path)
  ]
  for ours, theirs in zip(*map(jax.tree.leaves, params), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
  assert [point["step"] for point in results[0]["curve"]] == [0, 2, 4, 6]
  assert (tmp_path / "finetune/metrics.jsonl").read_text().count('"val"') == 2
  assert files.read_json(tmp_path / "config.json")["num_processes"] == 2


def test_two_processes_keep_a_finished_shard_and_mine_the_same_bits(alone, tmp_path):
  shutil.copytree(alone, tmp_path / "run")
  workdir = tmp_path / "run"
  kept, redone = (shards.shard_path(workdir / "pairs", shard, 2) for shard in range(2))
  for path in (redone, shards.summary_path(redone), workdir / "pairs" / "manifest.json"):
    path.unlink()
  untouched = os.stat(kept).st_mtime_ns
  finish(start_two(workdir, "--stages=mine"))
  assert os.stat(kept).st_mtime_ns == untouched
  for name in (kept.name, redone.name, "manifest.json"):
    assert (workdir / "pairs" / name).read_bytes() == (alone / "pairs" / name).read_bytes(), name


def test_two_processes_share_a_sweep_whose_members_are_runs(alone, tmp_path):
  shutil.copytree(alone, tmp_path / "run")
  workdir = tmp_path / "run"
  outputs = finish(start_two(workdir, "--seeds=1,0", "--betas=10,30", program="launch.sweep"))
  assert "2 seeds x 2 betas x 1 learning rates, by map on 4 of 4 devices" in outputs[0]
  assert "<- best" in outputs[0] and "<- best" not in outputs[1]
  members = files.read_json(workdir / "sweep" / "sweep.json")["members"]
  assert [(member["seed"], member["beta"]) for member in members] == [
    (1, 10.0), (1, 30.0), (0, 10.0), (0, 30.0)
  ]  # fmt: skip
  # The job's own seed and beta: process 1 had them.
  rows = [metric_writer.read_rows(alone / "finetune", kind) for kind in ("train", "val")]
  (own,) = (workdir / "sweep").glob("seed-0_beta-10_*")
  found = [metric_writer.read_rows(own, kind) for kind in ("train", "val")]
  assert set(found[0][0]) == set(rows[0][0])
  losses = [[row["loss"] for row in steps] for steps, _ in (found, rows)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert len(set(losses[0])) == len(losses[0]) == 4
  dice = [[row["val_dice"] for row in values] for _, values in (found, rows)]
  np.testing.assert_allclose(*dice, atol=1e-3)
  assert members[2]["last"] == dice[0][-1]
  folders = [path for path in (workdir / "sweep").glob("seed-*") if path != own]
  others = [[row["loss"] for row in metric_writer.read_rows(path, "train")] for path in folders]
  assert len(others) == 3 and losses[0] not in others


def test_corrupt_shard_found_by_one_process_ends_both(alone, tmp_path):
  shutil.copytree(alone, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "finetune")
  shard = shards.shard_path(tmp_path / "run" / "pairs", 1, 2)
  shard.write_bytes(shard.read_bytes()[:-1])
  processes = start_two(tmp_path / "run", "--stages=finetune")
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1]
  assert f"error: process 1: {shard} is corrupt" in outputs[1]
  assert "error: process 0: another process of this run has stopped" in outputs[0]


def test_processes_with_different_stages_are_an_error(tmp_path):
  address = f"--coordinator_address=127.0.0.1:{free_port()}"
  processes = [
    start(
      tmp_path / "run", address, "--num_processes=2", f"--process_id={index}",
      f"--stages={stages}", devices=1,
    )
    for index, stages in enumerate(("prepare", "prepare,base"))
  ]  # fmt: skip
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1]
  assert all("--stages: process 1 was started with other stages" in x for x in outputs), outputs
  assert not (tmp_path / "run").exists()


def test_processes_that_do_not_meet_end_in_one_line(tmp_path):
  shared = ("--num_processes=2", "--connect_seconds=3")
  processes = [
    start(
      tmp_path / "run",
      f"--coordinator_address=127.0.0.1:{free_port()}",
      f"--process_id={index}",
      *shared,
      devices=1,
    )
    for index in range(2)  # each waits for the other at another port
  ]
  for index, process in enumerate(processes):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.startswith(f"error: process {index}: the 2 processes have not met at 127.0.0.1:")
    assert output.count("\n") == 1, output
  assert not (tmp_path / "run").exists()


def test_different_configs_are_an_error_that_names_the_keys(tmp_path):
  address = f"--coordinator_address=127.0.0.1:{free_port()}"
  shared = (address, "--num_processes=2", "--stages=prepare")
  processes = [
    start(tmp_path, *shared, f"--process_id={i}", f"--config.seed={i}", devices=1) for i in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [1, 1]
  assert (
    "error: process 1: --config: process 1 differs from process 0: config.seed: was 0, is 1"
    in outputs[1]
  )
  assert "error: process 0: another process of this run has stopped" in outputs[0]


# Process 1 cannot read the steps named in argv[3], and says so in the midst of Orbax's reading.
RESTORES = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from rndpo_jax import errors
from rndpo_jax.runtime import multihost, processes
from rndpo_jax.training import checkpoint
address, index, unreadable, folder = sys.argv[1:]
index = int(index)
processes.initialize(address, 2, index, detect=False, connect_seconds=60, heartbeat_seconds=15)
real = ocp.StandardCheckpointer.restore
def restore(self, path, target):
  if index and path.name in unreadable.split(","):
    raise OSError(f"bad block in {path.name}")
  return real(self, path, target)
ocp.StandardCheckpointer.restore = restore
sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
values = np.arange(8.0, dtype=np.float32)
tree = {"x": jax.make_array_from_callback((8,), sharding, lambda i: values[i]), "n": values}
for step in (1, 2, 3):
  checkpoint.save(folder, step, tree)
try:
  step, read = checkpoint.restore_latest(folder, tree)
  for shard in read["x"].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
  assert not read["x"].is_fully_addressable and (read["n"] == values).all()
  multihost.barrier("deleted")
  print("step", step, checkpoint.steps(folder))
except errors.CheckpointError as error:
  print(error, checkpoint.steps(folder))
"""


@pytest.mark.parametrize("unreadable", ["2,3", "1,2,3"])
def test_checkpoint_that_one_process_cannot_read_is_used_by_neither(unreadable, tmp_path):
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  address = f"127.0.0.1:{free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", RESTORES, address, str(index), unreadable, str(tmp_path)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for index, output in enumerate(finish(processes)):
    own = "bad block in 3" if index else "see its output"
    assert ("bad block in 2" in output) == bool(index)
    if unreadable == "2,3":
      assert "3 cannot be read by process 1; going back to that of step 1\n" in output
      assert output.endswith("step 1 [1]\n")
    else:
      assert f"3 cannot be read by process 1 ({own}). Delete the folder" in output
      assert output.endswith("[1, 2, 3]\n")
