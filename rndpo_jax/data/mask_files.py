"""Masks that a user brings beside a prepared data set: `ID.png`, `ID.nii.gz` and the like.

ID is the id of the image: of a record or, if a volume's slices are records, that of the volume. A
mask is on the image's own grid and holds the class ids of the data set. It is read as the label of
a case is, in any format that those have.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import file_checks, geometry, native, tiles
from rndpo_jax.data.sources import cases, dicom_seg, images
from rndpo_jax.runtime import threads

# Overlooking one of these would drop a mask without a word; nnU-Net writes JSON, NPZ and PKL files
# beside its masks, which are none.
_UNREADABLE = (*cases.LOSSY, ".gif", ".webp", ".ima", ".npy", ".hdr", ".img")
_MAX_SHIFT = 0.25  # voxels, as between the files of a case


class Grid(NamedTuple):
  """The grid that the masks of an image are on.

  Attributes:
    shape: of the mask: that of the record, with the number of slices if they are records.
    first: index of the image's first record.
  """

  shape: tuple[int, ...]
  first: int


def image_id(entry: Mapping[str, Any]) -> str:
  """The id that an image's masks are named by, of an entry of `records.json`."""
  is_slice = entry["record_id"] == f"{entry['case_id']}#z{entry['slice']:03d}"
  return entry["case_id"] if is_slice else entry["record_id"]


def grids(entries: Sequence[Mapping[str, Any]]) -> dict[str, Grid]:
  """The grid of each image, by its id."""
  found: dict[str, Grid] = {}
  slices: dict[str, int] = {}
  for index, entry in enumerate(entries):
    name = image_id(entry)
    if name != entry["record_id"]:
      slices[name] = slices.get(name, 0) + 1
    found.setdefault(name, Grid(tuple(entry["shape"]), index))
  return {
    name: grid._replace(shape=(*grid.shape, slices[name])) if name in slices else grid
    for name, grid in found.items()
  }


def stem(name: str) -> str | None:
  """A mask file's name without its ending; None if that is no format of masks."""
  stem, ending = cases.split_name(name)
  return stem if ending.lower() in cases.MASKS else None


def listing(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The mask file of each id in a folder.

  Raises:
    DataError: on two files of one id, or a file that may be a mask and cannot be read as one.
  """
  found: dict[str, pathlib.Path] = {}
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      continue
    if path.suffix.lower() in _UNREADABLE:
      raise errors.DataError(
        f"{path}: not a format that masks are taken in; expected {', '.join(cases.MASKS)}; "
        "convert or remove it"
      )
    name = stem(path.name)
    if name is None:
      continue
    file_checks.check_regular(path)
    name = file_checks.check_text(name, str(path))
    if name in found:
      raise errors.DataError(
        f"{path}: second mask of the id {name!r}, beside {found[name].name}; keep one"
      )
    found[name] = path
  return found


def check(
  path: pathlib.Path,
  grid: Grid,
  num_classes: int,
  affine_of: Callable[[int], np.ndarray] | None = None,
  where: str = "",
) -> np.ndarray:
  """Reads a mask and checks that it is on its image's grid.

  Args:
    path: of the mask.
    grid: of its image.
    num_classes: C.
    affine_of: index of a record -> its affine; None leaves the check of the mask's place out.
    where: file and line that named the mask, for the message.

  Returns:
    u8[*grid.shape].

  Raises:
    DataError: naming the file, if it cannot be read, holds another value than 0..C-1, or is of
      another size or place.
  """
  try:
    has_place = cases.split_name(path.name)[1].lower() not in cases.PICTURES
    known = affine_of is not None and has_place
    affine = np.asarray(affine_of(grid.first), np.float64) if known else np.eye(4)
    found = cases.open_mask(path, grid.shape, affine)
    _check_place(path, grid, found, affine)
    if found.read_ids is not None:
      return found.read_ids(num_classes)
    return images.class_ids(found.read(False), num_classes, str(path))
  except errors.DataError as error:
    raise errors.DataError(f"{where}: {error}" if where else str(error)) from error


def _check_place(path, grid: Grid, found, affine: np.ndarray) -> None:
  if found.shape != grid.shape:
    raise errors.DataError(
      f"{path}: a mask of {found.shape} pixels for an image of {grid.shape}; expected the same "
      "size: bring it to the image's own grid, or remove it"
    )
  if np.array_equal(affine, np.eye(4)):  # which says that the image's place is unknown
    return
  shift = geometry.grid_shift(affine, found.affine, grid.shape)
  if shift > _MAX_SHIFT:
    raise errors.DataError(
      f"{path}: its header places voxels up to {shift:.3g} voxels away from where the image's "
      "does; bring it to the image's own grid, or remove it"
    )


def read(
  path: pathlib.Path, grid: Grid, num_classes: int, affine_of: Callable[[int], np.ndarray]
) -> np.ndarray:
  """`check` again of a mask that passed: its place is asked for only by a DICOM segmentation."""
  is_segmentation = path.suffix.lower() in dicom_seg.ENDINGS
  return check(path, grid, num_classes, affine_of if is_segmentation else None)


def check_all(
  files: Iterable[tuple[pathlib.Path, str, str]],
  grids_of: Mapping[str, Grid],
  num_classes: int,
  affine_of: Callable[[int], np.ndarray] | None = None,
) -> None:
  """`check` of many (path, image id, file and line that named it), on several threads."""

  def one(item):
    path, name, where = item
    check(path, grids_of[name], num_classes, affine_of, where)

  for _ in threads.in_order(one, files):
    pass


def fingerprint(paths: Iterable[pathlib.Path], more: str) -> str:
  """SHA-256 of the files' bytes, in their order, and of `more`; their places do not count."""

  def one(path):
    found = b""
    for part in cases.files_of(path):
      with open(part, "rb") as file:
        found += hashlib.file_digest(file, "sha256").digest()
    return found

  whole = hashlib.sha256(more.encode())
  for digest in threads.in_order(one, paths):
    whole.update(digest)
  return whole.hexdigest()


def on_grid(mask: np.ndarray, dataset, record: int) -> np.ndarray:
  """The part of a mask that is a record's, on the model's grid as labels are brought there.

  Args:
    mask: u8[*S] of the record, or of the volume that it is a slice of.
    dataset: by records or by tiles; its grid, and the records' boxes, are read.
    record: index of the record; in the native mode its box is not empty.

  Returns:
    u8[*size], or in the native mode u8[*M] of the whole record.
  """
  entry = tiles.whole(dataset).records[record]
  if image_id(entry) != entry["record_id"]:
    mask = mask[..., entry["slice"]]
  if dataset.native is None:
    return geometry.mask_to_model(mask, dataset.size, dataset.crop)
  return native.mask_to_spacing(
    mask, dataset.boxes[record], entry["spacing"], dataset.native, dataset.num_classes
  )
