"""An nnU-Net raw folder: `dataset.json`, `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`.

The layout is that of nnU-Net (Isensee et al., Nature Methods 2021), version 2 and 1. Channels
CASE_0000, CASE_0001 ... are stacked. Cases without a label file, and those in `imagesTs`, are
unlabelled. With two spatial dimensions each slice along a volume's last axis is a record. Read
with nibabel, the field's standard reader: it knows the header's scaling, units and axes.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import nibabel
import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import geometry, records
from rndpo_jax.data.sources import folder, images

_ENDINGS = (".nii.gz", ".nii")
# Voxels that two files of a case may lie apart: more than the rounding of a header's float32
# numbers makes of a large image, and less than training would notice.
_MAX_SHIFT = 0.25
_MM = {"mm": 1.0, "meter": 1e3, "micron": 1e-3}
_BROKEN = (
  OSError,  # gzip's BadGzipFile among them
  EOFError,
  ValueError,
  zlib.error,
  nibabel.filebasedimages.ImageFileError,
  nibabel.spatialimages.HeaderDataError,
)


class _Case(NamedTuple):
  channels: list[pathlib.Path]
  label: pathlib.Path | None
  shape: tuple[int, ...]  # of 2 or 3 axes
  spacing: tuple[float, ...] | None  # mm an axis
  eight_bit: bool


def open_source(config) -> records.Source:
  """The nnU-Net folder `config.data.root`, from `dataset.json`, file names and headers.

  Raises:
    records.DataError: on a missing folder or file, a `dataset.json` that is not understood, a
      file without readable header, a label without image, a missing channel, sizes or affines
      that differ within a case, or dimensions that do not fit config.data.spatial_dims.
  """
  data = config.data
  if data.case_pattern:
    raise errors.DataError(
      f"config.data.case_pattern: found {data.case_pattern!r}, but an nnU-Net folder names its "
      "cases; leave it empty (group_pattern groups the cases of a patient)"
    )
  root = folder.check_root(data.root)
  info = records.read_json(root / "dataset.json", "expected nnU-Net's description of the data set")
  names = _class_names(root, info)
  if data.num_classes not in (0, len(names)):
    raise errors.DataError(
      f"config.data.num_classes: found {data.num_classes}, but {root / 'dataset.json'} lists "
      f"{len(names)} labels; set it to {len(names)}, or to 0 to take theirs"
    )
  num_channels = len(info.get("channel_names") or info.get("modality") or {"0": ""})
  files = _case_files(root, info.get("file_ending", ".nii.gz"), num_channels)
  cases = {name: _open_case(*files[name], data.spatial_dims) for name in files}
  known = all(case.spacing is not None for case in cases.values())
  entries = [entry for name, case in cases.items() for entry in _entries(data, name, case, known)]

  def read(start: int) -> Iterator[records.Pixels]:
    for name, group in itertools.groupby(entries[start:], key=lambda entry: entry["case_id"]):
      sliced = next(group)["slice"]
      pixels = _read_case(cases[name], data.spatial_dims, len(names))
      yield from itertools.islice(pixels, max(sliced, 0), None)

  def stamp(place: int) -> str:
    case = cases[entries[place]["case_id"]]
    return records.stamp_of(*case.channels, *([case.label] if case.label else []))

  return records.Source(
    name=data.name,
    num_classes=len(names),
    class_names=names,
    num_channels=num_channels,
    spatial_dims=data.spatial_dims,
    spacing_unit="mm" if known else "voxel",
    dtype="uint8" if all(case.eight_bit for case in cases.values()) else "float32",
    records=entries,
    read=read,
    stamp=stamp,
  )


def _class_names(root: pathlib.Path, info: dict[str, Any]) -> list[str]:
  """Names of the classes 0..C-1, from version 2's {name: id} or version 1's {id: name}."""
  path, labels = root / "dataset.json", info.get("labels")
  if not isinstance(labels, dict) or len(labels) < 2:
    raise errors.DataError(f"{path}: 'labels' is {labels!r}, expected two names and ids or more")
  if all(str(key).isdigit() for key in labels):
    labels = {str(name): int(key) for key, name in labels.items()}
  if sorted(map(str, labels.values())) != sorted(str(i) for i in range(len(labels))):
    raise errors.DataError(
      f"{path}: 'labels' has the ids {list(labels.values())}, expected 0..{len(labels) - 1}, each "
      "once; regions (lists of ids) and an ignored label are not supported, relabel the masks"
    )
  return [str(name) for name, _ in sorted(labels.items(), key=lambda item: int(item[1]))]


def _case_files(root, ending: str, num_channels: int) -> dict[str, tuple[list, Any]]:
  """(channel files, label file or None) of each case, in natural order of the case ids."""
  if ending not in _ENDINGS:
    raise errors.DataError(
      f"{root / 'dataset.json'}: file_ending {ending!r}; expected one of {', '.join(_ENDINGS)}, "
      "convert the files to NIfTI"
    )
  labels = {path.name.removesuffix(ending): path for path in _files(root / "labelsTr", ending)}
  cases: dict[str, dict[int, pathlib.Path]] = {}
  for part in ("imagesTr", "imagesTs"):
    for path in _files(root / part, ending):
      match = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(ending))
      if match is None:
        raise errors.DataError(f"{path}: expected CASE_0000{ending}, with a channel; rename it")
      channels = cases.setdefault(match[1], {})
      if int(match[2]) in channels or any(
        other.parent != path.parent for other in channels.values()
      ):
        raise errors.DataError(
          f"{path}: second image of the case {match[1]!r}, beside "
          f"{next(iter(channels.values()))}; keep one"
        )
      channels[int(match[2])] = path
  if not cases:
    raise errors.DataError(f"{root / 'imagesTr'}: no images; expected files CASE_0000{ending}")
  for name, channels in cases.items():
    if sorted(channels) != list(range(num_channels)):
      raise errors.DataError(
        f"{next(iter(channels.values()))}: case {name!r} has the channels {sorted(channels)}, "
        f"dataset.json lists {num_channels}; expected each of 0..{num_channels - 1}"
      )
  orphans = sorted(set(labels) - set(cases))
  if orphans:
    raise errors.DataError(
      f"{labels[orphans[0]]}: mask without image; expected "
      f"{root / 'imagesTr' / orphans[0]}_0000{ending}; add it or remove the mask"
    )
  order = sorted(cases, key=folder.natural)
  return {n: ([cases[n][c] for c in range(num_channels)], labels.get(n)) for n in order}


def _files(directory: pathlib.Path, ending: str) -> list[pathlib.Path]:
  if not directory.is_dir():
    if directory.name == "imagesTs":
      return []
    raise errors.DataError(
      f"{directory}: no such folder; an nnU-Net raw folder holds dataset.json, imagesTr, labelsTr"
    )
  names = sorted(directory.iterdir())
  return [p for p in names if p.name.endswith(ending) and not p.name.startswith(".")]


def _open(path: pathlib.Path):
  """The image of a file, header read and checked; its shape without trailing ones."""
  try:
    image = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    kind = image.get_data_dtype()
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: no readable NIfTI header ({error}); replace or remove the file"
    ) from error
  while len(shape) > 3 and shape[-1] == 1:
    shape = shape[:-1]
  if kind.fields is not None or kind.kind not in "iuf":
    raise errors.DataError(f"{path}: voxels of type {kind}; expected one real number a voxel")
  if 0 in shape:
    raise errors.DataError(f"{path}: shape {shape} holds no voxel; replace or remove the file")
  return image, shape


def _open_case(channels, label, spatial_dims: int) -> _Case:
  opened = [_open(path) for path in channels]
  image, shape = opened[0]
  if len(shape) not in (2, 3) or len(shape) < spatial_dims:
    raise errors.DataError(
      f"{channels[0]}: {len(shape)} dimensions, {shape}; config.data.spatial_dims={spatial_dims} "
      f"takes {'images or volumes, slice by slice' if spatial_dims == 2 else 'volumes'}; split "
      "time points or channels into files of their own, or change spatial_dims"
    )
  others = list(zip(channels[1:], opened[1:], strict=True))
  for path, other in [*others, *([(label, _open(label))] if label else [])]:
    _check_grid(path, *other, channels[0], image.affine, shape)
  scales = [(one.dataobj.slope, one.dataobj.inter) for one, _ in opened]
  kinds = [one.get_data_dtype() for one, _ in opened]
  return _Case(
    channels=channels,
    label=label,
    shape=shape,
    spacing=_spacing(image, len(shape)),
    eight_bit=all(k == np.uint8 for k in kinds) and all(s == (1, 0) for s in scales),
  )


def _check_grid(path, image, shape, first, affine, expected) -> None:
  """Refuses a file that is not on the grid of its case's first channel."""
  remedy = f"resample one of the two to the other's grid, or take {path.name} away"
  if shape != expected:
    raise errors.DataError(
      f"{path}: {shape} voxels, but {first} has {expected}; expected the same, {remedy}"
    )
  shift = geometry.grid_shift(affine, image.affine, shape)
  if shift <= _MAX_SHIFT:
    return
  pairs = zip(_describe(image.affine), _describe(affine), strict=True)
  words = [f"{here} against {there}" for here, there in pairs if here != there]
  raise errors.DataError(
    f"{path}: its header places voxels up to {shift:.3g} voxels away from where {first} places "
    f"them ({', '.join(words)}), expected the same; {remedy}, or, where the voxels do match and "
    "one header is wrong, copy the affine of the right one"
  )


