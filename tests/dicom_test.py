"""DICOM series: order, geometry and values are ITK's; what is no single whole series is named."""

import shutil
import sys

import nibabel
import numpy as np
import pytest
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import records
from rndpo_jax.data.sources import cases, dicom, dicom_folder
from rndpo_jax.predict import case_files, inputs

dicom_files = pytest.importorskip("dicom_files", reason="needs the extra 'dicom'")
VOLUME = np.random.default_rng(0).integers(0, 3000, (5, 6, 4)).astype(np.uint16)
MASK = np.random.default_rng(1).integers(0, 2, (5, 6, 4)).astype(np.uint8)


@pytest.fixture
def series(tmp_path):
  dicom_files.write_series(tmp_path / "ct", VOLUME)
  (tmp_path / "ct" / "DICOMDIR").write_bytes(b"an index")
  (tmp_path / "ct" / "readme.txt").write_text("burnt by a scanner")
  return tmp_path / "ct"


def test_slices_are_ordered_rescaled_and_placed(series):
  found = dicom.open_series(series)
  np.testing.assert_array_equal(found.read(False), 2.0 * VOLUME - 1000)
  assert found.read(False).dtype == np.float32
  np.testing.assert_allclose(found.spacing, dicom_files.SPACING, rtol=1e-6)
  np.testing.assert_allclose(found.affine, dicom_files.affine(), atol=1e-6)
  # Three columns, two rows and one slice on; DICOM's left and posterior are negative in NIfTI.
  steps = 3 * 0.75 * np.array([0, 1, 0]) + 2 * 1.5 * np.array([-0.6, 0, -0.8])
  there = dicom_files.ORIGIN + steps + 2.5 * np.array([-0.8, 0, 0.6])
  np.testing.assert_allclose(found.affine @ (3, 2, 1, 1), (-there[0], -there[1], there[2], 1))


def test_it_is_what_itk_reads(series):
  sitk = pytest.importorskip("SimpleITK", reason="needs the extra 'itk'")
  reader = sitk.ImageSeriesReader()
  reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
  image = reader.Execute()
  found = dicom.open_series(series)
  np.testing.assert_array_equal(found.read(False), sitk.GetArrayFromImage(image).T)
  np.testing.assert_allclose(found.spacing, image.GetSpacing(), rtol=1e-6)
  for voxel in ((0, 0, 0), (4, 5, 3)):
    there = np.array(image.TransformIndexToPhysicalPoint(voxel)) * (-1, -1, 1)
    np.testing.assert_allclose((found.affine @ (*voxel, 1))[:3], there, atol=1e-6)


def test_a_file_that_a_copy_left_empty_is_no_missing_last_slice(series):
  """Names as a hospital's archive writes them, without an ending."""
  for place in range(4):
    dicom_files.path(series, place).rename(series / f"IM{place:04d}")
  assert dicom.open_series(series).shape == (5, 6, 4)
  for content in (b"", bytes(4096)):
    (series / "IM0003").write_bytes(content)
    with pytest.raises(errors.DataError, match="IM0003: no readable DICOM header"):
      dicom.open_series(series)


def test_a_slope_of_0_is_1_as_to_itk(tmp_path):
  dicom_files.write(tmp_path / "a.dcm", VOLUME[..., 0], 0, RescaleSlope=0)
  np.testing.assert_array_equal(dicom.open_series(tmp_path).read(False), VOLUME[..., 0] - 1000.0)


def test_slope_and_intercept_are_each_slices_own_and_names_need_no_ending(tmp_path):
  for place in range(3):
    slope = None if place == 2 else place + 0.5
    name = "ABCD"[place] if place else "1.2.840.17"
    dicom_files.write(
      tmp_path / name, VOLUME[..., place], place, RescaleSlope=slope, RescaleIntercept=None
    )
  (tmp_path / "LICENSE").write_text("no DICOM")
  values = VOLUME[..., :3] * np.array([0.5, 1.5, 1])
  np.testing.assert_array_equal(dicom.open_series(tmp_path).read(False), values.astype(np.float32))


def test_one_slice_is_a_2d_image(tmp_path):
  dicom_files.write(tmp_path / "a.dcm", VOLUME[..., 0], 0, PixelSpacing=None)
  found = dicom.open_series(tmp_path)
  assert found.shape == (5, 6) and found.spacing is None
  dicom_files.write(tmp_path / "a.dcm", VOLUME[..., 0], 0, ImagePositionPatient=None)
  found = dicom.open_series(tmp_path)
  assert found.spacing == dicom_files.SPACING[:2]
  np.testing.assert_array_equal(found.read(False), 2.0 * VOLUME[..., 0] - 1000)


def _rewrite(path, **changes):
  found = dicom_files.read(path)
  for name, value in changes.items():
    if value is None:
      delattr(found, name)
    else:
      setattr(found, name, value)
  found.save_as(path)


