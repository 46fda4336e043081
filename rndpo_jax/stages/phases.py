"""Phases: fine-tunings one after another, each from the result of the one before.

Phase n starts from the last parameters of phase n - 1, the first from the base; they are its
reference too, and its pairs are mined by them. A phase whose judge was refused is left out, and the
next one starts where it would have. The last phase is in the work directory itself,
`pairs/` and `finetune/`; phase n before it in `phase-n/`. See `config.of_phase` for their configs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, types
from rndpo_jax.mining import judge_gate
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files
from rndpo_jax.stages import base
from rndpo_jax.training import checkpoint, image_terms, train_loop


class Phase(NamedTuple):
  """A phase of a job.

  Attributes:
    config: the job's with what the phase changes.
    folder: where its `pairs/` and `finetune/` are.
    steps: of all phases before it.
  """

  config: object
  folder: epath.Path
  steps: int


def of_job(config, workdir: os.PathLike) -> list[Phase]:
  """The phases of a job, in their order."""
  phases, steps, found = config_lib.every_phase(config), 0, []
  for number, own in enumerate(phases, 1):
    folder = epath.Path(workdir) if number == len(phases) else _folder(workdir, number)
    found.append(Phase(own, folder, steps))
    steps += own.finetune.num_steps
  return found


def is_left_out(phase: Phase) -> bool:
  """Whether mining has left a phase out."""
  return bool(shards.left_out(phase.folder / "pairs"))


def are_done_before(config, workdir: os.PathLike) -> bool:
  """Whether every phase before the last is mined, where it reads pairs, and trained."""
  for own, folder, _ in of_job(config, workdir)[:-1]:
    is_mined = (
      "pairs" not in image_terms.reads_of(own) or (folder / "pairs" / "manifest.json").exists()
    )
    if not is_mined or not (folder / "finetune" / "done.json").exists():
      return False
  return True


def check_left_out(config, workdir: os.PathLike) -> None:
  """Refuses phases that were left out and would not be by the gate of now.

  Raises:
    errors.ProvenanceError: with what to delete: of that phase, and of those after it.
  """
  every = of_job(config, workdir)
  for place, phase in enumerate(every):
    path, gate = phase.folder / "pairs" / "judges.json", phase.config.judge.gate
    if not is_left_out(phase) or not path.exists():  # which are measured again
      continue
    table = files.read_json(path)
    name = judge_gate.used(table, phase.config.judge.name)
    found = judge_gate.finding(table, name, **gate)
    if not judge_gate.refuses(table, name, found, gate.action):
      stale = [after.folder / part for after in every[place:] for part in ("pairs", "finetune")]
      raise errors.ProvenanceError(
        f"{path.parent}: this phase was left out, but config.judge.gate lets the judge {name!r} "
        "pass now; delete the folders "
        f"{', '.join(os.fspath(folder) for folder in stale if folder.exists())}, and run the same "
        "command again"
      )


def trained(config, workdir: os.PathLike) -> list[Phase]:
  """`of_job` without what is left out."""
  steps, found = 0, []
  for phase in of_job(config, workdir):
    if not is_left_out(phase):
      found.append(phase._replace(steps=steps))
      steps += phase.config.finetune.num_steps
  return found


def start(config, workdir: os.PathLike, dataset) -> types.Params:
  """The parameters that a phase starts from, a numpy tree.

  Args:
    config: of the phase, as `config.of_phase` gives it.
    workdir: of the job.
    dataset: the prepared data.

  Raises:
    errors.CheckpointError: if they cannot be read.
    errors.ProvenanceError: if the base was trained on other data.
  """
  before = _before(config, workdir)
  if before is None:
    return base.load(workdir, dataset)
  directory, step = before.folder / "finetune", before.config.finetune.num_steps
  return checkpoint.restore_params(directory / "params", step, stage_directory=directory)


def kept_before(config, workdir: os.PathLike) -> tuple[epath.Path, list[int]]:
  """`finetune/` of the phase before this one, and the steps of its checkpoints."""
  before = _before(config, workdir)
  options = before.config.finetune
  steps = train_loop.kept_steps(options.num_steps, options.eval_every_steps)
  return before.folder / "finetune", steps


def _before(config, workdir: os.PathLike) -> Phase | None:
  """The phase that the last of a config starts from; None if that is the base."""
  for number in range(config_lib.num_phases(config) - 1, 0, -1):
    own = config_lib.of_phase(config, number)
    found = Phase(own, _folder(workdir, number), 0)
    if not is_left_out(found):
      return found
  return None


def checkpoints(config, workdir: os.PathLike) -> Iterator[tuple[int, epath.Path, int]]:
  """(step counted over all phases, `finetune/` of its phase, step in it), of every checkpoint.

  Raises:
    errors.DataError: if there is none.
    errors.CheckpointError: if they are not those that the config says.
  """
  for own, folder, steps in trained(config, workdir):
    directory = folder / "finetune"
    found = checkpoint.steps(directory / "params")
    expected = train_loop.kept_steps(own.finetune.num_steps, own.finetune.eval_every_steps)
    if not found:
      raise errors.DataError(
        f"{directory / 'params'}: no checkpoint; run the stage 'finetune' first"
      )
    if found != expected:
      raise errors.CheckpointError(
        f"{directory / 'params'}: found checkpoints of steps {found}, expected {expected}; delete "
        f"the folder {directory} and run the same command again"
      )
    yield from ((steps + step, directory, step) for step in found)


def _folder(workdir: os.PathLike, number: int) -> epath.Path:
  return epath.Path(workdir) / f"phase-{number}"
