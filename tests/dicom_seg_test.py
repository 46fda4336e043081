"""DICOM segmentations: on the grid of their series, out and in again, whatever is left out."""

import shutil
import sys

import numpy as np
import pytest
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import mask_files
from rndpo_jax.data.sources import cases, dicom, dicom_folder, dicom_seg
from rndpo_jax.predict import case_files, inputs

dicom_files = pytest.importorskip("dicom_files", reason="needs the extra 'dicom'")
hd = pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
VOLUME = np.random.default_rng(0).integers(0, 3000, (5, 6, 4)).astype(np.uint16)
MASK = np.random.default_rng(1).integers(0, 3, (5, 6, 4)).astype(np.uint8)
MASK[..., 3] = 0  # a slice without any
NAMES = ("background", "rv", "lv")
_UIDS = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4", "SeriesNumber": 7}


@pytest.fixture
def series(tmp_path):
  dicom_files.write_series(tmp_path / "ct", VOLUME, **_UIDS)
  return tmp_path / "ct"


def _write(path, series, mask=MASK, names=NAMES):
  path.write_bytes(dicom_seg.encode(series, mask, names, "the base"))
  return path


def _read(path, series, num_classes=3):
  image = dicom.open_series(series)
  return dicom_seg.open_mask(path, image.shape, image.affine).read_ids(num_classes)


def test_what_is_written_comes_back_on_the_grid_of_the_series(tmp_path, series):
  path = _write(tmp_path / "a.dcm", series)
  np.testing.assert_array_equal(_read(path, series), MASK)
  assert _read(path, series).dtype == np.uint8
  assert dicom_seg.labels(path) == {1: "rv", 2: "lv"}