_TILTED = [float(x) for x in np.array(dicom_files.position(2)) + 0.5 * np.array([0, 1, 0])]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda path: path.unlink(), r"IM024\.dcm: 5 mm beyond IM010\.dcm, .* 2\.5 mm .* missing"),
    ({"SeriesInstanceUID": "1.2.3"}, r"of the series .*a folder holds one series"),
    ({"Rows": 5}, r"size \(5, 5\).*size \(5, 6\).* one grid"),
    ({"PixelSpacing": [1.0, 1.0]}, r"spacing \(1\.0, 1\.0\), but .* spacing \(0\.75, 1\.5\)"),
    ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, r"directions \(1\.0.*a localizer"),
    ({"ImagePositionPatient": dicom_files.position(1)}, r"at the same position as IM010\.dcm"),
    ({"ImagePositionPatient": dicom_files.position(2.4)}, r"IM017\.dcm: 0\.40 .* unevenly spaced"),
    ({"ImagePositionPatient": _TILTED}, r"IM017\.dcm: 0\.67 voxels .* shifted sideways"),
    ({"ImagePositionPatient": None}, r"IM017\.dcm: no ImagePositionPatient"),
    ({"ImagePositionPatient": [1, 2]}, r"IM017\.dcm: no readable .*expected 3 finite numbers"),
    ({"NumberOfFrames": 3}, r"IM017\.dcm: 3 frames"),
    ({"SamplesPerPixel": 3}, r"IM017\.dcm: 1 frame of 3 samples"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, r"a pixel, PALETTE COLOR; expected one grey"),
    ({"Rows": None}, r"IM017\.dcm: no readable .* of an image \(no Rows"),
    ({"RescaleSlope": "nan"}, r"IM017\.dcm: no readable .*RescaleSlope is \(nan,\)"),
    ({"PixelData": bytes(20)}, r"IM017\.dcm: its pixels cannot be read"),
    ({"PixelData": None}, r"IM017\.dcm: its pixels cannot be read"),
    (lambda path: path.write_bytes(b"no DICOM"), r"IM017\.dcm: no readable DICOM header"),
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), r"IM017\.dcm: its pixels cannot be"),
    (lambda path: path.write_bytes(path.read_bytes()[:200]), r"IM017\.dcm: no readable DICOM"),
    (lambda path: [p.unlink() for p in path.parent.glob("*.dcm")], r"ct: no DICOM files"),
  ],
)  # fmt: skip
def test_what_is_no_whole_series_is_named(series, change, message):
  path = dicom_files.path(series, 2)
  change(path) if callable(change) else _rewrite(path, **change)
  with pytest.raises(errors.DataError, match=message) as caught:
    dicom.open_series(series).read(False)
  assert "\n" not in str(caught.value)


def test_rounded_positions_are_no_uneven_slices(series):
  for place in range(4):
    rounded = [round(x, 1) for x in dicom_files.position(place)]
    _rewrite(dicom_files.path(series, place), ImagePositionPatient=rounded)
  assert dicom.open_series(series).shape == (5, 6, 4)


def _open(root, **changes):
  config = config_lib.base_config()
  config.data.update({"source": "dicom", "root": str(root), **changes})
  return dicom_folder.open_source(config)


@pytest.fixture
def root(tmp_path, series):
  """Series a with a mask, b without."""
  for name in "ab":
    shutil.copytree(series, tmp_path / "images" / name)
  (tmp_path / "masks").mkdir()
  image = nibabel.Nifti1Image(MASK, dicom.open_series(series).affine)
  nibabel.save(image, tmp_path / "masks" / "a.nii.gz")
  return tmp_path


@pytest.mark.parametrize("dims", [2, 3])
def test_a_source_of_series_with_masks_beside(root, dims):
  source = _open(root, spatial_dims=dims)
  pixels = list(source.read(0))
  for entry, one in zip(source.records, pixels, strict=True):
    records.check_pixels(one, entry, 2)
  count = 4 if dims == 2 else 1
  assert [(e["case_id"], e["has_mask"]) for e in source.records] == (
    [("a", True)] * count + [("b", False)] * count
  )
  assert source.spacing_unit == "mm" and source.class_names == ["background", "foreground"]
  assert source.channel_names == ("CT",)
  masks = pixels[0].mask if dims == 3 else np.stack([one.mask for one in pixels[:4]], -1)
  np.testing.assert_array_equal(masks, MASK)
  before = [source.fingerprint(place) for place in range(2 * count)]
  _rewrite(root / "images" / "b" / "IM010.dcm", PatientName="longer^name")
  changed = [source.fingerprint(place) != before[place] for place in range(2 * count)]
  assert changed == [entry["case_id"] == "b" for entry in source.records]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda root: (root / "images" / "scan.dcm").touch(), r"scan\.dcm: a file; expected a folder"),
    (lambda root: (root / "images" / "c").mkdir(), r"images/c: no DICOM files"),
    (lambda root: (root / "masks" / "b.dcm").touch(), r"b\.dcm: no readable DICOM header"),
    (lambda root: (root / "masks" / "b.npy").touch(), r"b\.npy: not a format taken for masks"),
    (lambda root: (root / "masks" / "a.mha").touch(), r"a\.nii\.gz: second mask of 'a'"),
    (lambda root: shutil.rmtree(root / "images" / "a"), r"a\.nii\.gz: mask without series"),
    (lambda root: shutil.rmtree(root / "images"), r"images: no such folder"),
  ],
)
def test_folders_that_are_no_source(root, change, message):
  change(root)
  with pytest.raises(errors.DataError, match=message):
    _open(root)


