"""Which cases are labelled, unlabelled, validation and test; always by group."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import errors
from rndpo_jax.data import records

FILE = "splits.json"
NAMES = ("labelled", "unlabelled", "val", "test")


def make_splits(
  entries: list[dict[str, Any]], *, num_labelled: int, num_val: int, num_test: int,
  num_unlabelled: int, seed: int,
) -> dict[str, list[str]]:  # fmt: skip
  """Draws the splits, by group, from a seed.

  Test is drawn first, then validation, then labelled, so that asking for more labels changes
  neither test nor validation and keeps the labels already drawn. Groups with a record that has
  no mask are unlabelled always.

  Args:
    entries: of `records.json`.
    num_labelled: groups; num_val and num_test likewise.
    num_unlabelled: groups, -1 for all that are left.
    seed: of the draw.

  Returns:
    Sorted case ids of each split.

  Raises:
    records.DataError: if there are fewer groups than asked for.
  """
  cases, masked = _groups(entries)
  groups = sorted(cases)
  order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
  full = [group for group in order if masked[group]]
  needed = num_test + num_val + num_labelled
  if needed > len(full):
    raise errors.DataError(
      f"config.data: num_labelled={num_labelled}, num_val={num_val} and num_test={num_test} ask "
      f"for {needed} groups with masks, found {len(full)} of {len(groups)}; lower them or add "
      "masks"
    )
  test, val = full[:num_test], full[num_test : num_test + num_val]
  labelled = full[num_test + num_val : needed]
  taken = {*test, *val, *labelled}
  rest = [group for group in order if group not in taken]
  if num_unlabelled > len(rest) or (not rest and num_unlabelled != 0):
    raise errors.DataError(
      f"config.data.num_unlabelled: found {num_unlabelled}, but {len(rest)} groups are left "
      "after labelled, val and test; lower those counts or add images"
    )
  unlabelled = rest if num_unlabelled < 0 else rest[:num_unlabelled]
  chosen = dict(zip(NAMES, (labelled, unlabelled, val, test), strict=True))
  return {
    name: sorted(case for group in part for case in cases[group]) for name, part in chosen.items()
  }


def _groups(entries) -> tuple[dict[str, set[str]], dict[str, bool]]:
  """Case ids of each group, and whether every record of the group has a mask."""
  cases: dict[str, set[str]] = {}
  masked: dict[str, bool] = {}
  for entry in entries:
    group = entry["group_id"]
    cases.setdefault(group, set()).add(entry["case_id"])
    masked[group] = masked.get(group, True) and entry["has_mask"]
  return cases, masked


def read_split_file(path: epath.Path, entries: list[dict[str, Any]]) -> dict[str, list[str]]:
  """Reads the splits that the user gives, and checks them against the records.

  Args:
    path: JSON object with the keys labelled, unlabelled, val and test, each a list of case ids.
    entries: of `records.json`.

  Raises:
    records.DataError: on a missing or unknown key, an unknown case, a case or a group in two
      splits, an empty split but val or test, or a case without masks in labelled, val or test.
  """
  content = records.read_json(
    path,
    f"an object has {', '.join(NAMES)}, each a list of case ids; of nnU-Net's splits_final.json, a "
    "list, name the fold by config.data.split_fold",
  )
  if sorted(content) != sorted(NAMES):
    raise errors.DataError(
      f"{path}: found the keys {sorted(content)}, expected {sorted(NAMES)}, each a list of case ids"
    )
  content = {name: _composed(cases) for name, cases in content.items()}
  _check(path, content, entries, may_be_empty=("val", "test"))
  return {name: sorted(content[name]) for name in NAMES}


def read_fold(
  path: epath.Path, entries: list[dict[str, Any]], *, fold: int, num_labelled: int, num_test: int,
  num_unlabelled: int, seed: int,
) -> dict[str, list[str]]:  # fmt: skip
  """Splits along a fold of nnU-Net's `splits_final.json`.

  What the fold holds out, `val`, is never trained on: groups for the test are drawn from it, all
  others are for validation. So a base that nnU-Net trained on this fold is judged by cases that it
  has not seen. The labelled groups are drawn from `train`. All else is unlabelled: the rest of
  `train`, and the cases that the fold does not list, as those of imagesTs.

  Args:
    path: JSON list of objects, each with `train` and `val`, lists of case ids.
    entries: of `records.json`.
    fold: place in the list.
    num_labelled: groups, as num_test and num_unlabelled (-1 for all).
    seed: of the draws.

  Raises:
    records.DataError: on a file that is no such list, an unknown or double case, a group in two
      splits, a held-out case without masks, or fewer groups than asked for.
  """
  train, held_out = _fold(path, fold, entries)
  held_entries = [entry for entry in entries if entry["case_id"] in held_out]
  others = [
    {**entry, "has_mask": entry["has_mask"] and entry["case_id"] in train}
    for entry in entries
    if entry["case_id"] not in held_out
  ]
  groups = sorted(_groups(held_entries)[0])
  if num_test >= len(groups):
    raise errors.DataError(
      f"config.data.num_test: found {num_test}, but the fold {fold} of {path} holds out "
      f"{len(groups)} groups, of which validation needs one or more; lower it"
    )
  order = np.random.default_rng(seed).permutation(len(groups))
  test = {groups[i] for i in order[:num_test]}
  drawn = make_splits(
    others, num_labelled=num_labelled, num_val=0, num_test=0, num_unlabelled=num_unlabelled,
    seed=seed,
  )  # fmt: skip
  owner = {entry["case_id"]: entry["group_id"] for entry in held_entries}
  drawn |= {
    "test": sorted(case for case, group in owner.items() if group in test),
    "val": sorted(case for case, group in owner.items() if group not in test),
  }
  _check(path, drawn, entries)
  return {name: drawn[name] for name in NAMES}


def _fold(path: epath.Path, fold: int, entries) -> tuple[set[str], set[str]]:
  """Case ids that a fold trains on and holds out, checked."""
  remedy = "config.data.split_fold names a fold of nnU-Net's splits_final.json, a list of folds"
  folds = records.read_json(path, f"{remedy}; for splits of your own leave it at -1", list)
  if fold >= len(folds):
    raise errors.DataError(
      f"{path}: {len(folds)} folds, but config.data.split_fold is {fold}; expected 0 to "
      f"{len(folds) - 1}"
    )
  parts = folds[fold] if isinstance(folds[fold], dict) else {}
  parts = {name: _composed(parts.get(name)) for name in ("train", "val")}
  _check(path, parts, entries, ("train",))
  rest = sorted({entry["case_id"] for entry in entries} - set(parts["val"]))
  _check(
    path, {"val": parts["val"], "train or not listed": rest}, entries, ("train or not listed",)
  )
  return set(parts["train"]), set(parts["val"])


def _composed(cases: Any) -> Any:
  """Case ids in Unicode's composed form, as sources have them; what is no list of them as it is."""
  if not isinstance(cases, list):
    return cases
  return [unicodedata.normalize("NFC", case) if isinstance(case, str) else case for case in cases]


