"""Masks of new cases by a trained network: case after case, of several processes each its share."""

from __future__ import annotations

import functools
import os
import pathlib

import jax
from etils import epath

from rndpo_jax import errors
from rndpo_jax.data.sources import dicom_seg
from rndpo_jax.predict import case_files, inputs, output_folder, score_table
from rndpo_jax.predict.job import KEPT, Job, Options
from rndpo_jax.runtime import files, multihost, preemption, progress, threads

_WRITERS = 4  # at least: threads that write mostly wait for the disk


def run(job: Job, source: str, output: os.PathLike, options: Options) -> None:
  """Predicts every case that is not done, and writes the table of scores.

  Args:
    job: of `grid_run` or `native_run`, made for these options.
    source: folder or file of images, see `inputs.list_inputs`.
    output: folder; `output_folder.check` has passed it.
    options: what is asked for.

  Raises:
    errors.DataError: at the end, if there were cases that could not be predicted; each was named.
    preemption.Preempted: after a signal; the same command goes on.
  """
  output = epath.Path(output)
  found = inputs.list_inputs(source, job.num_channels)
  if options.dicom_seg:
    _check_series(found)
  if multihost.is_first():
    output_folder.claim(output, source, job, options._asdict())
    _say_start(job, found, inputs.overlooked(source))
  multihost.barrier("predict: the output is claimed")
  own = found[jax.process_index() :: jax.process_count()]
  is_done = functools.partial(
    case_files.is_done,
    output,
    probabilities=options.probabilities,
    with_dicom_seg=options.dicom_seg,
  )
  left = [one for one in own if not is_done(one)]
  broken: list[inputs.Input] = []

  def on_broken(one: inputs.Input, error: errors.DataError) -> None:
    broken.append(one)
    progress.say(f"not predicted: {error}")

  encode = functools.partial(dicom_seg.encode, class_names=job.class_names, title=job.title)

  def write(case: case_files.Predicted) -> None:
    try:
      case_files.write(output, case, encode if options.dicom_seg else None)
    except errors.DataError as error:
      on_broken(case.source, error)

  with preemption.together(KEPT):
    done = job.predicted(left, on_broken)
    written = threads.in_order(write, done, max(_WRITERS, options.workers))
    total, before = len(own), len(own) - len(left)
    for _ in progress.track(written, total=total, description="predict", unit="cases", done=before):
      pass
  count = multihost.total(len(broken))
  if multihost.is_first() and options.scores:
    files.refresh(output / case_files.FOLDER)
    rows = [case_files.read_done(output, one) for one in found if is_done(one)]
    # Of masks that another --input of the same folder has made, one of its files say.
    rows += case_files.read_others(output, {one.case_id for one in found})
    files.write_text(output / score_table.FILE, score_table.text(rows))
  if count:
    raise errors.DataError(
      f"--input: {count} of {len(found)} cases could not be predicted, each is named above; fix or "
      "remove their files and run the same command again: finished cases are kept"
    )


def _check_series(found: list[inputs.Input]) -> None:
  """Refuses cases that no DICOM segmentation can be made of."""
  others = [one for one in found if not one.is_series]
  if others:
    raise errors.ConfigError(
      f"--dicom_seg: {others[0].files[0]} is no DICOM series, nor are {len(others) - 1} more of "
      f"{len(found)} cases; leave the flag out, or give the folder of the series"
    )
  dicom_seg.import_highdicom(found[0].files[0])


def _say_start(job: Job, found: list[inputs.Input], overlooked: list[pathlib.Path]) -> None:
  classes = ", ".join(f"{n} {name}" for n, name in enumerate(job.class_names))
  progress.say(f"{len(found)} cases, by {job.title}; classes in the masks: {classes}")
  for ending, of_mask in sorted({(one.ending.lower(), one.mask_ending.lower()) for one in found}):
    if of_mask != ending:
      progress.say(f"masks of {ending or 'DICOM series'} are written as {of_mask}")
  if overlooked:
    progress.say(
      f"not predicted: {len(overlooked)} images in folders below --input, such as {overlooked[0]}; "
      "give their folder to have them predicted, too"
    )
