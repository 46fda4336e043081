"""Masks of new cases by a trained network: case after case, of several processes each its share."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rndpo_jax import errors, models
from rndpo_jax.data import loader
from rndpo_jax.evaluation import predict
from rndpo_jax.models import mirroring
from rndpo_jax.predict import case_files, case_reader, inputs, output_folder, programs, score_table
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.runtime import files, multihost, preemption, progress, sharding, threads

_KEPT = "predict: finished cases are kept"
_WRITERS = 4  # at least: threads that write mostly wait for the disk
_WAITING_BATCHES = 4  # that records wait for others of their size, in batches


class Options(NamedTuple):
  """What is asked for; see `launch.predict`.

  Attributes:
    mirror: whether probabilities are averaged over flips.
    probabilities: whether they are written.
    scores: whether `scores.csv` is.
    workers: threads that read; 0 for one a processor.
  """

  mirror: bool = False
  probabilities: bool = False
  scores: bool = True
  workers: int = 0


class Predictor(NamedTuple):
  """What the batches share.

  Attributes:
    trained: the network.
    batch_size: records in a batch.
    predict_batch: (images f32[B, *size, I], numbers u32[B], native shapes) -> dict of arrays with
      leading axis B: "masks" u8[B, *N] and, if asked for, "probabilities" and the scores.
  """

  trained: trained_lib.Trained
  batch_size: int
  predict_batch: Callable[..., dict[str, jax.Array]]


def run(trained: trained_lib.Trained, source: str, output: os.PathLike, options: Options) -> None:
  """Predicts every case that is not done, and writes the table of scores.

  Args:
    trained: from `trained.load`.
    source: folder or file of images, see `inputs.list_inputs`.
    output: folder; `output_folder.check` has passed it.
    options: what is asked for.

  Raises:
    errors.DataError: at the end, if there were cases that could not be predicted; each was named.
    preemption.Preempted: after a signal; the same command goes on.
  """
  output = epath.Path(output)
  found = inputs.list_inputs(source, trained.num_channels)
  if multihost.is_first():
    output_folder.claim(output, trained, options._asdict())
    _say_start(trained, found)
  multihost.barrier("predict: the output is claimed")
  own = found[jax.process_index() :: jax.process_count()]
  is_done = functools.partial(case_files.is_done, output, probabilities=options.probabilities)
  left = [one for one in own if not is_done(one)]
  broken: list[inputs.Input] = []

  def on_broken(one: inputs.Input, error: errors.DataError) -> None:
    broken.append(one)
    progress.say(f"not predicted: {error}")

  predictor = make_predictor(trained, options)
  with preemption.together(_KEPT):
    done = predicted(predictor, read_ahead(trained, left, options.workers, on_broken))
    write = functools.partial(case_files.write, output)
    written = threads.in_order(write, done, max(_WRITERS, options.workers))
    total, before = len(own), len(own) - len(left)
    for _ in progress.track(written, total=total, description="predict", unit="cases", done=before):
      pass
  count = multihost.total(len(broken))
  if multihost.is_first() and options.scores:
    files.refresh(output / case_files.FOLDER)
    rows = [case_files.read_done(output, one) for one in found if is_done(one)]
    files.write_text(output / score_table.FILE, score_table.text(rows))
  if count:
    raise errors.DataError(
      f"--input: {count} of {len(found)} cases could not be predicted, each is named above; fix or "
      "remove their files and run the same command again: finished cases are kept"
    )


def read_ahead(
  trained: trained_lib.Trained,
  sources: Iterable[inputs.Input],
  workers: int,
  on_broken: Callable[[inputs.Input, errors.DataError], None],
) -> Iterator[case_reader.Case]:
  """The cases that can be read, in order, a few of them read ahead."""

  def read(one: inputs.Input):
    try:
      return one, case_reader.read(one, trained), None
    except errors.DataError as error:
      return one, None, error

  for one, case, error in threads.in_order(read, sources, workers):
    if error is None:
      yield case
    else:
      on_broken(one, error)


def make_predictor(trained: trained_lib.Trained, options: Options) -> Predictor:
  """What `predicted` needs; compiles nothing yet."""
  config = trained.config
  segmenter = models.build(
    config.model, num_classes=trained.num_classes, spatial_dims=trained.spatial_dims
  )
  apply, to_masks = predict.programs(segmenter)
  if options.mirror:
    apply = sharding.over_local_devices(mirroring.mirrored(segmenter.apply))
  to_probabilities = sharding.over_local_devices(
    lambda _, rows: programs.native_probabilities(*rows)
  )
  score = sharding.over_local_devices(programs.make_scores(config, segmenter, trained.num_classes))
  params = sharding.put_on_local_devices(trained.params)

  def predict_batch(images, numbers, shapes) -> dict[str, jax.Array]:
    resize = predict.resize_matrices(shapes, trained.size, trained.crop)
    logits = apply(params, images)
    found = {"masks": to_masks(logits, resize)}
    if options.probabilities:
      found["probabilities"] = to_probabilities(None, (logits, resize))
    if options.scores:
      found |= score(params, (images, logits, numbers))
    return found

  return Predictor(trained, predict.batch_size(config), predict_batch)


def predicted(
  predictor: Predictor, cases: Iterable[case_reader.Case]
) -> Iterator[case_files.Predicted]:
  """Each case as soon as all of its records are predicted."""

  def forward(rows):
    padded = rows + rows[-1:] * (predictor.batch_size - len(rows))
    images = np.stack([case.images[place] for case, place in padded])
    numbers = np.array([_number(case, place) for case, place in padded], np.uint32)
    shapes = [case.shape for case, _ in padded]
    return rows, predictor.predict_batch(images, numbers, shapes)

  parts: dict[str, dict[int, dict[str, Any]]] = {}
  for rows, found in loader.prefetch(batches(cases, predictor.batch_size), forward, 2):
    preemption.check(_KEPT)
    found = {name: np.asarray(values) for name, values in found.items()}
    for row, (case, place) in enumerate(rows):
      own = tuple(slice(n) for n in case.shape)
      part = {name: values[row] for name, values in found.items()}
      for name in {"masks", "probabilities"} & part.keys():
        part[name] = part[name][own].copy()  # else the whole batch would stay in memory
      of_case = parts.setdefault(case.source.case_id, {})
      of_case[place] = part
      if len(of_case) == len(case.images):
        yield _join(case, parts.pop(case.source.case_id))


def batches(
  cases: Iterable[case_reader.Case], size: int
) -> Iterator[list[tuple[case_reader.Case, int]]]:
  """(case, place of a record in it) in lists of up to `size`, all of one size but for padding.

  A record waits for others of its size, so that a batch is padded to nothing larger; the sizes
  that have waited longest go incomplete once more than `_WAITING_BATCHES` batches wait.
  """
  waiting: dict[tuple[int, ...], list[tuple[case_reader.Case, int]]] = {}
  for case in cases:
    grid = tuple(predict.padded(n) for n in case.shape)
    waiting.setdefault(grid, []).extend((case, place) for place in range(len(case.images)))
    while len(waiting.get(grid, ())) >= size:
      yield waiting[grid][:size]
      rest = waiting.pop(grid)[size:]
      if rest:
        waiting[grid] = rest
    while sum(map(len, waiting.values())) > _WAITING_BATCHES * size:
      yield waiting.pop(next(iter(waiting)))
  yield from waiting.values()


def _number(case: case_reader.Case, place: int) -> int:
  """What the keys of a record's proposals are folded from: its own name, wherever it stands."""
  return zlib.crc32(f"{case.source.case_id}#{place}".encode())


