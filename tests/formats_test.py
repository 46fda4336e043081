"""MetaImage, NRRD and pictures under nnU-Net's names: as a source, and around prediction."""

import json
import sys

import nibabel
import nnunet_raw as raw
import numpy as np
import pytest
from etils import epath
from PIL import Image

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data.sources import cases, folder, images
from rndpo_jax.predict import case_files, inputs

sitk = pytest.importorskip("SimpleITK", reason="needs the extra 'itk'")
DRAW = np.random.default_rng(0)
# (x, y, z), of more than one size, turned, and away from the origin.
IMAGE = DRAW.integers(-900, 900, (5, 6, 3)).astype(np.int16)
MASK = DRAW.integers(0, 3, (5, 6, 3)).astype(np.uint8)
GRID = dict(
  spacing=(2, 1.5, 8), origin=(10, -20, 30), direction=(0, -1, 0, 0.6, 0, 0.8, -0.8, 0, 0.6)
)
STRAIGHT = GRID | {"direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}  # GIPL has no directions
RGB = DRAW.integers(0, 255, (5, 6, 3)).astype(np.uint8)


def _save(path, array, *, spacing, origin, direction):
  image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
  image.SetSpacing(spacing)
  image.SetOrigin(origin)
  image.SetDirection(direction)
  path.parent.mkdir(parents=True, exist_ok=True)
  sitk.WriteImage(image, str(path))
  return path


def _write(path, array, grid=GRID):
  return _save(path, array, **grid)


def _picture(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)
  return path


def _describe(root, ending, channels=1):
  names = {str(n): "MR" for n in range(channels)}
  labels = {"background": 0, "a": 1, "b": 2}
  info = {"labels": labels, "channel_names": names, "file_ending": ending}
  root.mkdir(exist_ok=True)
  (root / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ending", cases.ITK)
def test_a_source_is_that_of_the_same_data_as_nifti(tmp_path, ending, dims):
  found, grid = [], STRAIGHT if ending == ".gipl" else GRID
  for kind in (".nii.gz", ending):
    root = tmp_path / kind
    _describe(root, kind)
    _write(root / "imagesTr" / f"a_0000{kind}", IMAGE, grid)
    _write(root / "labelsTr" / f"a{kind}", MASK, grid)
    found.append(raw.read(root, spatial_dims=dims))
  (nifti, expected), (source, pixels) = found
  assert source.spacing_unit == "mm" and source.dtype == "float32"
  for entry, other in zip(source.records, nifti.records, strict=True):
    np.testing.assert_allclose(entry.pop("spacing"), other.pop("spacing"), rtol=1e-6)
    assert entry == other
  for one, other in zip(pixels, expected, strict=True):
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)


def test_bytes_stay_bytes_and_voxels_beside_a_header_tell_a_change(tmp_path):
  _describe(tmp_path, ".mhd")
  for name in ("imagesTr/a_0000", "labelsTr/a"):
    _write(tmp_path / f"{name}.mhd", MASK)
  source, pixels = raw.read(tmp_path)
  assert source.dtype == "uint8" and pixels[0].image.dtype == np.uint8
  before = source.fingerprint(0)
  (tmp_path / "labelsTr" / "a.raw").write_bytes(bytes(MASK.size))
  assert source.fingerprint(0) != before
  (tmp_path / "labelsTr" / "a.raw").unlink()
  with pytest.raises(
    errors.DataError, match=r"a\.mhd: its voxels are in .*a\.raw, which is missing"
  ):
    raw.open_source(tmp_path)


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
def test_pictures_under_the_names_of_nnunet(tmp_path, ending):
  _describe(tmp_path, ending, channels=4)
  _picture(tmp_path / "imagesTr" / f"a_0000{ending}", RGB)
  _picture(tmp_path / "imagesTr" / f"a_0001{ending}", RGB[..., 0])
  _picture(tmp_path / "labelsTr" / f"a{ending}", MASK[..., 0])
  source, pixels = raw.read(tmp_path)
  assert source.num_channels == 4 and source.records[0]["case_id"] == "a"
  assert (source.dtype, source.spacing_unit) == ("uint8", "voxel")
  np.testing.assert_array_equal(pixels[0].image, np.concatenate([RGB, RGB[..., :1]], -1))
  np.testing.assert_array_equal(pixels[0].mask, MASK[..., 0])
  assert source.records[0]["spacing"] is None
  native = raw.open_source(
    tmp_path, spacing=(1.0, 1.0)
  )  # where a network wants one, as nnU-Net has it
  assert native.records[0]["spacing"] == [1.0, 1.0] and native.spacing_unit == "voxel"
  (tmp_path / "imagesTr" / f"a_0001{ending}").unlink()
  with pytest.raises(errors.DataError, match=r"3 channels in 1 files .*dataset\.json lists 4"):
    raw.open_source(tmp_path)


def test_the_source_of_folders_names_that_of_nnunet(tmp_path):
  config = config_lib.base_config()
  config.data.update({"source": "folder", "root": str(tmp_path)})
  _picture(tmp_path / "imagesTr" / "a_0000.png", RGB)
  with pytest.raises(errors.DataError, match="images: no such folder.*source='nnunet' reads"):
    folder.open_source(config)
  _picture(tmp_path / "images" / "a_0000.png", RGB)
  _picture(tmp_path / "masks" / "a.png", MASK[..., 0])
  with pytest.raises(errors.DataError, match=r"a\.png: mask without image.*source='nnunet' reads"):
    folder.open_source(config)


def _predicted(files, ending, mask):
  source = inputs.Input("case", tuple(files), ending)
  return case_files.Predicted(source, "", mask, None, {})


@pytest.mark.parametrize(
  "name, written",
  [
    ("a.mha", "case.mha"), ("a.mhd", "case.mha"), ("a.NRRD", "case.NRRD"), ("a.gipl", "case.gipl"),
  ],
)  # fmt: skip
def test_a_mask_has_the_format_and_geometry_of_its_image(tmp_path, name, written):
  path = _write(tmp_path / name, IMAGE)
  output = epath.Path(tmp_path / "out")
  output.mkdir()
  case_files.write(output, _predicted([path], path.suffix, MASK))
  found, image = sitk.ReadImage(str(output / written)), sitk.ReadImage(str(path))
  np.testing.assert_array_equal(sitk.GetArrayFromImage(found).T, MASK)
  assert found.GetPixelID() == sitk.sitkUInt8
  for get in ("GetSpacing", "GetOrigin", "GetDirection"):
    np.testing.assert_array_equal(getattr(found, get)(), getattr(image, get)())


@pytest.mark.parametrize(
  "ending,written,kind",
  [
    (".png", ".png", "PNG"),
    (".JPG", ".png", "PNG"),
    (".TIF", ".TIF", "TIFF"),
    (".bmp", ".bmp", "BMP"),
  ],
)
def test_a_picture_has_a_mask_of_its_format(tmp_path, ending, written, kind):
  path = _picture(tmp_path / f"a{ending}", RGB)
  output = epath.Path(tmp_path / "out")
  output.mkdir()
  case_files.write(output, _predicted([path], ending, MASK[..., 0]))
  with Image.open(output / f"case{written}") as image:
    assert image.format == kind and image.mode == "L"
  np.testing.assert_array_equal(images.read_mask(output / f"case{written}", 3), MASK[..., 0])


@pytest.mark.parametrize(
  "change", [lambda c: c[:-1], lambda c: c[:60], lambda c: c[:252] + b"abcd" + c[256:]]
)
def test_a_gipl_file_that_is_not_whole_raises(tmp_path, change):
  """ITK would read on beyond its end, in memory that is not the file's."""
  path = _write(tmp_path / "a.gipl", IMAGE, STRAIGHT)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(
    errors.DataError, match=r"a\.gipl: no whole GIPL file .* replace or remove it"
  ):
    cases.open_file(path)


def test_a_flipped_bit_of_a_compressed_nrrd_is_never_other_voxels(tmp_path):
  path = tmp_path / "a.nrrd"
  sitk.WriteImage(sitk.GetImageFromArray(IMAGE.T), str(path), useCompression=True)
  content, named = path.read_bytes(), 0
  np.testing.assert_array_equal(cases.open_file(path).read(False), IMAGE)
  start = content.index(b"\n\n") + 2
  for place in np.linspace(start, len(content) - 1, 25).astype(int):
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    try:
      found = cases.open_file(path).read(False)
    except errors.DataError as error:
      named += "a.nrrd: " in str(error)
    else:
      np.testing.assert_array_equal(found, IMAGE)
  assert named > 15


def test_which_pictures_are_channels(tmp_path):
  def ids(num_channels, *names, alone=None):
    place = tmp_path / str(len(list(tmp_path.iterdir())))
    place.mkdir()
    for name in names:
      (place / name).touch()
    found = inputs.list_inputs(str(place / alone if alone else place), num_channels)
    assert not any(one.problem for one in found)
    return [(one.case_id, len(one.files), one.mask_name) for one in found]

  assert ids(3, "a_0000.png", "b_0000.png") == [("a", 1, "a.png"), ("b", 1, "b.png")]
  assert ids(2, "a_0000.tif", "a_0001.tif") == [("a", 2, "a.tif")]
  numbered = ["z_0000.png", "z_0001.png", "z_0002.png"]  # slices, not channels
  plain = [(name[:-4], 1, name) for name in numbered]
  assert ids(1, *numbered) == plain and ids(1, *numbered, alone=numbered[0]) == plain[:1]
  assert ids(1, "a_0000.png", "b.png") == [("a_0000", 1, "a_0000.png"), ("b", 1, "b.png")]
  assert ids(1, "a_0000.png", "b_0000.mha") == [("a", 1, "a.png"), ("b", 1, "b.mha")]
  # One in colour is an image by itself, however many there are.
  place = tmp_path / "colour"
  for name in numbered:
    _picture(place / name, RGB)
  assert [one.case_id for one in inputs.list_inputs(str(place), 3)] == [n for n, *_ in plain]


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
  path = _write(tmp_path / "a.mha", IMAGE)
  monkeypatch.setitem(sys.modules, "SimpleITK", None)
  with pytest.raises(errors.DataError, match=r"a\.mha: .*pip install 'rndpo_jax\[itk\]'"):
    cases.open_file(path)


def test_files_of_two_formats_on_one_grid_are_one_case(tmp_path):
  image = _write(tmp_path / "a_0000.mha", IMAGE)
  label = _write(tmp_path / "a.nii.gz", MASK)
  assert cases.open_case([image], label, 3).shape == (5, 6, 3)
  header = nibabel.load(label)
  header.affine[0, 3] += 5
  nibabel.save(nibabel.Nifti1Image(MASK, header.affine), label)
  with pytest.raises(errors.DataError, match=r"a\.nii\.gz: its header places voxels"):
    cases.open_case([image], label, 3)
