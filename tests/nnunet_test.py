import json
import pathlib

import nibabel
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, types
from rndpo_jax.data import records
from rndpo_jax.data.sources import nnunet

ACDC = pathlib.Path(__file__).parents[2] / "shared" / "data" / "acdc" / "Dataset027_ACDC"
SHAPE = (5, 6, 3)
LABELS = {"background": 0, "wall": 2, "pool": 1}


SPACING = (2, 1.5, 8)


def _affine(spacing=SPACING):
  affine = np.diag([*spacing, 1]).astype(float)
  affine[:3, 3] = (10, 20, 30)
  return affine


def _save(path, array, spacing=SPACING, unit="mm", slope=None, affine=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  affine = _affine(spacing) if affine is None else affine
  image = nibabel.Nifti1Image(array, affine)
  if unit:
    image.header.set_xyzt_units(unit)
  if slope:
    image.header.set_slope_inter(*slope)
  nibabel.save(image, path)


def _describe(root, **changes):
  info = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
  root.mkdir(parents=True, exist_ok=True)
  (root / "dataset.json").write_text(json.dumps({**info, **changes}))


def _image(seed, shape=SHAPE):
  return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def _label(seed, shape=SHAPE):
  return (np.random.default_rng(seed).integers(0, 3, shape)).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
  """Cases p1, p2 with labels, p3 without, p4 in imagesTs."""
  _describe(tmp_path)
  for n in (1, 2, 3):
    _save(tmp_path / "imagesTr" / f"p{n}_0000.nii.gz", _image(n))
  _save(tmp_path / "imagesTs" / "p4_0000.nii.gz", _image(4))
  for n in (1, 2):
    _save(tmp_path / "labelsTr" / f"p{n}.nii.gz", _label(n))
  return tmp_path


def _open(root, **changes):
  config = config_lib.base_config()
  config.data.update({"source": "nnunet", "root": str(root), "num_classes": 0, **changes})
  return nnunet.open_source(config)


def _read(root, **changes):
  source = _open(root, **changes)
  pixels = list(source.read(0))
  for entry, one in zip(source.records, pixels, strict=True):
    records.check_pixels(one, entry, source.num_classes)
  return source, pixels


def test_volumes_slice_by_slice(root):
  source, pixels = _read(root)
  assert len(source.records) == 12 and source.dtype == "uint8"
  assert source.class_names == ["background", "pool", "wall"] and source.num_classes == 3
  entry = source.records[4]
  assert (entry["record_id"], entry["case_id"], entry["slice"]) == ("p2#z001", "p2", 1)
  assert entry["shape"] == [5, 6] and entry["spacing"] == [2.0, 1.5]
  assert source.spacing_unit == "mm"
  np.testing.assert_array_equal(pixels[4].image[..., 0], _image(2)[:, :, 1])
  np.testing.assert_array_equal(pixels[4].mask, _label(2)[:, :, 1])
  # Pixel (0, 0) of the second slice lies one slice of 8 mm beyond the volume's first voxel.
  np.testing.assert_allclose(pixels[4].affine[:3, 3], (10, 20, 38))
  assert [e["has_mask"] for e in source.records] == [True] * 6 + [False] * 6
  assert pixels[6].mask is None and source.records[-1]["case_id"] == "p4"


@pytest.mark.parametrize("dims", [2, 3])
def test_reading_from_a_record_on_and_what_tells_a_change(root, dims):
  source, pixels = _read(root, spatial_dims=dims)
  for start in range(len(pixels) + 1):
    rest = list(source.read(start))
    assert len(rest) == len(pixels) - start
    for one, other in zip(rest, pixels[start:], strict=True):
      np.testing.assert_array_equal(one.image, other.image)
      np.testing.assert_array_equal(one.affine, other.affine)
  fingerprints = [source.fingerprint(place) for place in range(len(pixels))]
  _save(root / "labelsTr" / "p2.nii.gz", _label(2) * 0)
  _save(root / "imagesTs" / "p4_0000.nii.gz", _image(5))
  changed = [source.fingerprint(place) != before for place, before in enumerate(fingerprints)]
  assert changed == [entry["case_id"] in ("p2", "p4") for entry in source.records]


def test_whole_volumes(root):
  source, pixels = _read(root, spatial_dims=3, group_pattern=r"(p)")
  assert [e["record_id"] for e in source.records] == ["p1", "p2", "p3", "p4"]
  assert source.records[0]["spacing"] == [2.0, 1.5, 8.0] and source.records[0]["slice"] == -1
  assert source.records[0]["group_id"] == "p"
  np.testing.assert_array_equal(pixels[1].image[..., 0], _image(2))
  np.testing.assert_array_equal(pixels[1].mask, _label(2))


def test_plain_2d_images_and_older_layout(tmp_path):
  _describe(
    tmp_path, labels={"0": "background", "1": "organ"}, channel_names=None,
    modality={"0": "CT"}, file_ending=".nii",
  )  # fmt: skip
  _save(tmp_path / "imagesTr" / "a_0000.nii", _image(0, (5, 6)))
  _save(tmp_path / "labelsTr" / "a.nii", _label(0, (5, 6)) // 2)
  source, pixels = _read(tmp_path)
  assert source.records[0]["record_id"] == "a" and source.records[0]["slice"] == -1
  assert source.class_names == ["background", "organ"] and pixels[0].image.shape == (5, 6, 1)


def test_channels_are_stacked_and_scaled(tmp_path):
  _describe(tmp_path, channel_names={"0": "T1", "1": "T2"})
  _save(tmp_path / "imagesTr" / "a_0000.nii.gz", _image(0))
  _save(tmp_path / "imagesTr" / "a_0001.nii.gz", _image(1).astype(np.int16), slope=(0.5, -3))
  _save(tmp_path / "labelsTr" / "a.nii.gz", _label(0).astype(np.float32))
  source, pixels = _read(tmp_path, spatial_dims=3)
  assert source.num_channels == 2 and source.dtype == "float32"
  np.testing.assert_array_equal(pixels[0].image[..., 0], _image(0))
  np.testing.assert_allclose(pixels[0].image[..., 1], 0.5 * _image(1) - 3)
  np.testing.assert_array_equal(pixels[0].mask, _label(0))


def test_scaled_bytes_are_no_bytes(root):
  _save(root / "imagesTr" / "p2_0000.nii.gz", _image(2), slope=(0.5, -3))
  source, pixels = _read(root)
  assert source.dtype == "float32"
  np.testing.assert_allclose(pixels[4].image[..., 0], 0.5 * _image(2)[:, :, 1] - 3)


def test_a_header_without_a_unit_is_in_mm_and_it_is_said_once(root):
  _save(root / "imagesTr" / "p3_0000.nii.gz", _image(3), unit=None)
  source = _open(root)
  assert source.spacing_unit == "mm" and source.records[6]["spacing"] == [2.0, 1.5]
  (note,) = source.notes
  assert "p3_0000.nii.gz: the header names no unit (1 of 4 cases); taken as mm" in note


def _with_pixdim(path, spacing):
  """The file with another pixdim beside its affine, as some converters leave it."""
  image = nibabel.load(path)
  data, header = np.asarray(image.dataobj), image.header.copy()
  image = nibabel.Nifti1Image(data, image.affine, header)
  image.header["pixdim"][1:4] = spacing
  nibabel.save(image, path)


@pytest.mark.parametrize("dims", [2, 3])
def test_pixdim_is_the_spacing_of_volumes_and_of_stacked_slices(root, dims):
  for part in ("imagesTr/p1_0000", "labelsTr/p1"):
    _with_pixdim(root / f"{part}.nii.gz", (3, 1.5, 4))
  source = _open(root, spatial_dims=dims)
  entry = source.records[0]
  got = [*entry["spacing"], *([entry["slice_spacing"]] if dims == 2 else [])]
  assert got == [3.0, 1.5, 4.0]
  (note,) = source.notes
  assert (
    "p1_0000.nii.gz: pixdim gives the spacing [3.0, 1.5, 4.0] mm, the affine [2.0, 1.5, " in note
  )


def test_without_a_positive_pixdim_all_distances_are_in_voxels_and_it_is_said(root):
  _with_pixdim(root / "imagesTr" / "p1_0000.nii.gz", (np.nan, 1.5, 4))
  source = _open(root)
  assert source.spacing_unit == "voxel" and source.records[3]["spacing"] is None
  assert any("p1_0000.nii.gz: the header gives no spacing" in note for note in source.notes)


def test_the_files_that_dataset_json_lists_are_the_cases(root, tmp_path):
  elsewhere = tmp_path / "elsewhere"
  _save(elsewhere / "scan.nii.gz", _image(7))
  _save(elsewhere / "truth.nii.gz", _label(7))
  listed = {
    "p2": {"images": ["imagesTr/p2_0000.nii.gz"], "label": "labelsTr/p2.nii.gz"},
    "far": {"images": [str(elsewhere / "scan.nii.gz")], "label": "./elsewhere/truth.nii.gz"},
    "bare": {"images": ["imagesTr/p3_0000.nii.gz"]},
  }
  _describe(root, dataset=listed)
  source, pixels = _read(root, spatial_dims=3)
  assert [(e["case_id"], e["has_mask"]) for e in source.records] == [
    ("bare", False), ("far", True), ("p2", True), ("p4", False),  # imagesTs is unlabelled as ever
  ]  # fmt: skip
  np.testing.assert_array_equal(pixels[1].mask, _label(7))
  for folder in ("labelsTr", "imagesTs"):  # neither is needed
    for path in (root / folder).iterdir():
      path.rename(elsewhere / path.name)
    (root / folder).rmdir()
  listed["p2"]["label"] = str(elsewhere / "p2.nii.gz")
  _describe(root, dataset=listed)
  assert len(_open(root, spatial_dims=3).records) == 3


@pytest.mark.parametrize(
  "listed,message",
  [
    ([], "'dataset' is list, expected an object"),
    ({"a": {"images": "x.nii.gz"}}, "case 'a' of 'dataset' has the images 'x.nii.gz'"),
    ({"a": {"images": ["x.nii.gz"], "label": 3}}, "case 'a' of 'dataset' has the label 3"),
    ({"a": {"images": ["gone.nii.gz"]}}, "gone.nii.gz: no such file, but 'dataset' in"),
    ({"a": {"images": []}}, "case 'a' has no images"),
  ],
)
def test_a_list_of_files_that_cannot_be_used(root, listed, message):
  _describe(root, dataset=listed)
  _refused(root, message)


def test_what_nnunet_would_read_and_this_does_not_is_said(root):
  _describe(root, channel_names={"0": "CT"})
  (root / "splits_final.json").write_text("[]")
  normalisation, splits = _open(root).notes
  assert "normalises the channel 'CT' in its own way; here every channel" in normalisation
  assert "splits_final.json: not read" in splits


@pytest.mark.parametrize("dims", [2, 3])
def test_the_ignore_label_is_no_class(root, dims):
  _describe(root, labels={**LABELS, "ignore": 3})
  label = _label(2)
  label[:, :, 1] = 3  # a slice that nobody drew
  label[0, 0, 0] = 3
  _save(root / "labelsTr" / "p2.nii.gz", label)
  source, pixels = _read(root, spatial_dims=dims)
  assert source.num_classes == 3 and source.class_names == ["background", "pool", "wall"]
  expected = np.where(label == 3, types.IGNORED, label)
  masks = pixels[1].mask if dims == 3 else np.stack([p.mask for p in pixels[3:6]], -1)
  np.testing.assert_array_equal(masks, expected)
  np.testing.assert_array_equal(pixels[0].mask, _label(1) if dims == 3 else _label(1)[:, :, 0])
  assert "the label 'ignore' is no class" in source.notes[0]
  label[0, 0, 0] = 4
  _save(root / "labelsTr" / "p2.nii.gz", label)
  _refused(root, r"p2\.nii\.gz: the mask holds the value 4; expected class ids")


def test_an_ignore_label_that_is_not_the_highest_or_leaves_nothing(root):
  _describe(root, labels={"background": 0, "ignore": 1, "pool": 2})
  _refused(root, r"dataset\.json: 'labels' is .*expected .* the highest id for 'ignore'")
  _describe(root, labels={"background": 0, "ignore": 1})
  _refused(root, r"dataset\.json: 'labels' is .*expected two classes or more")
  _describe(root, labels={**LABELS, "ignore": 3})
  _save(root / "labelsTr" / "p2.nii.gz", np.full(SHAPE, 3, np.uint8))
  _refused(root, r"p2\.nii\.gz: every voxel is ignored.*take the file away")


def test_more_classes_than_a_byte_holds(root):
  labels = {"background": 0, **{f"c{n}": n for n in range(1, 256)}}
  _describe(root, labels=labels)
  _refused(root, "'labels' lists 256 classes, expected at most 255")
  labels.pop("c255")
  _describe(root, labels=labels)
  assert _open(root).num_classes == 255
  _describe(root, labels={**labels, "ignore": 255})
  assert _open(root).num_classes == 255


def test_microns_become_mm(root):
  for name in ("imagesTr/p1_0000", "labelsTr/p1"):
    _save(root / f"{name}.nii.gz", _label(1), (500, 500, 500), unit="micron")
  assert _open(root).records[0]["spacing"] == [0.5, 0.5]


def _refused(root, message, **changes):
  with pytest.raises(errors.DataError, match=message):
    _read(root, **changes)


def test_no_such_folder(tmp_path):
  _refused(tmp_path / "nowhere", "nowhere: no such folder")
  _refused(tmp_path, r"dataset\.json: no such file")
  _describe(tmp_path)
  _refused(tmp_path, r"labelsTr: no such folder; an nnU-Net raw folder holds")


def test_no_images(root):
  for path in [*(root / "imagesTr").iterdir(), *(root / "imagesTs").iterdir()]:
    path.unlink()
  _refused(root, r"imagesTr: no images; expected files CASE_0000\.nii\.gz")


def test_unreadable_header(root):
  (root / "imagesTr" / "p2_0000.nii.gz").write_bytes(b"no volume at all")
  _refused(root, r"p2_0000\.nii\.gz: no readable NIfTI header")


@pytest.mark.parametrize("part", ["imagesTr/p2_0000.nii.gz", "labelsTr/p2.nii.gz"])
def test_truncated_file(root, part):
  noise = np.random.default_rng(0).integers(0, 3, (40, 40, 20)).astype(np.uint8)
  for name in ("imagesTr/p2_0000.nii.gz", "labelsTr/p2.nii.gz"):
    _save(root / name, noise)
  path = root / part
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  _refused(root, f"{path.name}: truncated or damaged")


def test_truncated_plain_file(tmp_path):
  _describe(tmp_path, file_ending=".nii")
  for name in ("imagesTr/a_0000.nii", "labelsTr/a.nii"):
    _save(tmp_path / name, _label(0))
  path = tmp_path / "imagesTr" / "a_0000.nii"
  path.write_bytes(path.read_bytes()[:-20])
  _refused(tmp_path, r"a_0000\.nii: truncated or damaged")


def test_mask_of_another_size(root):
  _save(root / "labelsTr" / "p2.nii.gz", _label(2, (5, 6, 4)))
  _refused(
    root, r"labelsTr/p2\.nii\.gz: \(5, 6, 4\) voxels, but .*Tr/p2_0000\.nii\.gz has \(5, 6, 3\)"
  )


def _moved(place, by):
  affine = _affine()
  affine[place] += by
  return affine


@pytest.mark.parametrize(
  ("affine", "message"),
  [
    (
      _moved((0, 3), 0.5),
      r"up to 0\.333 voxels .*Tr/p2_0000\.nii\.gz places them \(origin \[10\.5, .* origin \[10\.0",
    ),
    (_affine((2, 1.5, 8.5)), r"up to 0\.667 .*\(spacing .*8\.5\] against spacing .*8\.0\]\), exp"),
    (
      np.diag([-1, 1, 1, 1]) @ _affine(),
      r"origin \[-10\.0.*directions \[\[-1\.0, .* copy the affine",
    ),
  ],
)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_label_on_another_grid(root, affine, message, spatial_dims):
  _save(root / "labelsTr" / "p2.nii.gz", _label(2), affine=affine)
  _refused(
    root,
    rf"labelsTr/p2\.nii\.gz: its header .*{message}",
    spatial_dims=spatial_dims,
  )


def test_channel_on_another_grid(tmp_path):
  _describe(tmp_path, channel_names={"0": "T1", "1": "T2"})
  for channel, affine in (("0000", _affine()), ("0001", _moved((2, 3), 8))):
    _save(tmp_path / "imagesTr" / f"a_{channel}.nii.gz", _image(0), affine=affine)
  _save(tmp_path / "labelsTr" / "a.nii.gz", _label(0))
  _refused(tmp_path, r"a_0001\.nii\.gz: its header .*up to 5\.33 voxels .*a_0000\.nii\.gz")


def test_rounding_of_a_header_is_no_other_grid(root):
  """A quaternion of float32 numbers instead of the matrix, and a millionth of a mm."""
  turn = np.eye(4)
  turn[:2, :2] = [[np.cos(3.1), -np.sin(3.1)], [np.sin(3.1), np.cos(3.1)]]
  image = nibabel.Nifti1Image(_label(2), None)
  image.set_qform(turn @ _moved((0, 3), 1e-6), code=1)
  nibabel.save(image, root / "labelsTr" / "p2.nii.gz")
  _save(root / "imagesTr" / "p2_0000.nii.gz", _image(2), affine=turn @ _affine())
  assert (nibabel.load(root / "labelsTr" / "p2.nii.gz").affine != turn @ _affine()).any()
  _read(root)


@pytest.mark.parametrize("value", [3, 1.5, np.nan, -1])
def test_mask_value_outside_the_classes(root, value):
  label = _label(2).astype(np.float32)
  label[0, 0, 0] = value
  _save(root / "labelsTr" / "p2.nii.gz", label)
  _refused(root, rf"labelsTr/p2\.nii\.gz: the mask holds the value {value}; expected class ids")


def test_mask_without_image(root):
  _save(root / "labelsTr" / "p9.nii.gz", _label(0))
  _refused(root, r"labelsTr/p9\.nii\.gz: mask without image; expected .*p9_0000\.nii\.gz")


def test_two_images_with_one_id(root):
  _save(root / "imagesTs" / "p1_0000.nii.gz", _image(1))
  _refused(root, r"imagesTs/p1_0000\.nii\.gz: second image of the case 'p1'")


def test_missing_channel_and_name_without_channel(root):
  _describe(root, channel_names={"0": "T1", "1": "T2"})
  _refused(root, r"case 'p1' has the channels \[0\], dataset\.json lists 2")
  _save(root / "imagesTr" / "p7.nii.gz", _image(1))
  _refused(root, r"p7\.nii\.gz: expected CASE_0000\.nii\.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_number(root, value):
  image = _image(2).astype(np.float32)
  image[1, 1, 2] = value
  _save(root / "imagesTr" / "p2_0000.nii.gz", image)
  _refused(root, r"p2_0000\.nii\.gz: 1 NaN or infinite values \(p2#z002\)")


def test_dimensions_that_do_not_fit(root):
  _save(root / "imagesTr" / "p2_0000.nii.gz", _image(2, (5, 6, 3, 2)))
  _refused(root, r"p2_0000\.nii\.gz: 4 dimensions, \(5, 6, 3, 2\); config\.data\.spatial_dims=2")
  _save(root / "imagesTr" / "p2_0000.nii.gz", _image(2, (5, 6)))
  _refused(root, r"2 dimensions, \(5, 6\); config\.data\.spatial_dims=3", spatial_dims=3)


def test_colour_voxels(root):
  colour = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
  _save(root / "imagesTr" / "p2_0000.nii.gz", colour)
  _refused(root, r"p2_0000\.nii\.gz: voxels of type")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"labels": {"background": 0, "a": [1, 2], "b": 2}}, "regions"),
    ({"labels": {"background": 0, "a": 2}}, r"expected 0\.\.1"),
    ({"labels": ["background", "a"]}, "'labels' is"),
    ({"file_ending": ".jpg"}, r"file_ending '\.jpg'; expected one of \.nii\.gz, .*\.mha, .*\.png"),
  ],
)
def test_descriptions_that_are_not_understood(root, changes, message):
  _describe(root, **changes)
  _refused(root, rf"dataset\.json.*{message}")


def test_config_keys_that_contradict(root):
  _refused(root, r"num_classes: found 4, but .*dataset\.json lists 3", num_classes=4)
  _refused(root, r"config\.data\.case_pattern", case_pattern="(p)")


@pytest.mark.skipif(not ACDC.is_dir(), reason="../shared/data/acdc is not there")
def test_real_cardiac_mr(tmp_path):
  names = ("patient001_frame01", "patient002_frame01")
  (tmp_path / "dataset.json").symlink_to(ACDC / "dataset.json")
  for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
    (tmp_path / part).mkdir()
    for name in names:
      file = f"{name}{suffix}.nii.gz"
      (tmp_path / part / file).symlink_to(ACDC / part / file)
  source, pixels = _read(tmp_path, group_pattern=r"(patient\d+)")
  assert source.class_names == ["background", "RV", "MYO", "LV"]
  assert source.spacing_unit == "mm" and "names no unit" in source.notes[0]
  assert {e["case_id"] for e in source.records} == set(names)
  assert {e["group_id"] for e in source.records} == {"patient001", "patient002"}
  assert max(one.mask.max() for one in pixels) == 3
