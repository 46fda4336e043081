"""DICOM segmentations (SEG) as masks of a series, by highdicom, the extra `dicom`.

A segment's number is its class id. Frames of slices without a segment may be missing, and the axes
may be turned or flipped: the positions in the file say where each voxel is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import pathlib
import types
from collections.abc import Sequence

import numpy as np

from rndpo_jax import errors
from rndpo_jax.data import geometry
from rndpo_jax.data.sources import dicom, dicom_header, images, volume

ENDINGS = (".dcm", ".dicom")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_AXES = [2, 1, 0, 3]  # highdicom's (slice, row, column) from our (column, row, slice), and back
_MAX_SHIFT = 0.25  # voxels, as between the files of a case
_MAX_LABEL = 64  # letters of a segment's name
# What a SEG file copies from its series, where the archive has taken it out.
_MAY_BE_EMPTY = (
  "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
  "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_SERIES_NUMBER = 1000  # added to that of the images


def open_mask(path: pathlib.Path, shape: tuple[int, ...], affine: np.ndarray) -> volume.Volume:
  """Reads a segmentation's header; its voxels come on the grid of the image, empty where the file
  says nothing.

  Args:
    path: of the SEG file.
    shape: S of the image, of 2 or 3 axes.
    affine: f64[4, 4] of the image.

  Raises:
    errors.DataError: if highdicom is missing, the file is no segmentation or cannot be read, or its
      voxels do not lie on those of the image.
  """
  place = _placed(path, _geometry(path, _read(path, lazy=True)), shape, affine)
  return volume.Volume(
    shape=shape,
    affine=affine,
    spacing=None,
    eight_bit=False,
    read=lambda _: _voxels(path, place, shape, affine).astype(np.float32),
    read_ids=lambda count: images.class_ids(_voxels(path, place, shape, affine), count, str(path)),
  )


def labels(path: pathlib.Path) -> dict[int, str]:
  """The name of each segment, by its number.

  Raises:
    errors.DataError: if the file is no segmentation or cannot be read.
  """
  _check_class(path)
  try:
    parts = dicom_header.read(path, ["SegmentSequence"]).SegmentSequence
    found = {int(part.SegmentNumber): str(part.get("SegmentLabel") or "") for part in parts}
  except dicom_header.BROKEN as error:
    raise errors.DataError(f"{path}: no readable segments ({dicom_header.cause(error)})") from error
  found.pop(0, None)  # a label map may name its background
  return found


def encode(folder: pathlib.Path, mask: np.ndarray, class_names: Sequence[str], title: str) -> bytes:
  """A SEG file of a mask: a segment a class, also of those that the mask has not.

  Equal masks of a series by networks of one title have the same unique identifiers.

  Args:
    folder: of the series.
    mask: u8[*S] class ids, on its grid.
    class_names: one a class, background first.
    title: what made the mask.

  Raises:
    errors.DataError: if highdicom is missing, or the series' headers lack what a segmentation must
      say.
  """
  library, pydicom = import_highdicom(folder), dicom_header.import_pydicom(folder)
  files = dicom.slice_files(folder)
  sources = [dicom_header.read(path) for path in files]
  image = dicom.open_series(folder)
  thickness_mm = float(np.linalg.norm(image.affine[:3, 2]))
  for name, value in {**dict.fromkeys(_MAY_BE_EMPTY, ""), "SliceThickness": thickness_mm}.items():
    if sources[0].get(name) is None:
      setattr(sources[0], name, value)
  digest = hashlib.sha256(mask.tobytes(order="C")).hexdigest()
  entropy = [str(sources[0].get("SeriesInstanceUID", "")), title, *class_names, digest]
  series, instance = (
    pydicom.uid.generate_uid(entropy_srcs=[name, *entropy]) for name in ("series", "instance")
  )
  version = importlib.metadata.version("rndpo_jax")
  try:
    found = library.seg.Segmentation(
      sources,
      library.Volume(
        np.ascontiguousarray(mask.reshape(*image.shape, *(1,) * (3 - mask.ndim)).T),
        (_LPS_TO_RAS @ image.affine)[:, _AXES],
        "PATIENT",
        frame_of_reference_uid=sources[0].FrameOfReferenceUID,
      ),
      "BINARY",
      _descriptions(library, class_names, version),
      series_instance_uid=series,
      series_number=_SERIES_NUMBER + int(sources[0].get("SeriesNumber") or 0),
      sop_instance_uid=instance,
      instance_number=1,
      manufacturer="rndpo_jax",
      manufacturer_model_name=title[:_MAX_LABEL],
      software_versions=version,
      device_serial_number=version,
    )
    content = io.BytesIO()
    found.save_as(content)
  except dicom_header.BROKEN as error:
    raise errors.DataError(
      f"{files[0]}: no DICOM segmentation can be made of this series "
      f"({dicom_header.cause(error)}); bring the tag back, or do without --dicom_seg"
    ) from error
  return content.getvalue()


def _descriptions(library, class_names: Sequence[str], version: str) -> list:
  from pydicom.sr.codedict import codes

  made_by = library.AlgorithmIdentificationSequence(
    "rndpo_jax", codes.DCM.ArtificialIntelligence, version
  )
  # What the classes are is in their names alone; 'Tissue' is the most general code.
  return [
    library.seg.SegmentDescription(
      number,
      name[:_MAX_LABEL],
      codes.SCT.Tissue,
      codes.SCT.Tissue,
      "AUTOMATIC",
      algorithm_identification=made_by,
    )
    for number, name in enumerate(class_names[1:], start=1)
  ]


def import_highdicom(path: pathlib.Path) -> types.ModuleType:
  """The library.

  Raises:
    errors.DataError: naming `path` and the remedy, if it is missing.
  """
  try:
    import highdicom
  except ImportError as error:
    raise errors.DataError(
      f"{path}: DICOM segmentations need highdicom, which is not installed; run "
      "pip install 'rndpo_jax[dicom]', or use NIfTI masks"
    ) from error
  return highdicom


def _check_class(path: pathlib.Path) -> None:
  uid = dicom_header.read(path, ["SOPClassUID"]).get("SOPClassUID")
  if uid not in dicom_header.SEGMENTATIONS:
    kind = uid.name if uid else "no SOPClassUID"
    raise errors.DataError(
      f"{path}: {kind}; expected a DICOM segmentation (SEG), convert contours or images to it or "
      "to NIfTI (for example with 3D Slicer), on the grid of their series"
    )


def _read(path: pathlib.Path, *, lazy: bool):
  _check_class(path)
  library = import_highdicom(path)
  try:
    return library.seg.segread(path, lazy_frame_retrieval=lazy)
  except dicom_header.BROKEN as error:
    raise errors.DataError(
      f"{path}: no readable segmentation ({dicom_header.cause(error)}); replace or remove it"
    ) from error


def _geometry(path: pathlib.Path, found):
  """Where its voxels lie, highdicom's."""
  try:
    place = found.get_volume_geometry(allow_missing_positions=True)
  except dicom_header.BROKEN as error:
    raise errors.DataError(f"{path}: {dicom_header.cause(error)}; replace or remove it") from error
  if place is None:
    raise errors.DataError(
      f"{path}: its frames are no evenly spaced slices with a position; bring the mask as NIfTI"
    )
  return place


