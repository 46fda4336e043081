"""Which cases are labelled, unlabelled, validation and test; always by group."""

from __future__ import annotations

import hashlib
import json
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
      splits, an empty split, or a case without masks in labelled, val or test.
  """
  content = records.read_json(path, f"expected an object with {', '.join(NAMES)}")
  if sorted(content) != sorted(NAMES):
    raise errors.DataError(
      f"{path}: found the keys {sorted(content)}, expected {sorted(NAMES)}, each a list of case ids"
    )
  groups = {entry["case_id"]: entry["group_id"] for entry in entries}
  bare = {entry["case_id"] for entry in entries if not entry["has_mask"]}
  seen: dict[str, str] = {}
  owner: dict[str, tuple[str, str]] = {}
  for name in NAMES:
    if not isinstance(content[name], list) or not content[name]:
      raise errors.DataError(f"{path}: {name!r} is no list of case ids, or an empty one")
    for case in content[name]:
      if case not in groups:
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
      if name != "unlabelled" and case in bare:
        raise errors.DataError(
          f"{path}: case {case!r} in {name!r} has a record without mask; move it to 'unlabelled'"
        )
  return {name: sorted(content[name]) for name in NAMES}


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