@pytest.mark.parametrize("name", ["one class", "no class", "one slice"])
def test_masks_that_hold_little(tmp_path, series, name):
  mask = {"one class": MASK // 2, "no class": 0 * MASK, "one slice": MASK * (np.arange(4) == 2)}
  mask = mask[name].astype(np.uint8)
  path = _write(tmp_path / "a.dcm", series, mask)
  np.testing.assert_array_equal(_read(path, series), mask)
  assert dicom_seg.labels(path) == {1: "rv", 2: "lv"}  # also those that it has not


@pytest.mark.parametrize("thickness_mm", [0.1, 6.0])
def test_one_slice_of_another_thickness(tmp_path, series, thickness_mm):
  """As a tool writes it that knows no distance of slices."""
  mask = (MASK * (np.arange(4) == 2)).astype(np.uint8)
  path = _write(tmp_path / "a.dcm", series, mask)
  found = dicom_files.read(path)
  measures = found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
  measures.SliceThickness = measures.SpacingBetweenSlices = thickness_mm
  found.save_as(path)
  np.testing.assert_array_equal(_read(path, series), mask)


def test_a_single_image(tmp_path):
  dicom_files.write(tmp_path / "cr" / "a.dcm", VOLUME[..., 1], 1, **_UIDS)
  path = _write(tmp_path / "a.dcm", tmp_path / "cr", MASK[..., 1])
  np.testing.assert_array_equal(_read(path, tmp_path / "cr"), MASK[..., 1])


def test_it_is_what_a_viewer_reads(tmp_path, series):
  """By pydicom alone: frames, their segments and positions, and the images they refer to."""
  found = dicom_files.read(_write(tmp_path / "a.dcm", series))
  assert (found.Modality, found.SegmentationType, found.SeriesNumber) == ("SEG", "BINARY", 1007)
  assert found.StudyInstanceUID == "1.2.3" and found.PatientID == ""
  frames = found.pixel_array
  for frame, group in zip(frames, found.PerFrameFunctionalGroupsSequence, strict=True):
    number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    there = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
    place = round((there - dicom_files.ORIGIN) @ dicom_files.NORMAL / dicom_files.SPACING[2])
    np.testing.assert_array_equal(frame, MASK[..., place].T == number)
    of = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
    assert of == dicom_files.read(dicom_files.path(series, place)).SOPInstanceUID
  assert len(frames) == 6  # two segments on three slices


def test_equal_masks_have_equal_identifiers_and_other_masks_others(tmp_path, series):
  first = dicom_files.read(_write(tmp_path / "a.dcm", series))
  again = dicom_files.read(_write(tmp_path / "b.dcm", series))
  other = dicom_files.read(_write(tmp_path / "c.dcm", series, np.roll(MASK, 1, 0)))
  assert first.SOPInstanceUID == again.SOPInstanceUID != other.SOPInstanceUID
  assert first.SeriesInstanceUID == again.SeriesInstanceUID != other.SeriesInstanceUID


def test_turned_and_flipped_axes_are_brought_to_the_image(tmp_path, series):
  """As dcm2niix turns a series: the file says where each voxel is."""
  path = _write(tmp_path / "a.dcm", series)
  image = dicom.open_series(series)
  turned = image.affine @ np.array([[0, -1, 0, 4], [1, 0, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1.0]])
  found = dicom_seg.open_mask(path, (6, 5, 4), turned).read_ids(3)
  np.testing.assert_array_equal(found, MASK.transpose(1, 0, 2)[:, ::-1, ::-1])


def test_a_label_map_and_a_part_of_the_image(tmp_path, series):
  image = dicom.open_series(series)
  source = [dicom_files.read(path) for path in dicom.slice_files(series)]
  for name in (*dicom_seg._MAY_BE_EMPTY, "SliceThickness"):
    setattr(source[0], name, "")
  affine = image.affine @ np.array([[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 1], [0, 0, 0, 1.0]])
  place = (np.diag([-1, -1, 1, 1.0]) @ affine)[:, [2, 1, 0, 3]]
  part = np.ascontiguousarray(MASK[1:4, 2:5, 1:3].T)
  found = hd.seg.Segmentation(
    source, hd.Volume(part, place, "PATIENT", frame_of_reference_uid="1.2.4"), "LABELMAP",
    dicom_seg._descriptions(hd, NAMES, "1"), hd.UID(), 1, hd.UID(), 1, "m", "n", "1", "1",
  )  # fmt: skip
  found.save_as(tmp_path / "a.dcm")
  want = np.zeros_like(MASK)
  want[1:4, 2:5, 1:3] = MASK[1:4, 2:5, 1:3]
  np.testing.assert_array_equal(_read(tmp_path / "a.dcm", series), want)
  with pytest.raises(errors.DataError, match=r"a\.dcm: \d+ voxels of its segments lie outside"):
    dicom_seg.open_mask(tmp_path / "a.dcm", (3, 6, 4), image.affine).read_ids(3)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda path: path.write_bytes(b"no DICOM"), r"a\.dcm: no readable DICOM header"),
    (lambda path: path.write_bytes(path.read_bytes()[:900]), r"a\.dcm: "),
    ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.3"}, r"RT Structure Set Storage; expected a D"),
    ({"PixelData": None}, r"a\.dcm: "),
    ({"PerFrameFunctionalGroupsSequence": None}, r"a\.dcm: "),
    ({"SharedFunctionalGroupsSequence": None}, r"a\.dcm: "),
  ],
)  # fmt: skip
def test_what_is_no_segmentation_is_named(tmp_path, series, change, message):
  path = _write(tmp_path / "a.dcm", series)
  if callable(change):
    change(path)
  else:
    found = dicom_files.read(path)
    for name, value in change.items():
      delattr(found, name) if value is None else setattr(found, name, value)
    found.save_as(path)
  with pytest.raises(errors.DataError, match=message) as caught:
    _read(path, series)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_another_grid_is_refused(tmp_path, series):
  path = _write(tmp_path / "a.dcm", series)
  image = dicom.open_series(series)
  half, aside = np.diag([0.5, 0.5, 1, 1]), np.eye(4)
  aside[0, 3] = 0.4
  for change in (half, aside):
    with pytest.raises(errors.DataError, match="the places of its .* are not those of the image's"):
      dicom_seg.open_mask(path, image.shape, image.affine @ change)
  far = np.eye(4)
  far[0, 3] = 50  # on the grid, but beside the image
  with pytest.raises(errors.DataError, match="of its segments lie outside of the image"):
    dicom_seg.open_mask(path, image.shape, image.affine @ far).read_ids(3)