def _join(case: case_reader.Case, parts: dict[int, dict[str, Any]]) -> case_files.Predicted:
  """A case of the predictions of its records, slices along the axis after their own."""
  ordered = [parts[place] for place in range(len(parts))]
  dims = len(case.shape)

  def stack(name: str) -> np.ndarray:
    arrays = [part[name] for part in ordered]
    return np.stack(arrays, axis=dims) if case.is_sliced else arrays[0]

  scores = {}
  if "weight" in ordered[0]:
    names = (*programs.SCORES, "weight")
    scores = score_table.of_case({name: [part[name] for part in ordered] for name in names})
  return case_files.Predicted(
    source=case.source,
    stamp=case.stamp,
    mask=stack("masks"),
    probabilities=stack("probabilities") if "probabilities" in ordered[0] else None,
    scores=scores,
  )


def _say_start(trained: trained_lib.Trained, found: list[inputs.Input]) -> None:
  model = f"the checkpoint of step {trained.step}" if trained.step else "the base"
  classes = ", ".join(f"{n} {name}" for n, name in enumerate(trained.class_names))
  progress.say(f"{len(found)} cases, by {model}; classes in the masks: {classes}")
  if any(one.mask_name != one.case_id + one.ending for one in found):
    progress.say("masks of JPEG images are written as PNG, for JPEG would change class ids")
