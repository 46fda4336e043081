"""A prepared data set, opened; one record of it on its own grid or the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import geometry, native, reader, records, splits, unpacked
from rndpo_jax.data.geometry import to_native as to_native
from rndpo_jax.runtime import files


class Dataset(NamedTuple):
  """A prepared data set, open for random access.

  Attributes:
    source: records with their masks; `blind_source` the same, masks never decoded.
    num_classes: C, background among them.
    class_names: one a class, background first.
    num_channels: I.
    spatial_dims: 2 or 3.
    spacing_unit: 'mm', or 'voxel' if the spacing is unknown.
    records: entries of `records.json`; their positions are the record indices used everywhere.
    fingerprint: SHA-256 of the records, their pixels and the splits.
    splits: name -> sorted i64 record indices.
    size: the network's input: the model's grid, or in the native mode a patch of it.
    crop: centre crop in source pixels, () for none.
    normalization: 'zscore' or 'minmax'; of the simple mode.
    has_ignored: whether labels may hold `types.IGNORED`.
    native: of the native mode, else None.
    boxes: i32[N, dims, 2], likewise, see `records.OnSpacing`.
    tiles: of `tiles.view`, whose records and splits are tiles; None where they are records.
    unpacked: folder of large records, see `data.unpacked`; without one they are read whole.
  """

  source: Any
  blind_source: Any
  num_classes: int
  class_names: list[str]
  num_channels: int
  spatial_dims: int
  spacing_unit: str
  records: Sequence[dict[str, Any]]
  fingerprint: str
  splits: dict[str, np.ndarray]
  size: tuple[int, ...]
  crop: tuple[int, ...]
  normalization: str
  has_ignored: bool = False
  native: records.Native | None = None
  boxes: np.ndarray | None = None
  tiles: Any = None
  unpacked: epath.Path | None = None

  @property
  def in_mask(self) -> tuple[bool, ...]:
    """Whether a channel is 0 outside the part that is not zero; () if none is, see `augment`."""
    schemes = () if self.native is None else self.native.schemes
    found = tuple(name == "zscore_in_mask" for name in schemes)
    return found if any(found) else ()


def open_dataset(config, workdir: epath.PathLike) -> Dataset:
  """Opens what the stage 'prepare' wrote, here or in `config.base.workdir`.

  Raises:
    records.DataError: if a file is missing or damaged, or was prepared for another spacing; names
      it and the remedy.
  """
  workdir = epath.Path(config.base.workdir or workdir)
  directory = workdir / "data"
  content = records.read(directory)
  _check_spacing(config, directory, content["native"])
  source = reader.open_source(directory, with_labels=True)
  if len(source) != len(content["records"]):
    raise errors.DataError(
      f"{directory}: {len(source)} records stored, {len(content['records'])} listed in "
      f"{records.FILE}; remove {directory} and run the stage 'prepare' again"
    )
  case_ids = splits.read(workdir)
  if splits.sha256(case_ids) != content.pop("splits_sha256"):
    raise errors.DataError(
      f"{workdir / splits.FILE} is not what the stage 'prepare' wrote: a case that was trained on "
      f"might be tested. Bring it back, or remove {directory / records.FILE} and run the stage "
      "'prepare' again (config.data.split_file takes splits of your own)"
    )
  cases, case_of = np.unique(content["records"].ids("case_id"), return_inverse=True)
  parts = {}
  for name, ids in case_ids.items():
    wanted = np.array([case.encode() for case in ids], np.bytes_)
    chosen = np.zeros(len(cases), bool)
    chosen[np.searchsorted(cases, wanted)] = True
    parts[name] = np.flatnonzero(chosen[case_of])
  return Dataset(
    source=source,
    blind_source=reader.open_source(directory, with_labels=False),
    splits=parts,
    size=config_lib.input_size(config),
    crop=() if config.data.spacing else tuple(config.data.crop),
    normalization=config.data.normalization,
    unpacked=unpacked.folder(files.local_copy(reader.folder(directory)), content["fingerprint"]),
    **content,
  )


def _check_spacing(config, directory: epath.Path, found: records.Native | None) -> None:
  """Refuses data that were prepared for another spacing than the config's."""
  wanted = tuple(config.data.spacing)
  there = () if found is None else found.spacing
  if bool(wanted) == bool(there) and all(
    mm in (0, other) for mm, other in zip(wanted, there, strict=True)
  ):
    return
  raise errors.DataError(
    f"{directory}: prepared with config.data.spacing={there}, but the config says {wanted}; take "
    "that spacing, or prepare the data again in a new --workdir"
  )


