"""What a work directory is of: `config.json`, and whether a config may go on with it."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import fsspec
import jax
import ml_collections
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.runtime import files, progress

PACKAGES = (
  "jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "chex",
)  # fmt: skip
# What cannot change results, or by rounding alone: a run goes on with another value. `data.root`
# is among them once the data are prepared.
OPERATIONAL = (
  "mesh", "data.num_workers", "data.prefetch", "data.root", "base.keep_checkpoints",
  "base.checkpoint_minutes", "judge.gate", "finetune.keep_checkpoints",
  "finetune.checkpoint_minutes",
)  # fmt: skip
# Also what another job may have otherwise that takes its data and base from a work directory.
_OF_THE_OTHER_JOB = (
  "base.workdir", "base.num_members", "model.remat", "model.lanes",
  "data.proposals", "data.preferences",
)  # fmt: skip


def check_path(key: str, path: os.PathLike | str) -> None:
  """Checks that a folder or file is on this host or in a bucket that can be read from here.

  Raises:
    errors.ConfigError: naming `key`.
  """
  scheme, is_uri, _ = os.fspath(path).partition("://")
  if not is_uri:
    return
  if scheme != "gs":
    raise errors.ConfigError(
      f"{key}: found {os.fspath(path)!r}, expected a folder of this host or gs://BUCKET/...; mount "
      f"what is at {scheme}:// and give that folder"
    )
  try:
    fsspec.get_filesystem_class("gs")
  except ImportError as error:
    raise errors.ConfigError(
      f"{key}: {os.fspath(path)!r} needs the package gcsfs, which is not installed; install the "
      "extra gcs (source launch/setup.sh gcs), or name a folder of this host"
    ) from error


def claim(
  config: ml_collections.ConfigDict, workdir: epath.Path, *, started: bool, prepared: bool
) -> None:
  """Writes `config.json`, or checks that the one there is of the same config.

  The keys of `OPERATIONAL` may differ, and so may the place of `base.workdir` if there is one; the
  new values are written.

  Args:
    config: the whole config.
    workdir: made if it is missing.
    started: whether a stage is done there, or its base begun; a run that ended in an error before
      that leaves nothing to protect.
    prepared: whether the data are, so that nothing reads `data.root` any more.

  Raises:
    config.ConfigError: naming every key that differs, the folder that cannot be written, or
      `config.json` if it is lost.
  """
  resolved = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  if started:
    content = _read(path)
    free = [name for name in OPERATIONAL if prepared or name != "data.root"]
    if content["config"].get("base", {}).get("workdir") and config.base.workdir:
      free.append("base.workdir")  # moved; the data and base say whether it is the same one
    changes = _differences(_without(content["config"], free), _without(resolved, free))
    if changes:
      raise errors.ConfigError(
        f"{workdir} was made with another config; differing keys: {'; '.join(changes)}. Use a new "
        "--workdir (with --config.base.workdir to keep data and base), or the config of before"
      )
    if content["config"] != resolved:
      files.write_json(path, {**content, "config": resolved})
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"config": resolved, **environment()})
  except OSError as error:
    if files.is_full_disk(error):
      raise
    raise errors.ConfigError(
      f"--workdir: {workdir} cannot be written ({error.strerror}); name a folder that can"
    ) from error


def check_shared(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Checks that this process shares process 0's work directory and config.

  Raises:
    config.ConfigError: naming the folder, or every key that differs.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise errors.ConfigError(
      f"--workdir: process {jax.process_index()} does not see {path}, which process 0 wrote; "
      "several processes need one folder that all of them see"
    )
  here = json.loads(config.to_json_best_effort())
  changes = _differences(files.read_json(path, config=dict)["config"], here)
  if changes:
    raise errors.ConfigError(
      f"--config: process {jax.process_index()} differs from process 0: {'; '.join(changes)}. "
      "Start every process with the same command"
    )


def environment() -> dict[str, Any]:
  """Command, versions, devices and git revision, for `config.json`."""
  return {
    "command": _command(),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    "device_kind": jax.devices()[0].device_kind,
    "num_devices": jax.device_count(),
    "num_processes": jax.process_count(),
    "git_revision": _git_revision(),
  }


def check_same_base(config: ml_collections.ConfigDict) -> None:
  """Checks that data, model and base options are those of `config.base.workdir`.

  The seed may differ, and so may augmentation that the base was trained with: that is printed.

  Raises:
    config.ConfigError: naming every key that differs.
  """
  there = _read(epath.Path(config.base.workdir) / "config.json")["config"]
  here = json.loads(config.to_json_best_effort())
  there, here = (_without(content, OPERATIONAL + _OF_THE_OTHER_JOB) for content in (there, here))
  free = ("seed", "augment") if here["base"]["augment"] else ("seed",)
  changes, said = (
    [change for name in names for change in _differences(there[name], here[name], f"config.{name}")]
    for names in (("data", "model", "base"), free)
  )
  if changes:
    raise errors.ConfigError(
      f"config.base.workdir: {config.base.workdir} was made with other options: "
      f"{'; '.join(changes)}. Give the same, or leave config.base.workdir empty to train again"
    )
  if said:
    progress.say(
      f"the base is that of {config.base.workdir}, trained with another {'; '.join(said)}"
    )


def _read(path: epath.Path) -> dict[str, Any]:
  """`config.json` of a work directory in which a stage is done.

  An option that an older version did not have counts as its default, under which nothing changes.
  """
  try:
    content = files.read_json(path, config=dict)
  except (FileNotFoundError, errors.FileError) as error:
    raise errors.ConfigError(
      f"{path} is missing or damaged ({error}), and nothing else says with which config the stages "
      f"that are done in {path.parent} were made; bring it back, or use a new --workdir"
    ) from error
  defaults = json.loads(config_lib.base_config().to_json_best_effort())
  return {**content, "config": _filled(content["config"], defaults)}


def _filled(there: Any, defaults: Any) -> Any:
  """`there`, with what it lacks of the defaults."""
  if not (isinstance(there, dict) and isinstance(defaults, dict)):
    return there
  return {
    **defaults,
    **{key: _filled(value, defaults.get(key)) for key, value in there.items()},
  }


def _without(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
  """A copy of a resolved config that lacks the sections SECTION and keys SECTION.KEY of `names`."""
  config = copy.deepcopy(config)
  for name in names:
    *section, key = name.split(".")
    (config[section[0]] if section else config).pop(key, None)
  return config


def _command() -> str:
  """How this program was started, as one types it."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
  return shlex.join(["python", *program, *sys.argv[1:]])


def _git_revision() -> str | None:
  """Revision of the checkout that the package runs from; None if it is installed elsewhere."""
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
