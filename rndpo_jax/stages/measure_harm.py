"""What wrong pairs do to the training: `evaluate/harm.json`, a part of the stage 'evaluate'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rndpo_jax.evaluation import harm, predict, results, validation_pairs
from rndpo_jax.losses import objectives
from rndpo_jax.losses.preference import REGION_SIZE_EDGES
from rndpo_jax.runtime import files
from rndpo_jax.stages import measure_judges, phases

HARM = "harm.json"  # in `evaluate/`


def write(
  config, workdir: epath.Path, evaluation: predict.Evaluation, steps: Sequence[int], judge: Mapping
) -> dict[str, Any]:
  """Writes HARM for the validation pairs of the last phase's judge.

  Args:
    config: of the job.
    workdir: of the job.
    evaluation: of `predict.open_evaluation`.
    steps: all that were evaluated, counted over all phases, from 0.
    judge: the row in `judges.json` of the judge that mines.

  Returns:
    What HARM holds, with the first and last checkpoint in place of all.

  Raises:
    errors.FileError: if the validation pairs cannot be read.
  """
  # Of the last phase, whose start is the reference of its pairs.
  before = [phase for phase in phases.trained(config, workdir) if phase.folder != workdir]
  first = sum(phase.config.finetune.num_steps for phase in before)
  found = _harm(config, workdir, evaluation, [step for step in steps if step >= first], judge)
  files.write_json(evaluation.folder / HARM, results.plain(found))
  curve = found.pop("curve")
  return {**found, "first": curve[0], "last": curve[-1]}


def _harm(config, workdir, evaluation, steps, judge) -> dict:
  """What `harm.account` says of the validation pairs of the judge that mines."""
  pairs = validation_pairs.read(workdir / "pairs" / validation_pairs.FILE)
  margins = validation_pairs.margins(config, evaluation, pairs, steps)
  options = config.finetune
  row = objectives.OBJECTIVES[objectives.parse(options.objective)[0]]
  return {"split": "val"} | harm.account(
    steps,
    margins if options.reference == "none" else margins - margins[0],
    pairs["region_size"],
    validation_pairs.gain(pairs),
    measure_judges.pair_worth(config, pairs["score_gap"], pairs["valid"], judge),
    validation_pairs.share(pairs),
    edges=REGION_SIZE_EDGES,
    beta=options.beta,
    normalization=options.normalization or row.normalization,
    exponent=options.power_exponent,
    floor=options.power_floor,
    voxel_volume=measure_judges.volumes(config, evaluation.dataset, pairs["index"]),
  )