def load_native(dataset: Dataset, index: int, *, with_labels: bool) -> dict[str, Any]:
  """One record on its own grid.

  Args:
    dataset: from `open_dataset`.
    index: of the record.
    with_labels: False leaves the mask's bytes undecoded.

  Returns:
    image uint8 or float32 [*S, I], in the native mode normalised and brought back from the model's
    spacing, zero outside the crop; label u8[*S] or None; spacing, one mm an axis, or None;
    affine f32[4, 4], voxel indices to world, the identity if unknown.

  Raises:
    records.DataError: if labels are asked of a record without mask.
  """
  entry = dataset.records[index]
  example = _read(dataset, index, with_labels)
  image = example["image"]
  if dataset.native is not None:
    image = _on_own_grid(dataset, index, entry, image)
  return {
    "image": image,
    "label": example["mask"] if with_labels else None,
    "spacing": None if entry["spacing"] is None else tuple(entry["spacing"]),
    "affine": example["affine"],
  }


def affine_of(dataset: Dataset) -> Callable[[int], np.ndarray]:
  """Index of a record -> its affine f32[4, 4]; see `load_native`."""
  return lambda index: dataset.blind_source[int(index)]["affine"]


def _on_own_grid(dataset: Dataset, index: int, entry, image: np.ndarray) -> np.ndarray:
  """An image on the model's spacing, brought back; outside its box it is zero."""
  box = dataset.boxes[index]
  if not native.is_seen(box):
    return np.zeros((*entry["shape"], image.shape[-1]), np.float32)
  image = native.to_own_spacing(image, box, entry["spacing"], dataset.native)
  return native.paste(image, box, entry["shape"])


def _read(dataset: Dataset, index: int, with_labels: bool) -> dict[str, Any]:
  """A record as it is stored."""
  entry = dataset.records[index]
  if with_labels and not entry["has_mask"]:
    raise errors.DataError(
      f"{entry['record_id']}: it has no mask, but a label is asked for; only judges that need no "
      "truth can work on it"
    )
  return (dataset.source if with_labels else dataset.blind_source)[int(index)]


def load_on_spacing(dataset: Dataset, index: int, *, with_labels: bool) -> dict[str, np.ndarray]:
  """A whole record on the model's spacing, in the native mode; a large one is a mapped file.

  Returns:
    image f32[*M, I] normalised; label u8[*M] with labels; index i32[].

  Raises:
    records.DataError: as `load_native`.
  """

  def read() -> dict[str, np.ndarray]:
    example = _read(dataset, index, with_labels)
    label = {"label": example["mask_on_spacing"]} if with_labels else {}
    return {"image": example["image"], **label}

  spacing, names = dataset.records[index]["spacing"], ("image", "label")[: 1 + with_labels]
  shape = native.model_shape(dataset.boxes[index], spacing, dataset.native.spacing)
  if dataset.unpacked is not None and unpacked.is_large(shape, dataset.num_channels):
    arrays = unpacked.load(dataset.unpacked, int(index), names, read)
  else:
    arrays = read()
  return {**arrays, "index": np.int32(index)}


def load_example(dataset: Dataset, index: int, *, with_labels: bool) -> dict[str, np.ndarray]:
  """One record on the model's grid, or a tile of `tiles.view`.

  Returns:
    image f32[*size, I] normalised; label u8[*size], zeros without labels; index i32[].

  Raises:
    records.DataError: as `load_native`.
  """
  if dataset.tiles is not None:
    return dataset.tiles.load(index, with_labels=with_labels)
  own = load_native(dataset, index, with_labels=with_labels)
  if with_labels:
    label = geometry.mask_to_model(own["label"], dataset.size, dataset.crop)
  else:
    label = np.zeros(dataset.size, np.uint8)
  return {
    "image": to_model(dataset, own["image"]),
    "label": label,
    "index": np.int32(index),
  }


def to_model(grid, image: np.ndarray) -> np.ndarray:
  """An image as it came, uint8 or float32 [*S, I] -> f32[*size, I], as the network takes it.

  Args:
    grid: a Dataset, or what else has its `size`, `crop` and `normalization`.
    image: finite values.
  """
  on_grid = geometry.image_to_model(image, grid.size, grid.crop)
  return geometry.normalize(on_grid, grid.normalization)
