"""Masks by a network of a work directory, which takes images on its own grid."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rndpo_jax import models
from rndpo_jax.data import loader
from rndpo_jax.evaluation import predict
from rndpo_jax.predict import case_files, case_reader, programs, score_table
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.predict.job import KEPT, Job, Options, read_ahead
from rndpo_jax.runtime import preemption, sharding

_WAITING_BATCHES = 4  # that records wait for others of their size, in batches


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


def job(trained: trained_lib.Trained, options: Options) -> Job:
  """The network as `run.run` takes it; compiles nothing yet."""
  predictor = make_predictor(trained, options)

  def predict_all(sources, on_broken):
    read = functools.partial(case_reader.read, trained=trained)
    return predicted(predictor, read_ahead(read, sources, options.workers, on_broken))

  return Job(
    num_channels=trained.num_channels,
    class_names=tuple(trained.class_names),
    title=f"the checkpoint of step {trained.step}" if trained.step else "the base",
    settings={"step": trained.step},
    params=trained.params,
    predicted=predict_all,
  )


def make_predictor(trained: trained_lib.Trained, options: Options) -> Predictor:
  """What `predicted` needs; compiles nothing yet."""
  config = trained.config
  segmenter = models.build(
    config.model, num_classes=trained.num_classes, spatial_dims=trained.spatial_dims
  )
  apply, to_masks = predict.programs(segmenter, mirror=options.mirror)
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
    preemption.check(KEPT)
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
