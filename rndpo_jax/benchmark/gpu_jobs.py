"""Parts of the GPU report that run programs of their own: whole jobs, and equal runs.

  python -m rndpo_jax.benchmark.gpu_jobs '{"shape": [16, 256, 256], ...}'

trains some steps and prints one line of JSON: the fingerprint of the parameters and the seconds of
a step. The part `determinism` starts it, since XLA reads its flags when a process starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from etils import epath

from rndpo_jax.benchmark import gpu_parts, gpu_report
from rndpo_jax.runtime import files

FLAG = "--xla_gpu_deterministic_ops=true"
_STAGE = re.compile(r"\[(\w+)\] ([\d.]+) s$")
# `launch.run`, saying of every program how long it took to compile.
_RUN = """
import runpy, sys
from launch import xla_flags
xla_flags.tune()  # before anything imports jax
import jax.monitoring
def say(name, seconds, **_):
  if name == "/jax/core/compile/backend_compile_duration":
    print(f"compiled in {seconds} s", flush=True)
jax.monitoring.register_event_duration_secs_listener(say)
sys.argv[0] = "launch.run"
runpy.run_module("launch.run", run_name="__main__", alter_sys=True)
"""
_COMPILED = re.compile(r"compiled in ([\d.e-]+) s$")


def determinism(report: gpu_parts.Report, shape, width, depth, dtype, steps: int) -> None:
  """Two equal runs without XLA's flag and two with it: equal bits, and the time of a step."""
  setting = f"{dtype}{[*shape, 1]}, width {width}, {steps} steps"
  given = json.dumps(
    {"shape": shape, "width": width, "depth": depth, "dtype": dtype, "steps": steps}
  )
  seconds = {}
  for flag in (FLAG, ""):
    runs = [_train_apart(given, flag) for _ in range(2)]
    equal = int(len({run["fingerprint"] for run in runs}) == 1)
    seconds[flag] = min(run["seconds"] for run in runs)
    how = f"with {flag}" if flag else "without the flag"
    gpu_parts.figure(report, f"equal bits {how}", setting, equal, note="1 yes, 0 no")
    gpu_parts.figure(report, f"step {how}", setting, 1e3 * seconds[flag], "ms")
  cost = seconds[FLAG] / seconds[""]
  gpu_parts.figure(report, "time with the flag over without", setting, cost, "x")


def _train_apart(given: str, flag: str) -> dict[str, Any]:
  """`train` in a process of its own."""
  environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
  command = [sys.executable, "-m", "rndpo_jax.benchmark.gpu_jobs", given]
  done = subprocess.run(
    command, env=environment, cwd=gpu_report.ROOT, stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def train(shape, width, depth, dtype, steps: int) -> dict[str, Any]:
  """RN-DPO steps from random parameters: SHA-256 of the last parameters, seconds of a step."""
  import jax
  import numpy as np

  from rndpo_jax.benchmark import network, options, step, timing
  from rndpo_jax.runtime import sharding
  from rndpo_jax.stages import finetune
  from rndpo_jax.training import train_step

  given = {"shape": tuple(shape), "width": width, "depth": depth, "dtype": dtype, "pairs": 4}
  chosen = options.resolve("step", given)["step"]
  mesh = sharding.make_mesh()
  segmenter, params = network.make(chosen)
  optimizer = finetune.optimizer(network.make_config(chosen).finetune)
  batches = step.make_batches(jax.random.key(1), chosen, chosen.pairs, mesh)
  state = train_step.make_state(params, optimizer, mesh)
  loss_fn = step.preference_loss_fn(segmenter, chosen, "cached")
  key = jax.random.key(2)
  compiled = timing.compile_ahead(
    train_step.make_train_step(loss_fn, optimizer, mesh), state, batches[0], key, None
  )

  def run(turn):
    nonlocal state  # its buffers are donated: the next step takes what this one leaves
    state, metrics = compiled.call(state, batches[turn % len(batches)], key, None)
    return metrics

  for turn in range(steps):
    run(turn)
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(state.params)):
    total.update(np.ascontiguousarray(leaf).tobytes())
  variant = timing.compiled_variant("step", timing.Work(1, 1, 1, 1), compiled, run)
  seconds, _ = timing.sample([variant], repeats=options.MIN_REPEATS)
  return {"fingerprint": total.hexdigest(), "seconds": float(np.median(seconds))}


