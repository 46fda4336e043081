"""Odd DICOM series and segmentations, for `odd_inputs`."""

import os
import shutil

import dicom_files
import nibabel
import numpy as np
from odd_inputs import CASE, Row
from odd_volumes import config_of

from rndpo_jax.data.sources import dicom_seg

VOLUME = np.random.default_rng(2).integers(0, 900, (12, 12, 4)).astype(np.uint16)


def _changed(place=2, **tags):
  """Writes one slice again with other tags."""
  return lambda folder: dicom_files.write(
    dicom_files.path(folder, place), VOLUME[..., place], place, **tags
  )


def _of_slice(change):
  return lambda folder: change(dicom_files.path(folder, 2))


def _cut(length):
  return _of_slice(lambda path: path.write_bytes(path.read_bytes()[:length]))


def _fifo(path):
  path.unlink()
  os.mkfifo(path)


def _beside(folder):
  dicom_files.write_series(folder.parent / "more", VOLUME, SeriesInstanceUID="1.2.3")
  for file in (folder.parent / "more").iterdir():
    shutil.move(file, folder / f"more-{file.name}")
  (folder.parent / "more").rmdir()


def _flipped_mask(folder):
  path = folder.parent.parent / "masks" / f"{CASE}.nii.gz"
  image = nibabel.load(path)
  affine = image.affine @ np.diag([1, -1, 1, 1])
  nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), path)


def _segmentation(change=lambda path: None, **tags):
  """A DICOM segmentation in place of the NIfTI mask, made of the series with other tags."""

  def make(folder):
    path = folder.parent.parent / "masks" / f"{CASE}.nii.gz"
    uids = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    series = folder.parent.parent / "other"
    dicom_files.write_series(series, VOLUME, **{**uids, **tags})
    mask = np.asarray(nibabel.load(path).dataobj)
    content = dicom_seg.encode(series, mask, ("background", "organ"), "odd")
    shutil.rmtree(series)
    path.unlink()
    path = path.with_name(f"{CASE}.dcm")
    path.write_bytes(content)
    change(path)

  return make


def _as_contours(path):
  found = dicom_files.read(path)
  found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"  # RT Structure Set Storage
  found.save_as(path)


_ASIDE = [float(x) for x in np.add(dicom_files.position(2), (0, 0.5, 0))]
# (name, what is done to the folder of a series, whether it is taken).
SERIES = (
  ("plain", lambda folder: None, True),
  ("a text beside", lambda folder: (folder / "notes.txt").write_text("a"), True),
  ("a DICOMDIR beside", lambda folder: (folder / "DICOMDIR").write_bytes(b"a"), True),
  ("a slice without an ending",
   _of_slice(lambda path: path.rename(path.with_name("1.2.840.113619.2"))), True),
  ("a slice missing", _of_slice(lambda path: path.unlink()), False),
  ("a slice twice", _of_slice(lambda path: shutil.copy(path, path.with_name("copy.dcm"))), False),
  ("two series", _beside, False),
  ("no slices", lambda folder: [path.unlink() for path in folder.iterdir()], False),
  ("a slice of another size", _changed(Rows=6, PixelData=bytes(144)), False),
  ("a slice turned", _changed(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), False),
  ("a slice moved along", _changed(ImagePositionPatient=dicom_files.position(2.4)), False),
  ("a slice moved aside", _changed(ImagePositionPatient=_ASIDE), False),
  ("a slice without a position", _changed(ImagePositionPatient=None), False),
  ("a position of NaN", _changed(ImagePositionPatient=["nan", "0", "0"]), False),
  ("a slice without spacing", _changed(PixelSpacing=None), False),
  ("a spacing of 0", _changed(PixelSpacing=[0, 0]), False),
  ("a slope of NaN", _changed(RescaleSlope="nan"), False),
  ("three frames", _changed(NumberOfFrames=3, PixelData=bytes(864)), False),
  ("colour", _changed(SamplesPerPixel=3, PixelData=bytes(864)), False),
  ("65535 squared", _changed(Rows=65535, Columns=65535), False),
  ("no pixels", _changed(PixelData=None), False),
  ("pixels cut", _cut(-40), False), ("header cut", _cut(300), False),
  ("an empty file", _cut(0), False),
  ("text", _of_slice(lambda path: path.write_text("hello\n")), False),
  ("FIFO as a slice", _of_slice(_fifo), False),
  ("a link to nowhere as a slice",
   _of_slice(lambda path: (path.unlink(), path.symlink_to("nowhere"))), False),
  ("a mask on a flipped grid", _flipped_mask, False),
  ("a mask beside another",
   lambda folder: (folder.parent.parent / "masks" / f"{CASE}.dcm").write_bytes(b"a"), False),
  ("a segmentation as mask", _segmentation(), True),
  ("a segmentation cut", _segmentation(lambda p: p.write_bytes(p.read_bytes()[:-30])), False),
  ("a segmentation, header cut",
   _segmentation(lambda path: path.write_bytes(path.read_bytes()[:700])), False),
  ("a segmentation that is contours", _segmentation(_as_contours), False),
  ("a segmentation of another grid", _segmentation(PixelSpacing=[3.0, 3.0]), False),
  ("an empty segmentation", _segmentation(lambda path: path.write_bytes(b"")), False),
  ("a file beside the series", lambda folder: (folder.parent / "a.dcm").write_bytes(b"a"), False),
)  # fmt: skip


def _series(change, is_taken):
  def make(root):
    mask = np.zeros(VOLUME.shape, np.uint8)
    mask[3:9, 4:10] = 1
    (root / "masks").mkdir()
    for name in (*"01234", CASE):
      dicom_files.write_series(root / "images" / name, VOLUME)
      affine = dicom_files.affine()
      nibabel.save(nibabel.Nifti1Image(mask, affine), root / "masks" / f"{name}.nii.gz")
    change(root / "images" / CASE)
    config = config_of(root, **{"data.source": "dicom", "data.num_classes": 2})
    values = (2.0 * VOLUME - 1000)[:, :, :1]
    right = {"image": values, "mask": mask[..., 0], "spacing": dicom_files.SPACING[:2]}
    return config, right if is_taken else None

  return make


def rows() -> list[Row]:
  return [Row("dicom", name, _series(*entry)) for name, *entry in SERIES]
