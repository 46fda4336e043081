"""Makes small DICOM series."""

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

# mm: between columns, rows, slices; of growing column, of growing row; of the first pixel.
SPACING = (0.75, 1.5, 2.5)
DIRECTIONS = (0.0, 1.0, 0.0, -0.6, 0.0, -0.8)
NORMAL = np.cross(DIRECTIONS[:3], DIRECTIONS[3:])
ORIGIN = np.array([10.0, -20.0, 30.0])
SERIES = "1.2.826.0.1.3680043.8.498.1"


def position(place: float) -> list[float]:
  return [float(x) for x in ORIGIN + place * SPACING[2] * NORMAL]


def header(pixels: np.ndarray, place: float, **changes) -> Dataset:
  """A slice u16[columns, rows]; a tag changed to None is left out."""
  found = Dataset()
  found.file_meta = FileMetaDataset()
  found.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
  found.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
  found.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.{round(place * 1000) % 10**6 + 1}"
  tags = dict(
    SOPClassUID=uid.CTImageStorage,
    SOPInstanceUID=found.file_meta.MediaStorageSOPInstanceUID,
    SeriesInstanceUID=SERIES, Modality="CT", SamplesPerPixel=1,
    PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
    PixelRepresentation=0, Rows=pixels.shape[1], Columns=pixels.shape[0],
    PixelSpacing=[SPACING[1], SPACING[0]], ImageOrientationPatient=list(DIRECTIONS),
    ImagePositionPatient=position(place), RescaleSlope=2, RescaleIntercept=-1000,
    PixelData=np.ascontiguousarray(pixels.T).tobytes(),
  )  # fmt: skip
  for name, value in {**tags, **changes}.items():
    if value is not None:
      setattr(found, name, value)
  return found


def write(path, pixels: np.ndarray, place: float, **changes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  header(pixels, place, **changes).save_as(path, enforce_file_format=True)


def path(folder, place: int):
  """File of a slice of `write_series`; names are in another order than positions."""
  return folder / f"IM{(7 * place + 3) % 97:03d}.dcm"


def affine() -> np.ndarray:
  """f64[4, 4] of the series, voxel indices to NIfTI's mm: right, anterior, superior."""
  found = np.eye(4)
  edges = (DIRECTIONS[:3], DIRECTIONS[3:], NORMAL)
  found[:3, :3] = np.transpose([np.array(e) * s for e, s in zip(edges, SPACING, strict=True)])
  found[:3, 3] = ORIGIN
  return np.diag([-1.0, -1.0, 1.0, 1.0]) @ found


def write_series(folder, volume: np.ndarray, **changes) -> None:
  """u16[columns, rows, slices] as a file a slice."""
  for place in range(volume.shape[-1]):
    write(path(folder, place), volume[..., place], place, **changes)


def read(path) -> Dataset:
  return pydicom.dcmread(path)
