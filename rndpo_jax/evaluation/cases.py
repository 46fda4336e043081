"""Predicted masks -> figures of every case, kept in files between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import provenance
from rndpo_jax.evaluation import metrics, predict, results
from rndpo_jax.runtime import files


def overlap_cases(evaluation: predict.Evaluation, step: int) -> list[results.Case]:
  """Pixel counts of every case after `step` steps, from `evaluate/curve-STEP.json` if known."""
  params = evaluation.params(step)
  path = evaluation.folder / f"curve-{step}.json"
  fingerprint = _fingerprint(evaluation, params)
  known = _read_partial(path, fingerprint)
  if known is None:
    case_of = {index: key for key, group in evaluation.groups.items() for index in group}
    size = evaluation.dataset.num_classes
    counts = {key: np.zeros((3, size), np.int64) for key in evaluation.groups}
    for index, mask in predict.predict(evaluation, params, sorted(case_of)):
      counts[case_of[index]] += metrics.pixel_counts(mask, evaluation.label(index), size)
    known = [
      {"split": split, "case_id": case_id, "counts": value.tolist()}
      for (split, case_id), value in counts.items()
    ]
    files.write_json(path, {"step": step, "fingerprint": fingerprint, "cases": known})
  return [
    results.Case(entry["split"], entry["case_id"], np.array(entry["counts"], np.int64))
    for entry in known
  ]


def surface_cases(
  evaluation: predict.Evaluation, step: int, cases: Sequence[results.Case]
) -> list[results.Case]:
  """`cases` with surface metrics, from `evaluate/surface-STEP.json` if known."""
  params = evaluation.params(step)
  path = evaluation.folder / f"surface-{step}.json"
  fingerprint = _fingerprint(evaluation, params, evaluation.tolerance)
  known = _read_partial(path, fingerprint)
  if known is None:
    found = dict(_surfaces(evaluation, params))
    known = [
      {"split": case.split, "case_id": case.case_id, "surface": found[case.split, case.case_id]}
      for case in cases
    ]
    files.write_json(path, {"step": step, "fingerprint": fingerprint, "cases": known})
  surface = {(entry["split"], entry["case_id"]): entry["surface"] for entry in known}
  return [case._replace(surface=surface[case.split, case.case_id]) for case in cases]


def _surfaces(evaluation: predict.Evaluation, params) -> Iterator[tuple[tuple[str, str], list]]:
  """Yields ((split, case id), surface metrics of each foreground class), case by case."""
  order = [(key, index) for key, group in evaluation.groups.items() for index in group]
  masks: dict[int, np.ndarray] = {}
  for (key, _), (index, mask) in zip(
    order, predict.predict(evaluation, params, [index for _, index in order]), strict=True
  ):
    masks[index] = mask
    group = evaluation.groups[key]
    if index != group[-1]:
      continue
    mask = stack_slices([masks.pop(i) for i in group])
    label = stack_slices([evaluation.label(i) for i in group])
    mask, label = metrics.without_ignored(mask, label)
    spacing = case_spacing(evaluation.dataset, group)
    yield (
      key,
      [
        metrics.surface_metrics(mask == c, label == c, spacing, evaluation.tolerance)
        for c in range(1, evaluation.dataset.num_classes)
      ],
    )


def stack_slices(slices: Sequence[np.ndarray]) -> np.ndarray:
  """The volume of a case's slices, along a new last axis; a single array stays as it is.

  Slices of different sizes are filled up with background at the far end of each axis.
  """
  if len(slices) == 1:
    return slices[0]
  shape = np.max([part.shape for part in slices], axis=0)
  fill = [[(0, n - m) for n, m in zip(shape, part.shape, strict=True)] for part in slices]
  return np.stack([np.pad(p, f) for p, f in zip(slices, fill, strict=True)], axis=-1)


def case_spacing(dataset, group: Sequence[int]) -> tuple[float, ...] | None:
  """Size of a voxel of the stacked case in mm; None, that is voxels, if any is unknown."""
  spacing = dataset.records[group[0]]["spacing"]
  if dataset.spacing_unit != "mm" or spacing is None:
    return None
  if len(group) == 1:
    return tuple(spacing)
  return (*spacing, dataset.records[group[0]]["slice_spacing"])


def _fingerprint(evaluation: predict.Evaluation, params, *more) -> str:
  """Of everything that the numbers hang on, so that no stale partial result is ever used."""
  dataset = evaluation.dataset
  cases = [[*key, indices] for key, indices in evaluation.groups.items()]
  grid = [list(dataset.size), list(dataset.crop), dataset.normalization]
  grid += [] if dataset.native is None else [dataset.native]
  grid += [{"mirror_axes": evaluation.mirror_axes}] if evaluation.mirror_axes else []
  setting = json.dumps([dataset.fingerprint, cases, dataset.num_classes, grid, more])
  return provenance.fingerprint(
    {"params": params, "setting": np.frombuffer(setting.encode(), np.uint8)}
  )


def _read_partial(path: epath.Path, fingerprint: str) -> list[dict[str, Any]] | None:
  if not path.exists():
    return None
  try:
    content = files.read_json(path)
  except ValueError:
    return None  # it is only a cache: measure again
  return content["cases"] if content.get("fingerprint") == fingerprint else None
