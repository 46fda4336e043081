"""Stage 'evaluate': base and fine-tuned checkpoints on validation and test -> `results.json`.

Every checkpoint is measured by Dice for the curve; the base, the last, the selected and the
delivered one by all of `config.evaluate.metrics`. Logits are brought to each case's own grid before
the argmax, and the slices of a case count together. What is known of a checkpoint is kept in
`evaluate/`, so that an interrupted run goes on. Of several processes each measures some checkpoints
on its own first device, and process 0 writes what all of them share.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, provenance, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import preference_file
from rndpo_jax.evaluation import (
  delivered,
  gallery,
  label_free,
  metrics,
  predict,
  rankseg,
  results,
)
from rndpo_jax.evaluation.cases import overlap_cases, surface_cases
from rndpo_jax.mining import judge_gate
from rndpo_jax.mining import judges as judges_lib
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files, multihost, preemption, progress
from rndpo_jax.stages import base, finetune, measure_harm, phases
from rndpo_jax.training import checkpoint, image_terms


def run(config, workdir: os.PathLike) -> None:
  """Measures every checkpoint and writes `evaluate/`, `delivered/` and, last, `results.json`.

  Raises:
    records.DataError: if an earlier stage's file is missing, naming the stage to run.
    checkpoint.CheckpointError: if a checkpoint cannot be read.
  """
  workdir = epath.Path(workdir)
  places = {step: place for step, *place in phases.checkpoints(config, workdir)}
  tuned = list(places)
  dataset = dataset_lib.open_dataset(config, workdir)
  params = params_of_step(workdir, dataset, places)
  for own, folder, _ in phases.of_job(config, workdir):
    start = phases.start(own, workdir, dataset)
    here = finetune.made_of(own, workdir, folder / "pairs", dataset, start)
    finetune.check_made_of(folder / "finetune", "done.json", here)
  axes = mirror_axes(config, workdir, dataset)
  evaluation = predict.open_evaluation(config, dataset, workdir / "evaluate", params, axes)
  steps = [0, *tuned]
  own = steps[jax.process_index() :: jax.process_count()]
  shown = progress.track(own, total=len(own), description="evaluate", unit="checkpoints")
  with preemption.together("evaluate: measured checkpoints are kept"):
    cases = {step: overlap_cases(evaluation, step) for step in shown}
  if not multihost.is_first():
    return
  made_of = provenance.of_finetuning(dataset, params(0))
  # What the other processes measured is read from their files.
  cases |= {step: overlap_cases(evaluation, step) for step in steps if step not in cases}
  curve = [results.curve_point(step, cases[step]) for step in steps]
  points = label_free.measure(config, evaluation, steps)
  group_of = {entry["case_id"]: entry["group_id"] for entry in dataset.records}
  chosen = _choose(config, steps, cases, points, group_of)
  delivered.write(workdir, results.plain(chosen), params(chosen["step"]), made_of)
  reported = {"base": 0, "finetuned": steps[-1], "selected": results.select_step(curve)}
  reported["delivered"] = chosen["step"]
  if reported["selected"] is None:
    del reported["selected"]
  names = list(config.evaluate.metrics)
  if set(names) & set(metrics.SURFACE):
    wanted = sorted(set(reported.values()))
    shown = progress.track(wanted, total=len(wanted), description="surfaces", unit="checkpoints")
    cases |= {step: surface_cases(evaluation, step, cases[step]) for step in shown}
  models = {model: cases[step] for model, step in reported.items()}
  table = csv_text(reported, models, names, evaluation.dataset.class_names)
  files.write_text(evaluation.folder / "cases.csv", table)
  gallery.write(evaluation, cases[0], cases[steps[-1]], steps[-1])
  content = _context(config, workdir, evaluation.dataset)
  judge = content["judges"][content["judge"]]
  content["harm"] = measure_harm.write(config, workdir, evaluation, steps, judge)
  content |= _measured(models, reported, curve, names)
  stops = label_free.stops(points, curve, max_kl=config.evaluate.delivered_max_kl)
  content["label_free"] = {"checkpoints": points, **stops}
  content["rankseg"] = _rankseg(rankseg.of_base(config, evaluation), names)
  content["delivered"] |= _delivered(chosen, models, group_of)
  content["warnings"] = _warnings(config, content)
  files.write_json(workdir / "results.json", results.plain(content))


def mirror_axes(config, workdir: epath.Path, dataset) -> tuple[int, ...]:
  """Axes whose flips `config.evaluate.mirror` averages over, as `launch.predict --mirror` does.

  All in the simple mode; in the native mode those that training flipped.

  Raises:
    ConfigError: if there are none of those.
  """
  if not config.evaluate.mirror:
    return ()
  if dataset.native is None:
    return tuple(range(dataset.spatial_dims))
  found = base.mirror_axes(config, workdir, dataset.spatial_dims)
  if not found:
    raise errors.ConfigError(
      "config.evaluate.mirror: found True, but the base was trained without flips, so those of its "
      "input would harm; leave it at False"
    )
  return found


def _choose(config, steps, cases, points, group_of) -> dict:
  """Which model is delivered: by validation first, or by `label_free` without such cases."""
  asked, max_kl = config.evaluate.delivered_min_probability, config.evaluate.delivered_max_kl
  dice = np.array([results.split_dice(cases[step], "val") for step in steps])
  if dice.size:
    groups = results.split_groups(cases[0], "val", group_of)
    near = label_free.passes(points, max_kl=max_kl)
    return delivered.choose(steps, dice, groups, min_probability=asked, near=near)
  return label_free.choose(points, max_kl=max_kl)


def _rankseg(cases, names) -> dict:
  """The metrics of overlap of `rankseg`, the base without any training."""
  overlap = [name for name in names if name not in metrics.SURFACE]
  return {split: results.mean_metrics(cases, split, overlap) for split in predict.SPLITS}


def _delivered(chosen: dict, models, group_of) -> dict:
  """What `results.json` says of the delivered model besides its metrics."""
  test = [results.split_dice(models[name], "test") for name in ("delivered", "base")]
  difference = {"val": None, "test": None}
  if "probability" in chosen:
    difference["val"] = {key: chosen[key] for key in ("mean", "ci", "probability")}
  if test[0].size:
    groups = results.split_groups(models["base"], "test", group_of)
    difference["test"] = delivered.paired(test[0] - test[1], groups)
  names = ("step", "is_base", "chosen_by", "rule", "reason", "min_probability", "max_kl")
  return {**{name: chosen[name] for name in names if name in chosen}, "difference": difference}


def params_of_step(
  workdir: epath.Path, dataset, places: Mapping[int, tuple[epath.Path, int]]
) -> Callable[[int], types.Params]:
  """Step of fine-tuning, over all phases -> its parameters; step 0 is the base, read once.

  Args:
    workdir: of the job.
    dataset: the prepared data.
    places: step -> `finetune/` of its phase, and the step in it; see `phases.checkpoints`.
  """
  base_params = base.load(workdir, dataset)

  def params(step: int) -> types.Params:
    if step == 0:
      return base_params
    directory, own = places[step]
    return checkpoint.restore_params(directory / "params", own, stage_directory=directory)

  return params


def csv_text(
  steps: Mapping[str, int],
  models: Mapping[str, Sequence[results.Case]],
  names: Sequence[str],
  class_names: Sequence[str],
) -> str:
  """One row a model, case and foreground class."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  head = ["model", "step", "split", "case_id", "class", "class_name"]
  writer.writerow([*head, *names, "mask_empty", "label_empty"])
  for model, cases in models.items():
    for case in cases:
      values = results.case_values(case, names)
      empty = metrics.overlap(case.counts)
      for i, class_name in enumerate(class_names[1:]):
        names_of_files = (results.quoted(case.case_id), i + 1, results.quoted(class_name))
        row = [model, steps[model], case.split, *names_of_files]
        row += [values[name][i] for name in names]
        writer.writerow([*row, int(empty["mask_empty"][i]), int(empty["label_empty"][i])])
  return text.getvalue()


