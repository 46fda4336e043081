"""The main job: runs the stages in order in a work directory, skipping what is done."""

from __future__ import annotations

import itertools
import os
import time

import jax
import ml_collections
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, models
from rndpo_jax import workdir as workdir_lib
from rndpo_jax.checks import config_checks, config_flips
from rndpo_jax.data import proposal_files
from rndpo_jax.mining import judges
from rndpo_jax.mining.program import used_judges
from rndpo_jax.nnunet import imported
from rndpo_jax.runtime import files, multihost, preemption, progress, sharding
from rndpo_jax.stages import base, evaluate, finetune, mine, mine_preferences, phases, prepare
from rndpo_jax.training import image_terms


def _mine(config, workdir: os.PathLike, folder: os.PathLike | None = None) -> None:
  """Pairs by a judge, or those of `config.data.preferences`."""
  stage = mine_preferences if config.data.preferences else mine
  stage.run(config, workdir, folder)


def _report(config, workdir: os.PathLike) -> None:
  """The page; matplotlib is imported when it is due, 0.3 s that no other stage has to wait for."""
  from rndpo_jax.stages import report

  report.run(config, workdir)


RUNNERS = {
  "prepare": prepare.run,
  "base": base.run,
  "mine": _mine,
  "finetune": finetune.run,
  "evaluate": evaluate.run,
  "report": _report,
}
# Stages that process 0 runs while the others wait.
ALONE = ("report",)
# The file that a stage writes last, and so the sign that it is done,
DONE = {
  "prepare": "data/records.json",
  "base": "base/selected.json",
  "mine": "pairs/manifest.json",
  "finetune": "finetune/done.json",
  "evaluate": "results.json",
  "report": "report.html",
}
# with these, of which each is made again if it is lost.
ALSO = {
  "mine": (
    "pairs/judges.json",
    "pairs/proposals.json",
    "pairs/validation.npz",
    "pairs/examples.npz",
  ),
  "evaluate": ("evaluate/gallery.npz", "evaluate/harm.json", "delivered/delivered.json"),
}


def run(config: ml_collections.ConfigDict, workdir: os.PathLike, stages=config_lib.STAGES) -> None:
  """Runs `stages` in their order; a stage that is done, with all before it, is skipped.

  Args:
    config: from a file in `configs/`.
    workdir: made if it is missing; belongs to this config alone.
    stages: names from `config.STAGES`.

  Raises:
    errors.ConfigError: on a config that cannot work, a stage that is unknown or lacks the stage
      before it, a workdir that cannot be written or that holds another config.
    preemption.Preempted: after a signal, what is finished being kept.
    The stages' own errors.
  """
  config = imported.resolve(config)
  config_checks.validate(config)
  last = config_lib.of_phase(config)
  workdir_lib.check_path("--workdir", workdir)
  unknown = [name for name in stages if name not in config_lib.STAGES]
  if unknown:
    raise errors.ConfigError(
      f"--stages: unknown stage {unknown[0]!r}; known: {', '.join(config_lib.STAGES)}"
    )
  workdir = epath.Path(workdir)
  wanted = [name for name in config_lib.STAGES if name in stages]
  _check_same_stages(wanted)
  left = find_done(config, workdir)
  there = left
  if config.base.workdir:
    there = ["prepare", *left]
    wanted = [name for name in wanted if name != "prepare"]
  # One whose predecessor is lost looks again at what it was made of, and is soon done if that
  # is the same.
  done = list(itertools.takewhile(there.__contains__, config_lib.STAGES))
  check_here(config, [name for name in wanted if name not in done])
  if multihost.is_first():
    prepared = "prepare" in there
    started = bool(left) or (workdir / "base").exists()
    workdir_lib.claim(config, workdir, started=started, prepared=prepared)
    phases.check_left_out(config, workdir)
  multihost.barrier("claim")
  if not multihost.is_first():
    workdir_lib.check_shared(config, workdir)
  for name in wanted:
    if name in done:
      if name == "mine" and multihost.is_first():
        (mine_preferences if config.data.preferences else mine).check_same_files(last, workdir)
      progress.say(f"[{name}] done before")
      continue
    if multihost.is_first():
      check_before(config, name, workdir)
    start = time.monotonic()
    progress.say(f"[{name}]")
    with preemption.together(f"stage {name!r} is done"):
      if name == "mine":
        _run_earlier_phases(config, workdir)
      if name not in ALONE or multihost.is_first():
        # The base comes before all phases: what they change, augmentation say, is not for it.
        RUNNERS[name](config if name == "base" else last, workdir)
    for folder in (workdir, (workdir / DONE[name]).parent):
      files.refresh(folder)
    progress.say(f"[{name}] {time.monotonic() - start:.1f} s")


def _run_earlier_phases(config, workdir: epath.Path) -> None:
  """Mines and fine-tunes in every phase but the last; what is done is kept.

  A phase mines only if one of its terms reads pairs.
  """
  every = phases.of_job(config, workdir)
  for number, (own, folder, _) in enumerate(every[:-1], 1):
    terms = config_lib.active_terms(own)
    progress.say(f"[phase {number} of {len(every)}] {', '.join(terms)}")
    mined = folder / "pairs" / "manifest.json"
    if "pairs" in image_terms.reads(terms) and not multihost.broadcast(mined.exists):
      _mine(own, workdir, folder)
    multihost.barrier(f"phase {number} is mined")
    for path in (workdir, folder, folder / "pairs"):
      files.refresh(path)
    finetune.run(own, workdir, folder)
    multihost.barrier(f"phase {number} is done")
    files.refresh(folder / "finetune")