def smoke(report: gpu_parts.Report, platform: str, flags: tuple[str, ...] = ()) -> None:
  """The quick start on the device, or on the platform named."""
  _job(report, platform or "this device", ["--config=configs/quickstart.py", *flags], platform)


def job(report: gpu_parts.Report, size: int, width: int, flags: tuple[str, ...] = ()) -> None:
  """The whole job on PH2, or on a phantom of as many images if its folder is not given."""
  flags = [f"--config.data.size=({size},{size})", f"--config.model.width={width}", *flags]
  if report.ph2:
    flags = [
      "--config=configs/ph2.py:rn_dpo",
      f"--config.data.root={os.path.abspath(report.ph2)}",
      *flags,
    ]
    name = "PH2"
  else:
    flags = [
      "--config=configs/quickstart.py:rn_dpo", "--config.data.num_labelled=10",
      "--config.data.num_val=30", "--config.data.num_test=50",
      "--config.data.phantom.num_cases=200",
      f"--config.data.phantom.size=({size},{3 * size // 4})", *flags,
    ]  # fmt: skip
    name = "phantom in place of PH2 (no --ph2)"
  _job(report, f"{name}, {size} x {size}, width {width}", flags, "")


def _job(report: gpu_parts.Report, setting: str, flags: list[str], platform: str) -> None:
  """Runs `launch.run`: seconds of the stages, of compiling, and images a second."""
  environment = dict(os.environ)
  environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)  # as a user runs it
  if platform:
    environment["JAX_PLATFORMS"] = platform
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-c", _RUN, f"--workdir={workdir}", *flags]
    process = subprocess.Popen(
      command, env=environment, cwd=gpu_report.ROOT, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stages, compiling = read_stages(_echo(process.stdout))
    if process.wait():
      raise SystemExit(f"launch.run ended with code {process.returncode}")
    images = images_of_stages(workdir)
  total = sum(stages.values())
  gpu_parts.figure(report, "wall time of all stages", setting, total, "s")
  for name, seconds in stages.items():
    note = f"{seconds / total:.0%} of the whole; {compiling.get(name, 0.0):.1f} s of it compiling"
    gpu_parts.figure(report, f"stage {name}", setting, seconds, "s", note)
    if name in images and seconds > 0:  # printed to a tenth: a tiny stage takes 0.0
      rate = images[name] / seconds
      gpu_parts.figure(report, f"images a second, {name}", setting, rate, "images/s",
                       f"{images[name]} images, compiling included")  # fmt: skip


def _echo(lines):
  """The lines, printed too but for those on compiling."""
  for line in lines:
    if not _COMPILED.match(line):
      print(line, end="", flush=True)
    yield line.rstrip("\n")


def read_stages(lines) -> tuple[dict[str, float], dict[str, float]]:
  """Stage -> its seconds, and stage -> seconds of compiling in it, from what a run prints."""
  stages, compiling, since = {}, {}, 0.0
  for line in lines:
    if found := _COMPILED.match(line):
      since += float(found[1])
    elif found := _STAGE.match(line):
      stages[found[1]], compiling[found[1]] = float(found[2]), since
      since = 0.0
  return stages, compiling


def images_of_stages(workdir: os.PathLike) -> dict[str, int]:
  """Stage -> images that it went through; in training an image counts at every step.

  Of several phases the stage finetune is the last one; mine, which trains the others, is left out.
  """
  workdir = epath.Path(workdir)
  config = files.read_json(workdir / "config.json")["config"]
  splits = files.read_json(workdir / "splits.json")
  count = {name: len(splits[name]) for name in ("labelled", "unlabelled", "val", "test")}
  checkpoints = len(files.read_json(workdir / "results.json")["curve"])
  last = (config["phases"] or [{}])[-1]
  steps, size = (
    last.get(f"finetune.{name}", config["finetune"][name]) for name in ("num_steps", "batch_size")
  )
  return {
    "prepare": sum(count.values()),
    "base": config["base"]["num_steps"] * config["base"]["batch_size"],
    **({} if len(config["phases"]) > 1 else {"mine": count["unlabelled"]}),
    "finetune": steps * size,
    "evaluate": checkpoints * (count["val"] + count["test"]),
  }


if __name__ == "__main__":
  print(json.dumps(train(**json.loads(sys.argv[1]))))
