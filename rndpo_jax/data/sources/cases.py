"""A case of several files, of any format: headers checked to be of one grid, spacing, pixels.

A reader of a format is one row of `_READERS`.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rndpo_jax import errors, types
from rndpo_jax.data import geometry, records
from rndpo_jax.data.sources import images, itk, nifti, volume

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd")
PICTURES = (".png", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")  # images alone: JPEG changes class ids
ENDINGS = (*NIFTI, *ITK, *PICTURES)  # of images and labels
_READERS: dict[str, Callable[[pathlib.Path], volume.Volume]] = {
  **dict.fromkeys(NIFTI, nifti.open_file),
  **dict.fromkeys(ITK, itk.open_file),
  **dict.fromkeys((*PICTURES, *LOSSY), images.open_file),
}
# Voxels that two files of a case may lie apart: more than the rounding of a header's float32
# numbers makes of a large image, and less than training would notice.
_MAX_SHIFT = 0.25


class Case(NamedTuple):
  """A case, its headers read.

  Attributes:
    channels: its files, in order.
    label: the file of its mask, if there is one.
    shape: S, of 2 or 3 axes.
    num_channels: I, of all files together.
    spacing: mm an axis, None if a header holds no positive number.
    affine: f64[4, 4], of the first file.
    unit: of the first header.
    eight_bit: whether all images are bytes.
  """

  channels: list[pathlib.Path]
  label: pathlib.Path | None
  shape: tuple[int, ...]
  num_channels: int
  spacing: tuple[float, ...] | None
  affine: np.ndarray
  unit: str
  eight_bit: bool


def split_name(name: str) -> tuple[str, str]:
  """(stem, ending) of a file's name, '.nii.gz' being one ending."""
  ending = next((e for e in NIFTI if name.lower().endswith(e)), pathlib.Path(name).suffix)
  return (name[: -len(ending)], name[-len(ending) :]) if ending else (name, "")


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold an image or label: itself, and of .mhd that of its voxels.

  Raises:
    errors.DataError: if one is missing.
  """
  return itk.data_files(path) if split_name(path.name)[1].lower() in ITK else [path]


def open_file(path: pathlib.Path) -> volume.Volume:
  """Reads a file's header.

  Raises:
    errors.DataError: if its name's ending is of no format that is read, or its header cannot be
      used.
  """
  reader = _READERS.get(split_name(path.name)[1].lower())
  if reader is None:
    raise errors.DataError(
      f"{path}: not a format that is read; expected {', '.join(_READERS)}; convert or remove it"
    )
  return reader(path)


def open_case(channels, label, spatial_dims: int) -> Case:
  """Reads the headers of a case's files, and checks that they are of one grid.

  Args:
    channels: files of its images, in order.
    label: file of its mask, or None.
    spatial_dims: of a record; a volume's slices are records of 2 dimensions.

  Raises:
    errors.DataError: naming the file, what was found and the remedy.
  """
  opened = [open_file(path) for path in channels]
  first = opened[0]
  if len(first.shape) not in (2, 3) or len(first.shape) < spatial_dims:
    raise errors.DataError(
      f"{channels[0]}: {len(first.shape)} dimensions, {first.shape}; "
      f"config.data.spatial_dims={spatial_dims} takes "
      f"{'images or volumes, slice by slice' if spatial_dims == 2 else 'volumes'}; split time "
      "points or channels into files of their own, or change spatial_dims"
    )
  if label is not None and split_name(label.name)[1].lower() in LOSSY:
    raise errors.DataError(f"{label}: JPEG changes class ids; expected a mask as PNG")
  others = list(zip(channels[1:], opened[1:], strict=True))
  for path, other in [*others, *([(label, open_file(label))] if label else [])]:
    _check_grid(path, other, channels[0], first)
  return Case(
    channels=channels,
    label=label,
    shape=first.shape,
    num_channels=sum(one.num_channels for one in opened),
    spacing=first.spacing,
    affine=first.affine,
    unit=first.unit,
    eight_bit=all(one.eight_bit for one in opened),
  )


def _check_grid(path, found: volume.Volume, first, expected: volume.Volume) -> None:
  """Refuses a file that is not on the grid of its case's first channel."""
  remedy = f"resample one of the two to the other's grid, or take {path.name} away"
  if found.shape != expected.shape:
    raise errors.DataError(
      f"{path}: {found.shape} voxels, but {first} has {expected.shape}; expected the same, {remedy}"
    )
  shift = geometry.grid_shift(expected.affine, found.affine, expected.shape)
  if shift <= _MAX_SHIFT:
    return
  pairs = zip(_describe(found.affine), _describe(expected.affine), strict=True)
  words = [f"{here} against {there}" for here, there in pairs if here != there]
  raise errors.DataError(
    f"{path}: its header places voxels up to {shift:.3g} voxels away from where {first} places "
    f"them ({', '.join(words)}), expected the same; {remedy}, or, if the voxels do match and "
    "one header is wrong, copy the affine of the right one"
  )


def _describe(affine) -> list[str]:
  """Origin, spacing and direction cosines of an affine, as text."""
  edges = np.linalg.norm(affine[:3, :3], axis=0)
  cosines = affine[:3, :3] / np.where(edges > 0, edges, 1)
  parts = {"origin": affine[:3, 3], "spacing": edges, "directions": cosines.T}
  return [f"{name} {(np.round(value, 4) + 0.0).tolist()}" for name, value in parts.items()]