def _describe(affine) -> list[str]:
  """Origin, spacing and direction cosines of an affine, as text."""
  edges = np.linalg.norm(affine[:3, :3], axis=0)
  cosines = affine[:3, :3] / np.where(edges > 0, edges, 1)
  parts = {"origin": affine[:3, 3], "spacing": edges, "directions": cosines.T}
  return [f"{name} {(np.round(value, 4) + 0.0).tolist()}" for name, value in parts.items()]


def _spacing(image, dims: int) -> tuple[float, ...] | None:
  """mm an axis, None where the header does not tell the unit."""
  unit = image.header.get_xyzt_units()[0]
  zooms = [float(zoom) for zoom in image.header.get_zooms()[:dims]]
  if unit not in _MM or not all(np.isfinite(z) and z > 0 for z in zooms):
    return None
  return tuple(zoom * _MM[unit] for zoom in zooms)


def _entries(data, name: str, case: _Case, known: bool) -> Iterator[dict[str, Any]]:
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
      has_mask=case.label is not None,
    )


def _read_case(case: _Case, spatial_dims: int, num_classes: int) -> Iterator[records.Pixels]:
  """Reads every file of a case once, and yields its records."""
  image = np.stack([_voxels(path, case) for path in case.channels], axis=-1)
  mask = None
  if case.label is not None:
    mask = images.class_ids(_voxels(case.label, case), num_classes, str(case.label))
  affine = np.asarray(_open(case.channels[0])[0].affine, np.float64)
  paths = (str(case.channels[0]), str(case.label))
  if len(case.shape) == spatial_dims:
    yield records.Pixels(image, mask, affine, *paths)
    return
  for z in range(case.shape[2]):
    origin = affine.copy()
    origin[:, 3] += z * affine[:, 2]  # voxel (i, j) of this slice
    part = None if mask is None else np.ascontiguousarray(mask[:, :, z])
    yield records.Pixels(np.ascontiguousarray(image[:, :, z]), part, origin, *paths)


def _voxels(path: pathlib.Path, case: _Case) -> np.ndarray:
  """Scaled voxels: uint8 where the whole case is, float32 otherwise."""
  image, _ = _open(path)
  try:
    if case.eight_bit and image.get_data_dtype() == np.uint8:
      array = np.asarray(image.dataobj)
    else:
      array = image.get_fdata(dtype=np.float32, caching="unchanged")
  except _BROKEN as error:
    raise errors.DataError(
      f"{path}: truncated or damaged, its voxels cannot be read ({error}); replace or remove it"
    ) from error
  return array.reshape(case.shape)