def _measured(models, steps, curve, names) -> dict:
  """The part of `results.json` that this stage measures."""
  content = {
    model: {split: results.mean_metrics(cases, split, names) for split in predict.SPLITS}
    for model, cases in models.items()
  }
  content["finetuned"]["step"] = steps["finetuned"]
  content.setdefault("selected", {split: dict.fromkeys(names) for split in predict.SPLITS})
  content["selected"] |= {"step": steps.get("selected"), "rule": "validation"}
  empty = {
    model: {split: results.empty_masks(cases, split) for split in predict.SPLITS}
    for model, cases in models.items()
  }
  return content | {"curve": curve, "sustained": results.sustained(curve), "empty_masks": empty}


def _warnings(config, content) -> list[str]:
  """Those of `results.warnings`, of phases left out, and of the gate if a run went on in spite."""
  left_out = [
    f"Phase {entry['phase']} was left out: {entry['reason']}. {judge_gate.REMEDY}."
    for entry in content["left_out"]
  ]
  is_judged = "pairs" in image_terms.reads_of(config)
  has_beta = not {"preference", "online"}.isdisjoint(config_lib.active_terms(config))
  said = left_out + results.warnings(content, has_beta=has_beta, is_judged=is_judged)
  if left_out or not is_judged or config.data.preferences:  # said, or nothing was judged
    return said
  found = judge_gate.finding(content["judges"], content["judge"], **config.judge.gate)
  return [*said, f"{found[0].upper()}{found[1:]}."] if found else said