def notes_of_headers(cases: Sequence[Case]) -> Iterator[str]:
  """What the headers leave open or contradict, each once with its first file."""
  unitless = [case for case in cases if case.unit == "unknown" and case.spacing is not None]
  if unitless:
    yield (
      f"{unitless[0].channels[0]}: the header names no unit ({len(unitless)} of {len(cases)} "
      "cases); taken as mm, as nnU-Net and ITK do"
    )
  unknown = [case for case in cases if case.spacing is None]
  if unknown:
    yield (
      f"{unknown[0].channels[0]}: the header gives no spacing ({len(unknown)} of {len(cases)} "
      "cases); distances of the whole data set are in voxels"
    )
  differ = [case for case in cases if not _agree(case)]
  if differ:
    there = [round(edge, 6) for edge in _affine_spacing(differ[0]).tolist()]
    yield (
      f"{differ[0].channels[0]}: pixdim gives the spacing {list(differ[0].spacing)} mm, the affine "
      f"{there} ({len(differ)} of {len(cases)} cases); pixdim is taken, as ITK does"
    )


def _agree(case: Case) -> bool:
  """Whether pixdim and the affine give the same spacing, up to the rounding of a header."""
  return case.spacing is None or np.allclose(case.spacing, _affine_spacing(case), rtol=1e-3)


def _affine_spacing(case: Case) -> np.ndarray:
  """mm an axis."""
  return np.linalg.norm(case.affine[:3, : len(case.shape)], axis=0) * nifti.MM[case.unit]


def read_case(
  case: Case, spatial_dims: int, num_classes: int, has_ignored: bool
) -> Iterator[records.Pixels]:
  """Reads every file of a case once, and yields its records.

  Args:
    case: from `open_case`.
    spatial_dims: of a record.
    num_classes: C.
    has_ignored: whether the id C in the label's file means `types.IGNORED`.

  Raises:
    DataError: if a file cannot be read, or the label holds other values or no class at all.
  """
  image = np.concatenate([_pixels(path, case) for path in case.channels], axis=-1)
  mask = None
  if case.label is not None:
    ids = _class_ids(case, num_classes + has_ignored)
    mask = np.where(ids == num_classes, np.uint8(types.IGNORED), ids) if has_ignored else ids
    if (mask == types.IGNORED).all():
      raise errors.DataError(
        f"{case.label}: every voxel is ignored, so the case has no truth; take the file away, "
        "which makes the case unlabelled"
      )
  paths = (str(case.channels[0]), str(case.label))
  if len(case.shape) == spatial_dims:
    yield records.Pixels(image, mask, case.affine, *paths)
    return
  for z in range(case.shape[2]):
    origin = case.affine.copy()
    origin[:, 3] += z * case.affine[:, 2]  # voxel (i, j) of this slice
    part = None if mask is None else np.ascontiguousarray(mask[:, :, z])
    yield records.Pixels(np.ascontiguousarray(image[:, :, z]), part, origin, *paths)


def _pixels(path: pathlib.Path, case: Case) -> np.ndarray:
  """[*S, I of the file]: uint8 if the whole case is, float32 otherwise."""
  found = _opened_again(path, case)
  return found.read(case.eight_bit and found.eight_bit).reshape(*case.shape, found.num_channels)


def _class_ids(case: Case, num_ids: int) -> np.ndarray:
  found = _opened_again(case.label, case)
  if found.read_ids is not None:
    return found.read_ids(num_ids)
  return images.class_ids(found.read(False), num_ids, str(case.label))


def _opened_again(path: pathlib.Path, case: Case) -> volume.Volume:
  found = open_file(path)
  if found.shape != case.shape:
    raise errors.DataError(
      f"{path}: {found.shape} voxels now, {case.shape} when it was listed; let the files rest, and "
      "run the same command again"
    )
  return found


def make_source(
  data, cases: Mapping[str, Case], class_names: list[str], *, has_ignored=False, notes=()
) -> records.Source:
  """The source of some cases, whose notes on headers are added to `notes`.

  Args:
    data: `config.data`.
    cases: by case id, in the order of the records.
    class_names: one a class, background first.
    has_ignored: whether the id C in a label means `types.IGNORED`.
    notes: on what else the source found.
  """
  known = all(case.spacing is not None for case in cases.values())
  entries = [entry for name, case in cases.items() for entry in _entries(data, name, case, known)]

  def read(start: int) -> Iterator[records.Pixels]:
    for name, group in itertools.groupby(entries[start:], key=lambda entry: entry["case_id"]):
      sliced = next(group)["slice"]
      pixels = read_case(cases[name], data.spatial_dims, len(class_names), has_ignored)
      yield from itertools.islice(pixels, max(sliced, 0), None)

  def fingerprint(place: int) -> str:
    case = cases[entries[place]["case_id"]]
    named = [*case.channels, *([case.label] if case.label else [])]
    return records.file_fingerprint(*itertools.chain.from_iterable(map(files_of, named)))

  return records.Source(
    name=data.name,
    num_classes=len(class_names),
    class_names=class_names,
    has_ignored=has_ignored,
    num_channels=next(iter(cases.values())).num_channels,
    spatial_dims=data.spatial_dims,
    spacing_unit="mm" if known else "voxel",
    dtype="uint8" if all(case.eight_bit for case in cases.values()) else "float32",
    records=entries,
    read=read,
    fingerprint=fingerprint,
    notes=(*notes, *notes_of_headers(list(cases.values()))),
  )


def _entries(data, name: str, case: Case, known: bool) -> Iterator[dict[str, Any]]:
  group = records.extract(data.group_pattern, name, "group_pattern")
  dims = data.spatial_dims
  sliced = len(case.shape) > dims
  for index in range(case.shape[2]) if sliced else (-1,):
    yield records.record(
      record_id=f"{name}#z{index:03d}" if sliced else name,
      case_id=name,
      group_id=group,
      slice_index=index,
      shape=case.shape[:dims],
      spacing=case.spacing[:dims] if known else None,
      slice_spacing=case.spacing[2] if known and sliced else None,
      has_mask=case.label is not None,
    )
