"""Stage 'prepare': a source's files -> checked ArrayRecord files, `records.json`, `splits.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from etils import epath

from rndpo_jax import errors
from rndpo_jax.checks import config_validation
from rndpo_jax.data import (
  builder,
  native,
  native_settings,
  preference_file,
  proposal_files,
  records,
  sources,
  splits,
  tiles,
)
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.mining import judges
from rndpo_jax.pairs import shards
from rndpo_jax.runtime import files, multihost, progress


def run(config, workdir: epath.PathLike) -> None:
  """Prepares the data; returns at once if that is done.

  Headers and splits are checked before a pixel is read, and every pixel before anything
  counts as prepared: `splits.json`, then `data/records.json` are written last, by rename. A run
  that broke off goes on after the files of records that it finished. Every process lists the
  source, and reads its share of it.

  Raises:
    records.DataError: naming the file or key, what was found, and the remedy.
    errors.ConfigError: if the splits lack the validation cases that the config needs.
    OSError: if the work directory cannot be written.
  """
  workdir = epath.Path(workdir)
  directory = workdir / "data"
  if multihost.broadcast(lambda: is_done(workdir)):
    return
  if multihost.is_first():
    for path in (directory / records.FILE, workdir / splits.FILE):
      path.unlink(missing_ok=True)  # of a run that broke off
  source = sources.SOURCES[config.data.source].open(config)
  if multihost.is_first():
    for note in source.notes:
      progress.say(f"[prepare] {note}")
  parts = split_cases(config.data, source.records)
  if not parts["val"]:
    config_validation.check_without_cases(config)
  blind = set(parts["unlabelled"])
  unlabelled = [i for i, entry in enumerate(source.records) if entry["case_id"] in blind]
  shards.check_num_shards(config, len(unlabelled))
  check_truth(config, source.records, unlabelled)
  check_files(config, source.records, parts, source.num_classes)
  chosen = native_settings.choose(config, source, parts["labelled"])
  if multihost.is_first():
    for note in chosen.notes:
      progress.say(f"[prepare] {note}")
  source = native.of_source(source, chosen.native)
  written = builder.build(source, directory)
  if multihost.is_first():
    pixels = [one["pixels_fingerprint"] for one in written]
    files.write_json(workdir / splits.FILE, parts)
    facts = [pixels, source.num_classes, splits.sha256(parts)]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    boxes = [box for one in written for box in one.get("boxes", ())]
    records.write(directory, source, fingerprint, splits.sha256(parts), boxes)


def check_truth(config, entries: Sequence[dict], unlabelled: Sequence[int]) -> None:
  """Refuses a judge that is handed true scores where unlabelled records have no mask.

  Raises:
    records.DataError: naming the first such record.
  """
  if not judges.needs(config.judge.name, "labels"):
    return
  for index in unlabelled:
    if not entries[index]["has_mask"]:
      raise errors.DataError(
        f"config.judge.name: {config.judge.name!r} needs the truth of every unlabelled image, and "
        f"{entries[index]['record_id']!r} has no mask; take another judge, or add its mask"
      )


def check_files(config, entries: Sequence[dict], parts: dict, num_classes: int) -> None:
  """Reads the proposals or preferences that come from files, long before mining needs them.

  Args:
    config: the whole config.
    entries: of `records.json`.
    parts: case ids of each split.
    num_classes: C.

  Raises:
    records.DataError: with the file, and the line that named it.
  """
  if config.data.preferences:
    split_of = {case: split for split, cases in parts.items() for case in cases}
    found, grids = preference_file.read(config, entries, split_of)
    preference_file.check(found, grids, num_classes)
    return
  proposed = proposal_files.open_files(config, entries)
  if proposed is not None:
    proposal_files.check(proposed, num_classes)


def open_proposals(config, dataset) -> proposal_files.ProposalFiles | None:
  """The proposals from files, each read once to see that it can be used; None if the mix has none.

  Raises:
    errors.DataError: naming the file, and the line that named it.
  """
  found = proposal_files.open_files(config, tiles.whole(dataset).records)
  if found is None:
    return None
  proposal_files.check(found, dataset.num_classes, dataset_lib.affine_of(dataset))
  if multihost.is_first() and config.judge.name == judges.FILE:
    samplers = [entry for entry in config.proposals.mix.split(",") if judges.FILE not in entry]
    if samplers:
      progress.say(
        f"judge {judges.FILE!r}: the proposals of {', '.join(samplers)} have no score in a file, "
        "so no pair is made of them"
      )
  return found


def is_done(workdir: epath.Path) -> bool:
  """Whether both files that end the stage are there and can be read."""
  try:
    records.read(workdir / "data")
    splits.read(workdir)
  except errors.DataError:
    return False
  return True


def split_cases(data, entries: Sequence[dict]) -> dict[str, list[str]]:
  """Case ids of each split, drawn or read from `config.data.split_file`.

  Args:
    data: `config.data`.
    entries: of `records.json`.

  Raises:
    records.DataError: if they cannot be split so.
  """
  if data.split_file and data.split_fold < 0:
    return splits.read_split_file(epath.Path(data.split_file), entries)
  if data.split_file:
    return splits.read_fold(
      epath.Path(data.split_file),
      entries,
      fold=data.split_fold,
      num_labelled=data.num_labelled,
      num_test=data.num_test,
      num_unlabelled=data.num_unlabelled,
      seed=data.split_seed,
    )
  return splits.make_splits(
    entries,
    num_labelled=data.num_labelled,
    num_val=data.num_val,
    num_test=data.num_test,
    num_unlabelled=data.num_unlabelled,
    seed=data.split_seed,
  )