def _context(config, workdir, dataset) -> dict:
  """The part of `results.json` that says what was measured, and what earlier stages found."""
  path = workdir / "pairs" / "judges.json"
  judge = preference_file.NAME
  if not config.data.preferences:
    judge = judge_gate.used(files.read_json(path), config.judge.name)
  judges = files.read_json(path, **{judge: dict})
  pairs = files.read_json(
    workdir / "pairs" / "manifest.json", num_pairs=int, dropped=dict, region_size=dict
  )
  every, trained = phases.of_job(config, workdir), phases.trained(config, workdir)
  cases = {
    split: len({dataset.records[int(i)]["case_id"] for i in indices})
    for split, indices in dataset.splits.items()
  }
  return {
    "dataset": config.data.name,
    "seed": config.seed,
    "base_seed": files.read_json(workdir / "base" / "selected.json").get("seed"),
    "terms": [list(config_lib.active_terms(own)) for own, *_ in trained],
    "objectives": [own.finetune.objective for own, *_ in trained],
    "left_out": [
      {"phase": number, "reason": shards.left_out(phase.folder / "pairs")}
      for number, phase in enumerate(every, 1)
      if phases.is_left_out(phase)
    ],
    "finetune_folder": str((trained[-1].folder / "finetune").relative_to(workdir)),
    "objective": config.finetune.objective,
    "beta": config.finetune.beta,
    "judge": judge,
    "study": judges_lib.needs(judge, "labels"),
    "rule": preference_file.NAME if config.data.preferences else config.mine.rule,
    "num_labelled_cases": cases["labelled"],
    "num_cases": cases,
    "class_names": list(dataset.class_names),
    "spacing_unit": dataset.spacing_unit,
    "nsd_tolerance": config.evaluate.nsd_tolerance_mm,
    "units": results.units(dataset.spacing_unit),
    "judges": judges,
    "pairs": {
      "count": pairs["num_pairs"],
      "dropped_identical": pairs["dropped"]["identical"],
      "region_size": {key: pairs["region_size"][key] for key in ("p5", "p50", "p95")},
      "dropped": pairs["dropped"],
    },
  }
