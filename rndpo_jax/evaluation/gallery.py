"""Test cases to look at: best, median and worst, by change of Dice and by Dice afterwards."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.evaluation import metrics, predict, results
from rndpo_jax.runtime import files

FILE = "gallery.npz"


def write(
  evaluation: predict.Evaluation,
  before: Sequence[results.Case],
  after: Sequence[results.Case],
  step: int,
) -> None:
  """Writes `evaluate/gallery.npz`.

  For entry N of `case_id` (str array, with `why`, `base_dice`, `finetuned_dice` beside it) it
  holds `image_N` [H, W, I] as it came and `label_N`, `base_N`, `finetuned_N` u8[H, W]. Of a
  volume, or a stack of slices, it is the slice with the most labelled foreground; the Dice
  values are the whole case's.

  Args:
    evaluation: from `predict.open_evaluation`.
    before: cases of the base.
    after: cases of the checkpoint at `step`.
    step: of the fine-tuned checkpoint to draw.
  """
  base_dice = {c.case_id: results.case_dice(c) for c in before if c.split == "test"}
  tuned_dice = {c.case_id: results.case_dice(c) for c in after if c.split == "test"}
  chosen = results.gallery_choice(base_dice, tuned_dice)
  indices = [_fullest_record(evaluation, evaluation.groups["test", case]) for case in chosen]
  masks = {
    name: dict(predict.predict(evaluation, evaluation.params(at), indices))
    for name, at in (("base", 0), ("finetuned", step))
  }
  arrays = {
    "case_id": np.array(list(chosen)),
    "why": np.array(list(chosen.values())),
    "base_dice": np.array([base_dice[case] for case in chosen]),
    "finetuned_dice": np.array([tuned_dice[case] for case in chosen]),
  }
  for n, index in enumerate(indices):
    label = _known(evaluation.label(index))
    z = None if label.ndim == 2 else results.fullest_slice(label)
    image = dataset_lib.load_native(evaluation.dataset, index, with_labels=False)["image"]
    arrays[f"image_{n}"] = image if z is None else image[:, :, z]
    arrays[f"label_{n}"] = label if z is None else label[..., z]
    for name, found in masks.items():
      arrays[f"{name}_{n}"] = found[index] if z is None else found[index][..., z]
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write_bytes(evaluation.folder / FILE, content.getvalue())


def _fullest_record(evaluation, group: Sequence[int]) -> int:
  """The record of the group with the most labelled foreground."""
  return max(group, key=lambda index: int((_known(evaluation.label(index)) > 0).sum()))


def _known(label: np.ndarray) -> np.ndarray:
  """The label with background where it is ignored."""
  return metrics.without_ignored(label, label)[1]