def _check(path, parts, entries, may_lack_masks=("unlabelled",), may_be_empty=()) -> None:
  """Refuses splits with unknown or double cases, groups in two, or without masks."""
  groups = {entry["case_id"]: entry["group_id"] for entry in entries}
  bare = {entry["case_id"] for entry in entries if not entry["has_mask"]}
  seen: dict[str, str] = {}
  owner: dict[str, tuple[str, str]] = {}
  for name, cases in parts.items():
    if not isinstance(cases, list) or not (cases or name in may_be_empty):
      raise errors.DataError(f"{path}: {name!r} is no list of case ids, or an empty one")
    for case in cases:
      if not isinstance(case, str) or case not in groups:
        raise errors.DataError(
          f"{path}: unknown case id {case!r} in {name!r}; ids here look like {min(groups)!r}"
        )
      if case in seen:
        raise errors.DataError(
          f"{path}: case {case!r} stands in {seen[case]!r} and in {name!r}; keep one"
        )
      seen[case] = name
      other, first = owner.setdefault(groups[case], (name, case))
      if other != name:
        raise errors.DataError(
          f"{path}: cases {first!r} ({other}) and {case!r} ({name}) are of one group, "
          f"{groups[case]!r}; keep them in one split, or change config.data.group_pattern"
        )
      if name not in may_lack_masks and case in bare:
        raise errors.DataError(
          f"{path}: case {case!r} in {name!r} has a record without mask; move it to 'unlabelled'"
        )


def sha256(parts: dict[str, list[str]]) -> str:
  """Hexadecimal SHA-256 of the splits, in whatever order their ids are."""
  content = json.dumps({name: sorted(parts[name]) for name in NAMES})
  return hashlib.sha256(content.encode()).hexdigest()


def read(workdir: epath.Path) -> dict[str, list[str]]:
  """Reads `splits.json` as the stage 'prepare' wrote it.

  Raises:
    records.DataError: if it is missing, is no JSON, or lacks a split.
  """
  path = workdir / FILE
  content = records.read_json(path, "run the stage 'prepare' again")
  missing = [name for name in NAMES if not isinstance(content.get(name), list)]
  if missing:
    raise errors.DataError(
      f"{path}: lacks {missing[0]!r}; remove it and run the stage 'prepare' again"
    )
  return content