def _check_same_stages(wanted: list[str]) -> None:
  """Raises ConfigError if the processes would wait for each other in different stages."""
  bits = [name in wanted for name in config_lib.STAGES]
  mask = sum(bit << i for i, bit in enumerate(bits))
  others = multihost.processes_where(mask != multihost.broadcast(lambda: mask))
  if others:
    raise errors.ConfigError(
      f"--stages: process {others[0]} was started with other stages than process 0; start all "
      "with the same command"
    )


def find_done(config, workdir: epath.Path) -> list[str]:
  """The stages whose last file is there, as process 0 sees it; `mine` has every phase before it."""

  def look() -> int:
    there = {name: is_done(name, workdir) for name in DONE}
    there["mine"] &= phases.are_done_before(config, workdir)
    return sum(found << i for i, found in enumerate(there.values()))

  bits = multihost.broadcast(look)
  return [name for i, name in enumerate(DONE) if bits >> i & 1]


def is_done(name: str, workdir: epath.Path) -> bool:
  """Whether a stage's last file is there, and what else stages after it read."""
  if name == "prepare":
    return prepare.is_done(workdir)
  return all((workdir / path).exists() for path in (DONE[name], *ALSO.get(name, ())))


def check_here(config: ml_collections.ConfigDict, stages=config_lib.STAGES) -> None:
  """As `_check_phase_here`, of every phase; those before the last run in the stage `mine`."""
  *before, last = config_lib.every_phase(config)
  for own in before:
    _check_phase_here(own, (*stages, "finetune") if "mine" in stages else stages)
  _check_phase_here(last, stages)


def _check_phase_here(config, stages) -> None:
  """Raises ConfigError for what these devices or this installation cannot do, before any training.

  Args:
    config: the whole config.
    stages: those that will run; what others alone would need is not looked at.

  Raises:
    errors.ConfigError: a mesh that the devices cannot make; a batch that they cannot share; a
      judge or a network of the user's own that cannot be imported.
    errors.DataError: a folder of proposals that is missing, or not what the mix says.
  """
  if "mine" in stages and proposal_files.count(config):
    proposal_files.generators(config)
  if config.base.nnunet_folder and "base" in stages and not imported.is_mirrored(config):
    config_flips.check_unflipped(config)
  names = used_judges(config)
  trained = [name for name in ("base", "finetune") if name in stages]
  if not config_lib.trains_base(config):
    trained = [name for name in trained if name != "base"]
  sizes = {"base.batch_size": config.base.batch_size} if "base" in trained else {}
  sizes |= finetune.batch_sizes(config) if "finetune" in trained else {}
  in_parts = dict(sizes)
  if "mine" in stages and "learned" in names:
    sizes["judge.learned.batch_size"] = config.judge.learned.batch_size
  devices, space = jax.device_count(), config.mesh.space
  if sizes:  # nothing else uses a mesh
    sharding.check_mesh(devices, config.mesh.fsdp, space, jax.local_device_count())
  for key, size in sizes.items():
    sharding.check_batch_size(f"config.{key}", size, devices, space)
  for key, size in in_parts.items():
    name, _, option = key.partition(".")
    parts = config[name].accumulate_steps
    if size % (parts * devices // space):
      raise errors.ConfigError(
        f"config.{name}.accumulate_steps: found {parts}, but {option}={size} on "
        f"{sharding.sharers(devices, space)} is no multiple of {parts * devices // space}"
      )
  if config.model.name not in models.ARCHITECTURES:
    models.build(
      config.model,
      num_classes=max(config.data.num_classes, 2),  # 0 is not known yet
      spatial_dims=config.data.spatial_dims,
    )
  for name in names:
    if ":" in name and "mine" in stages:
      try:
        judges.build(name, num_classes=2, border=0, flip_rate=0.0, noise_level=0.0)
      except errors.JudgeError as error:
        raise errors.ConfigError(f"config.judge: {error}") from error


def check_before(config, name: str, workdir: epath.Path) -> None:
  """Raises ConfigError if the stage before is not done.

  Raises:
    errors.ConfigError: naming the stage to run first.
  """
  place = config_lib.STAGES.index(name)
  before = config_lib.STAGES[place - 1] if place else None
  if before == "prepare" and config.base.workdir:
    path = epath.Path(config.base.workdir) / DONE["base"]
    if not path.exists():
      raise errors.ConfigError(
        f"config.base.workdir: {path} is missing; run the stages prepare and base there first"
      )
    workdir_lib.check_same_base(config)
    return
  needed = (DONE[before], *ALSO.get(before, ())) if before else ()
  missing = [path for path in needed if not (workdir / path).exists()]
  if missing:
    raise errors.ConfigError(
      f"--stages: {name!r} needs {workdir / missing[0]}, which is missing; run the stage "
      f"{before!r} first"
    )
