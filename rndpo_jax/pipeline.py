"""The main job: runs the stages in order in a work directory, skipping what is done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
from etils import epath

from rndpo_jax import checks, files, judges, parallel, preemption, processes, progress
from rndpo_jax import config as config_lib
from rndpo_jax.stages import base, evaluate, finetune, mine, prepare, report

RUNNERS = {
  "prepare": prepare.run,
  "base": base.run,
  "mine": mine.run,
  "finetune": finetune.run,
  "evaluate": evaluate.run,
  "report": report.run,
}
# Stages without collectives: process 0 runs them while the others wait.
ALONE = ("prepare", "report")
# The file that a stage writes last, and so the sign that it is done.
DONE = {
  "prepare": "data/records.json",
  "base": "base/selected.json",
  "mine": "pairs/manifest.json",
  "finetune": "finetune/done.json",
  "evaluate": "results.json",
  "report": "report.html",
}
PACKAGES = (
  "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "chex",
)  # fmt: skip


def run(config: ml_collections.ConfigDict, workdir: os.PathLike, stages=config_lib.STAGES) -> None:
  """Runs `stages` in their order; a stage that is done is skipped.

  Args:
    config: from a file in `configs/`.
    workdir: made where it is missing; belongs to this config alone.
    stages: names from `config.STAGES`.

  Raises:
    config.ConfigError: on a config that cannot work, a stage that is unknown or lacks the stage
      before it, a workdir that cannot be written or that holds another config.
    preemption.Preempted: after a signal, what is finished being kept.
    The stages' own errors.
  """
  checks.validate(config)
  unknown = [name for name in stages if name not in config_lib.STAGES]
  if unknown:
    raise config_lib.ConfigError(
      f"--stages: unknown stage {unknown[0]!r}; known: {', '.join(config_lib.STAGES)}"
    )
  check_here(config)
  workdir = epath.Path(workdir)
  if processes.is_first():
    claim(config, workdir)
  processes.barrier("claim")
  if not processes.is_first():
    check_shared(config, workdir)
  for name in config_lib.STAGES:
    if name not in stages or (name == "prepare" and config.base.workdir):
      continue
    # A file can appear between the looks of two processes: process 0 looks for all.
    if processes.agree(is_done(name, workdir)):
      progress.say(f"[{name}] done before")
      continue
    check_before(config, name, workdir)
    start = time.monotonic()
    progress.say(f"[{name}]")
    with preemption.together(f"stage {name!r} is done"):
      if name not in ALONE or processes.is_first():
        RUNNERS[name](config, workdir)
    progress.say(f"[{name}] {time.monotonic() - start:.1f} s")


def is_done(name: str, workdir: epath.Path) -> bool:
  """Whether a stage's last file is there."""
  return prepare.is_done(workdir) if name == "prepare" else (workdir / DONE[name]).exists()