def _placed(path, place, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
  """The affine, f64[4, 4] in highdicom's axes and directions, of a segmentation's voxels, each of
  which is one of the image's."""
  own = (_LPS_TO_RAS @ place.affine)[:, _AXES]
  size = place.spatial_shape[::-1]
  if size[2] == 1:  # one slice's thickness need not be the distance of the image's
    turn = np.sign(own[:3, 2] @ affine[:3, 2])
    along = abs(own[:3, 2] @ affine[:3, 2])
    if along >= 0.999 * np.linalg.norm(own[:3, 2]) * np.linalg.norm(affine[:3, 2]):
      own[:3, 2] = turn * affine[:3, 2]
  steps = np.round(np.linalg.solve(affine, own))
  moved = affine @ steps
  shift = geometry.grid_shift(affine, affine + own - moved, size)
  if not _is_turn(steps[:3, :3]) or shift > _MAX_SHIFT:
    raise errors.DataError(
      f"{path}: the places of its {size} voxels are not those of the image's {shape}; bring it to "
      "the grid of its series (segment that series, or resample it)"
    )
  return (_LPS_TO_RAS @ moved)[:, _AXES]


def _is_turn(steps: np.ndarray) -> bool:
  """Whether each axis goes along one axis of the other, a voxel at a time."""
  return bool((np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all())


def _voxels(path, place: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
  """Segment numbers, [*shape]."""
  library = import_highdicom(path)
  try:
    found = _read(path, lazy=False).get_volume(combine_segments=True).array
  except dicom_header.BROKEN as error:
    raise errors.DataError(
      f"{path}: its segments make no mask ({dicom_header.cause(error)}); expected all of its "
      "pixels and one class a voxel, replace the file, or export it without overlap"
    ) from error
  grid = library.VolumeGeometry((_LPS_TO_RAS @ affine)[:, _AXES], (*shape, 1)[:3][::-1], "PATIENT")
  there = library.Volume(found, place, "PATIENT").match_geometry(grid).array
  if np.count_nonzero(there) != np.count_nonzero(found):
    raise errors.DataError(
      f"{path}: {np.count_nonzero(found) - np.count_nonzero(there)} voxels of its segments lie "
      "outside of the image; is it of another series? Replace or remove it"
    )
  return there.T.reshape(shape)