def test_a_mask_that_is_flipped_is_on_another_grid(root):
  path = root / "masks" / "a.nii.gz"
  image = nibabel.load(path)
  affine = image.affine @ np.diag([1, -1, 1, 1])
  nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), path)
  with pytest.raises(errors.DataError, match=r"a\.nii\.gz: its header places voxels"):
    _open(root)


def test_prediction_takes_series_and_writes_nifti_on_their_grid(root):
  folders = inputs.list_inputs(str(root / "images"), 1)
  assert [(one.case_id, one.mask_name) for one in folders] == [("a", "a.nii.gz"), ("b", "b.nii.gz")]
  assert inputs.list_inputs(str(root / "images" / "b"), 1) == folders[1:]
  assert inputs.list_inputs(str(root / "images" / "b" / "IM010.dcm"), 1) == folders[1:]
  stamp = inputs.stamp(folders[1])
  (root / "images" / "b" / "IM010.dcm").unlink()
  assert inputs.stamp(folders[1]) != stamp
  output = epath.Path(root / "out")
  output.mkdir()
  case_files.write(output, case_files.Predicted(folders[0], "", MASK, None, {}))
  found = nibabel.load(output / "a.nii.gz")
  np.testing.assert_array_equal(np.asarray(found.dataobj), MASK)
  assert found.get_data_dtype() == np.uint8 and found.header.get_xyzt_units()[0] == "mm"
  np.testing.assert_allclose(
    found.affine, dicom.open_series(root / "images" / "a").affine, atol=1e-5
  )
  label = root / "out" / "a.nii.gz"
  assert cases.open_case([root / "images" / "a"], label, 3).label == label


def test_series_of_any_depth_are_named_by_their_folders(root):
  """As an archive leaves them, PATIENT/STUDY/SERIES, with other files beside."""
  for name in ("p1/s1/t1", "p1/s1/t2", "p2/s1/t1"):
    shutil.copytree(root / "images" / "a", root / "tree" / name)
  shutil.copytree(root / "images" / "a", root / "tree" / "p2", dirs_exist_ok=True)
  (root / "tree" / "p1" / "report.txt").touch()
  (root / "tree" / "p1" / ".trash").mkdir()
  (root / "tree" / "p1" / "s1" / "up").symlink_to(root / "tree" / "p1")
  want = ["p1_s1_t1", "p1_s1_t2", "p2", "p2_s1_t1"]
  found = inputs.list_inputs(str(root / "tree"), 1)
  assert [one.case_id for one in found] == want
  assert found[1].files == (root / "tree" / "p1" / "s1" / "t2",)
  assert found[3].mask_name == "p2_s1_t1.nii.gz"
  assert inputs.list_inputs(str(root / "tree" / "p2"), 1)[1].case_id == "s1_t1"
  shutil.rmtree(root / "images")
  (root / "tree").rename(root / "images")
  (root / "masks" / "a.nii.gz").rename(root / "masks" / "p1_s1_t2.nii.gz")
  source = _open(root, spatial_dims=3, group_pattern="([^_]+)")
  assert [entry["case_id"] for entry in source.records] == want
  assert [entry["has_mask"] for entry in source.records] == [False, True, False, False]
  assert [entry["group_id"] for entry in source.records] == ["p1", "p1", "p2", "p2"]
  shutil.copytree(root / "images" / "p2" / "s1", root / "images" / "p2_s1")
  with pytest.raises(errors.DataError, match="p2_s1/t1: second series of the id 'p2_s1_t1'"):
    _open(root)
  with pytest.raises(errors.DataError, match="p2_s1/t1: second file of the id 'p2_s1_t1'"):
    inputs.list_inputs(str(root / "images"), 1)


def test_without_pydicom_the_extra_is_named(series, monkeypatch):
  monkeypatch.setitem(sys.modules, "pydicom", None)
  with pytest.raises(errors.DataError, match=r"ct: .*pip install 'rndpo_jax\[dicom\]'"):
    dicom.open_series(series)
