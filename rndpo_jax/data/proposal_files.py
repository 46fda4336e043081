"""Proposals that a user already has: `DIR/NAME/ID.png`, and their scores in `DIR/scores.csv`.

Each NAME is a generator: another model, a fold, an older version, a manual draft. An image may lack
some of its masks. See `mask_files` for the masks themselves.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import csv_rows, file_checks, mask_files, native, tiles
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data.sources import folder as folder_source
from rndpo_jax.mining import judges, proposals

SAMPLER = "file"  # in config.proposals.mix
SCORES = "scores.csv"
_COLUMNS = ("image", "proposal", "score")


class ProposalFiles(NamedTuple):
  """What a folder of proposals holds.

  Attributes:
    names: F generators, in natural order; their order is that of the proposals.
    masks: generator -> image id -> file.
    grids: image id -> grid, of every image of the data set.
    scores: image id -> f32[F], NaN without a mask; None if no judge reads them.
    lines: (image id, generator) -> file and line of the score.
  """

  names: tuple[str, ...]
  masks: dict[str, dict[str, pathlib.Path]]
  grids: dict[str, mask_files.Grid]
  scores: dict[str, np.ndarray] | None
  lines: dict[tuple[str, str], str]


def count(config) -> int:
  """F, the proposals of an image that the config takes from files; 0 for none."""
  if config.data.preferences:
    return 0
  mix = proposals.parse_mix(config.proposals.mix)
  return sum(number for names, number in mix if SAMPLER in names)


def generators(config) -> dict[str, pathlib.Path]:
  """The folder of each generator of `config.data.proposals`, in natural order.

  Raises:
    DataError: if there is no such folder, or it has not as many folders as the mix says.
  """
  root = check_folder(config)
  folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
  names = {file_checks.check_text(path.name, str(path)): path for path in folders}
  wanted = count(config)
  if len(names) != wanted:
    found = ", ".join(sorted(names, key=folder_source.natural)[:8]) or "none"
    remedy = f"set {SAMPLER}:{len(names)}" if names else "put masks in DIR/NAME/ID.png"
    raise errors.DataError(
      f"{root}: {len(names)} folders of masks ({found}), but config.proposals.mix takes "
      f"{SAMPLER}:{wanted}, one an image and folder; {remedy}"
    )
  return {name: names[name] for name in sorted(names, key=folder_source.natural)}


def check_folder(config) -> pathlib.Path:
  """The folder `config.data.proposals`.

  Raises:
    DataError: if there is none.
  """
  root = config.data.proposals
  if "://" in root:
    raise errors.DataError(
      f"config.data.proposals: a bucket cannot be read, found {root!r}; mount it, and give that "
      "folder"
    )
  file_checks.check_text(root, "config.data.proposals")
  path = pathlib.Path(root).expanduser()
  if not path.is_dir():
    raise errors.DataError(
      f"config.data.proposals: {path}: no such folder; expected one with a folder of masks for "
      "each generator, as in DIR/NAME/ID.png"
    )
  return path


def open_files(config, entries: Sequence[Mapping[str, Any]]) -> ProposalFiles | None:
  """Lists the proposals and reads their scores; None if the config takes none from files.

  Args:
    config: the whole config.
    entries: of `records.json`.

  Raises:
    DataError: as `generators`; on a mask of an unknown image, or a score that is missing, no
      finite number, given twice, or of an unknown image or proposal, with file and line.
  """
  if not count(config):
    return None
  grids = mask_files.grids(entries)
  masks = {name: mask_files.listing(path) for name, path in generators(config).items()}
  for files in masks.values():
    for name, path in files.items():
      if name not in grids:
        raise errors.DataError(
          f"{path}: the data set has no image {name!r}; ids there look like {min(grids)!r}: rename "
          "or remove the mask"
        )
  found = ProposalFiles(tuple(masks), masks, grids, None, {})
  reads_scores = judges.FILE in (config.judge.name, *config.judge.compare)
  return _with_scores(found, check_folder(config) / SCORES) if reads_scores else found


def _with_scores(files: ProposalFiles, path: pathlib.Path) -> ProposalFiles:
  scores = {name: np.full(len(files.names), np.nan, np.float32) for name in files.grids}
  lines: dict[tuple[str, str], str] = {}
  for row in csv_rows.read(path, _COLUMNS):
    image, proposal = row.cells["image"], row.cells["proposal"]
    if image not in files.grids:
      raise errors.DataError(
        f"{row.where}: the data set has no image {image!r}; ids there look like "
        f"{min(files.grids)!r}: correct or remove the line"
      )
    if proposal not in files.masks:
      raise errors.DataError(
        f"{row.where}: no proposal {proposal!r}; {path.parent} has the folders "
        f"{', '.join(files.names)}: correct or remove the line"
      )
    if image not in files.masks[proposal]:
      raise errors.DataError(
        f"{row.where}: a score, but {path.parent / proposal} has no mask of the image {image!r}; "
        "add the mask or remove the line"
      )
    if (image, proposal) in lines:
      raise errors.DataError(
        f"{row.where}: a second score of the proposal {proposal!r} of {image!r}, beside "
        f"{lines[image, proposal]}; keep one"
      )
    lines[image, proposal] = row.where
    scores[image][files.names.index(proposal)] = _score(row)
  for proposal, masks in files.masks.items():
    for image, mask in masks.items():
      if (image, proposal) not in lines:
        raise errors.DataError(
          f"{path}: no score of {mask} (image {image!r}, proposal {proposal!r}); add a line, or "
          "remove the mask"
        )
  return files._replace(scores=scores, lines=lines)


def _score(row: csv_rows.Row) -> float:
  text = row.cells["score"]
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not abs(value) <= float(np.finfo(np.float32).max):
    raise errors.DataError(
      f"{row.where}: score {text[:40]!r}; expected a finite number, higher is better: correct it, "
      "or remove the line and the mask"
    )
  return value


def check(
  files: ProposalFiles, num_classes: int, affine_of: Callable[[int], np.ndarray] | None = None
) -> None:
  """Reads every mask, each process its share, and checks it as `mask_files.check`.

  Raises:
    DataError: naming the file, and the line of its score if that is read.
  """
  every = [
    (path, image, files.lines.get((image, name), ""))
    for name, masks in files.masks.items()
    for image, path in masks.items()
  ]
  own = every[jax.process_index() :: jax.process_count()]
  mask_files.check_all(own, files.grids, num_classes, affine_of)


def fingerprint(files: ProposalFiles) -> str:
  """SHA-256 of all that mining takes from them."""
  every = sorted((name, image) for name, masks in files.masks.items() for image in masks)
  scores = files.scores or {}
  facts = [(*key, repr(scores.get(key[1], np.zeros(0)).tolist())) for key in every]
  return mask_files.fingerprint(
    (files.masks[name][image] for name, image in every), repr((files.names, facts))
  )


def make_load(files: ProposalFiles, dataset) -> Callable[[int], types.FileProposals]:
  """index of a record -> its proposals on the model's grid, without a leading axis.

  The masks of a volume are kept while its slices are loaded one after another, and those of a
  record while its tiles are. In place of a mask that is missing stands the first one there, or
  background.

  Args:
    files: from `open_files`.
    dataset: by records or by tiles.
  """

  affine_of = dataset_lib.affine_of(tiles.whole(dataset))

  @functools.lru_cache(maxsize=1)
  def masks_of(image: str) -> list[np.ndarray | None]:
    return [
      mask_files.read(masks[image], files.grids[image], dataset.num_classes, affine_of)
      if image in masks
      else None
      for masks in files.masks.values()
    ]

  def image_of(record: int) -> str:
    return mask_files.image_id(tiles.whole(dataset).records[record])

  @functools.lru_cache(maxsize=1)
  def of_record(record: int) -> list[np.ndarray | None]:
    return [
      None if mask is None else mask_files.on_grid(mask, dataset, record)
      for mask in masks_of(image_of(record))
    ]

  def background(record: int) -> np.ndarray:
    if dataset.native is None:
      return np.zeros(dataset.size, np.uint8)
    spacing = tiles.whole(dataset).records[record]["spacing"]
    shape = native.model_shape(dataset.boxes[record], spacing, dataset.native.spacing)
    return np.zeros(shape, np.uint8)

  def load(index: int) -> types.FileProposals:
    record = tiles.record_of(dataset, index)
    image = image_of(record)
    found = of_record(record)
    present = np.array([mask is not None for mask in found])
    filling = next((mask for mask in found if mask is not None), None)
    filling = background(record) if filling is None else filling
    found = [filling if mask is None else mask for mask in found]
    masks = np.stack([tiles.part_of(dataset, index, mask) for mask in found])
    unscored = np.full(len(found), np.nan, np.float32)
    scores = unscored if files.scores is None else files.scores[image]
    return types.FileProposals(masks, present, scores)

  return load