def test_overlapping_segments_are_no_mask(tmp_path, series):
  path = _write(tmp_path / "a.dcm", series)
  found = dicom_files.read(path)
  for group in found.PerFrameFunctionalGroupsSequence:
    assert group.SegmentIdentificationSequence
  ones = np.ones_like(found.pixel_array)
  found.PixelData = np.packbits(ones.ravel(), bitorder="little").tobytes()
  found.PixelData += b"\0" * (len(found.PixelData) % 2)
  found.save_as(path)
  with pytest.raises(errors.DataError, match=r"a\.dcm: its segments make no mask"):
    _read(path, series)


def _open(root, **changes):
  config = config_lib.base_config()
  config.data.update({"source": "dicom", "root": str(root), "num_classes": 3, **changes})
  return dicom_folder.open_source(config)


@pytest.fixture
def root(tmp_path, series):
  for name in "ab":
    shutil.copytree(series, tmp_path / "images" / name)
    (tmp_path / "masks").mkdir(exist_ok=True)
    _write(tmp_path / "masks" / f"{name}.dcm", series)
  return tmp_path


@pytest.mark.parametrize("dims", [2, 3])
def test_a_source_with_segmentations(root, dims):
  source = _open(root, spatial_dims=dims)
  assert source.class_names == list(NAMES)
  masks = [one.mask for one in source.read(0)]
  found = masks[0] if dims == 3 else np.stack(masks[:4], -1)
  np.testing.assert_array_equal(found, MASK)


def test_one_number_means_one_class(root, series):
  _write(root / "masks" / "b.dcm", series, names=("background", "lv", "rv"))
  with pytest.raises(errors.DataError, match=r"b\.dcm: segment 1 is 'lv', but in .*a\.dcm it is"):
    _open(root)
  (root / "masks" / "b.dcm").unlink()
  with pytest.raises(errors.DataError, match=r"segment 2 \('lv'\); expected numbers below 2"):
    _open(root, num_classes=2)


def test_a_segmentation_among_the_images_is_named(root):
  (root / "masks" / "a.dcm").rename(root / "images" / "a" / "IM099.dcm")
  with pytest.raises(errors.DataError, match=r"IM099\.dcm: a DICOM segmentation, expected an im"):
    _open(root)


def test_proposals_may_be_segmentations(root):
  image = dicom.open_series(root / "images" / "a")
  grid = mask_files.Grid(image.shape, 0)
  listed = mask_files.listing(root / "masks")
  for read in (mask_files.check, mask_files.read):  # float32, as records hold it
    found = read(listed["a"], grid, 3, lambda _: image.affine.astype(np.float32))
    np.testing.assert_array_equal(found, MASK)


def test_prediction_writes_them_on_request_and_does_not_read_them_again(root):
  folders = inputs.list_inputs(str(root / "images"), 1)
  output = epath.Path(root / "images" / "out")
  output.mkdir()
  case = case_files.Predicted(folders[0], inputs.stamp(folders[0]), MASK, None, {})
  case_files.write(output, case)
  assert case_files.is_done(output, folders[0], probabilities=False)
  done = dict(probabilities=False, with_dicom_seg=True)
  assert not case_files.is_done(output, folders[0], **done)
  case_files.write(output, case, lambda series, mask: dicom_seg.encode(series, mask, NAMES, "n"))
  assert case_files.is_done(output, folders[0], **done)
  np.testing.assert_array_equal(_read(root / "images" / "out" / "a.dcm", folders[0].files[0]), MASK)
  (output / inputs.SETTINGS).write_text("{}")
  assert inputs.list_inputs(str(root / "images"), 1) == folders


def test_a_series_without_study_is_named(tmp_path):
  dicom_files.write_series(tmp_path / "ct", VOLUME)
  with pytest.raises(errors.DataError, match="can be made of this series .*StudyInstanceUID|Frame"):
    dicom_seg.encode(tmp_path / "ct", MASK, NAMES, "n")


def test_without_highdicom_the_extra_is_named(tmp_path, series, monkeypatch):
  path = _write(tmp_path / "a.dcm", series)
  monkeypatch.setitem(sys.modules, "highdicom", None)
  with pytest.raises(errors.DataError, match=r"a\.dcm: .*pip install 'rndpo_jax\[dicom\]'"):
    cases.open_mask(path, (5, 6, 4), np.eye(4))