def check_here(config: ml_collections.ConfigDict) -> None:
  """Refuses what these devices and this installation cannot do, before any training.

  Raises:
    config.ConfigError: a mesh that the devices cannot make; a batch that they cannot share; a
      judge of the user's own that cannot be imported.
  """
  names = {config.judge.name, *config.judge.compare}
  sizes = {"base.batch_size": config.base.batch_size}
  sizes["finetune.batch_size"] = config.finetune.batch_size
  if "learned" in names:
    sizes["judge.learned.batch_size"] = config.judge.learned.batch_size
  devices, space = jax.device_count(), config.mesh.space
  parallel.check_mesh(devices, config.mesh.fsdp, space, jax.local_device_count())
  for key, size in sizes.items():
    parallel.check_batch_size(f"config.{key}", size, devices, space)
  for name in ("base", "finetune"):
    parts = config[name].accumulate_steps
    if config[name].batch_size % (parts * devices // space):
      raise config_lib.ConfigError(
        f"config.{name}.accumulate_steps: found {parts}, but batch_size="
        f"{config[name].batch_size} on {parallel.sharers(devices, space)} is no multiple of "
        f"{parts * devices // space}"
      )
  for name in names:
    if ":" in name:
      try:
        judges.build(name, num_classes=2, border=0, flip_rate=0.0, noise_level=0.0)
      except judges.JudgeError as error:
        raise config_lib.ConfigError(f"config.judge: {error}") from error


def claim(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Writes `config.json`, or checks that the one there is of the same config.

  The section `mesh` may differ, and that of today is written: any devices go on with a state.

  Raises:
    config.ConfigError: naming every key that differs, or the folder that cannot be written.
  """
  resolved = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  # A run that was refused before its first stage ended leaves nothing to protect.
  if path.exists() and any((workdir / name).exists() for name in DONE.values()):
    content = files.read_json(path)
    there = {**content["config"], "mesh": resolved["mesh"]}
    changes = _differences(there, resolved)
    if changes:
      raise config_lib.ConfigError(
        f"{workdir} was made with another config; differing keys: {'; '.join(changes)}. Use a new "
        "--workdir (with --config.base.workdir to keep data and base), or the config of before"
      )
    if content["config"] != there:
      files.write_json(path, {**content, "config": there})
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"config": resolved, **environment()})
  except OSError as error:
    if files.is_full_disk(error):
      raise
    raise config_lib.ConfigError(
      f"--workdir: {workdir} cannot be written ({error.strerror}); name a folder that can"
    ) from error


def check_shared(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Refuses a process that does not share process 0's work directory and config.

  Raises:
    config.ConfigError: naming the folder, or every key that differs.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise config_lib.ConfigError(
      f"--workdir: process {jax.process_index()} does not see {path}, which process 0 wrote; "
      "several processes need one folder that all of them see"
    )
  here = json.loads(config.to_json_best_effort())
  changes = _differences(files.read_json(path)["config"], here)
  if changes:
    raise config_lib.ConfigError(
      f"--config: process {jax.process_index()} differs from process 0: {'; '.join(changes)}. "
      "Start every process with the same command"
    )


def environment() -> dict[str, Any]:
  """Command, versions, devices and git revision, for `config.json`."""
  return {
    "command": shlex.join(["python", "-m", "launch.run", *sys.argv[1:]]),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    "device_kind": jax.devices()[0].device_kind,
    "num_devices": jax.device_count(),
    "num_processes": jax.process_count(),
    "git_revision": _git_revision(),
  }


def check_before(config, name: str, workdir: epath.Path) -> None:
  """Refuses a stage whose predecessor is not done.

  Raises:
    config.ConfigError: naming the stage to run first.
  """
  place = config_lib.STAGES.index(name)
  before = config_lib.STAGES[place - 1] if place else None
  if before == "prepare" and config.base.workdir:
    path = epath.Path(config.base.workdir) / DONE["base"]
    if not path.exists():
      raise config_lib.ConfigError(
        f"config.base.workdir: {path} is missing; run the stages prepare and base there first"
      )
    _check_same_base(config)
    return
  if before and not (workdir / DONE[before]).exists():
    raise config_lib.ConfigError(
      f"--stages: {name!r} needs {workdir / DONE[before]}, which is missing; run the stage "
      f"{before!r} first"
    )


def summary(workdir: os.PathLike) -> str:
  """The result table that a run ends with, from `results.json` and the mining manifest."""
  results = files.read_json(epath.Path(workdir) / "results.json")
  lines = [f"{'':24}{'val Dice':>10}{'test Dice':>11}"]
  rows = (("base", "base"), ("fine-tuned (last)", "finetuned"), ("selected on val", "selected"))
  for label, key in rows:
    scores = results[key]
    lines.append(f"{label:24}{scores['val']['dice']:10.4f}{scores['test']['dice']:11.4f}")
  for name, judge in results["judges"].items():
    accuracy = judge["pair_accuracy"]
    shown = "unknown" if accuracy is None else f"{accuracy:.3f}"
    used = "  <- used" if name == results["judge"] else ""
    lines.append(f"judge {name:18}{shown:>10} of pairs right on {judge['split']}{used}")
  pairs = results["pairs"]
  size = files.read_json(epath.Path(workdir) / "pairs" / "manifest.json")["bytes_per_pair"]
  lines.append(
    f"{pairs['count']} pairs of {size:.0f} bytes, {pairs['dropped_identical']} dropped as "
    f"identical, median region size {pairs['region_size']['p50']:.0f} pixels"
  )
  return "\n".join(lines)


def _check_same_base(config) -> None:
  """Refuses data, model or base options other than those that `config.base.workdir` has."""
  there = files.read_json(epath.Path(config.base.workdir) / "config.json")["config"]
  here = json.loads(config.to_json_best_effort())
  # An option that is newer than the other run had its default of today there.
  defaults = json.loads(config_lib.base_config().to_json_best_effort())
  there = {name: {**defaults.get(name, {}), **there[name]} for name in ("data", "model", "base")}
  for content in (there, here):
    for section, name in (
      ("data", "num_workers"), ("data", "prefetch"), ("base", "workdir"), ("base", "num_members"),
      ("model", "remat"), ("model", "lanes"), ("base", "keep_checkpoints"),
      ("base", "checkpoint_minutes"),
    ):  # fmt: skip
      content[section].pop(name, None)
  changes = [
    change
    for section in ("data", "model", "base")
    for change in _differences(there[section], here[section], f"config.{section}")
  ]
  if changes:
    raise config_lib.ConfigError(
      f"config.base.workdir: {config.base.workdir} was made with other options: "
      f"{'; '.join(changes)}. Give the same, or leave config.base.workdir empty to train anew"
    )


def _git_revision() -> str | None:
  """Revision of the checkout that the package runs from; None where it is installed elsewhere."""
  try:
    done = subprocess.run(
      ["git", "rev-parse", "HEAD"],
      cwd=os.path.dirname(os.path.abspath(__file__)),
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return done.stdout.strip()


def _differences(there: Any, here: Any, prefix: str = "config") -> list[str]:
  """Every key whose value differs, as 'config.a.b: was 1, is 2'."""
  if isinstance(there, dict) and isinstance(here, dict):
    keys = sorted(there.keys() | here.keys())
    return [
      change
      for key in keys
      for change in _differences(there.get(key), here.get(key), f"{prefix}.{key}")
    ]
  return [] if there == here else [f"{prefix}: was {there!r}, is {here!r}"]
