"""nnunet: volumes and pictures of nnU-Net's folders as records."""

import pathlib

import nibabel
import nnunet_raw as raw
import numpy as np
import pytest

from rndpo_jax import types


@pytest.fixture
def root(tmp_path):
  return raw.write(tmp_path)


ACDC = pathlib.Path(__file__).parents[2] / "shared" / "data" / "acdc" / "Dataset027_ACDC"


def test_volumes_slice_by_slice(root):
  source, pixels = raw.read(root)
  assert len(source.records) == 12 and source.dtype == "uint8"
  assert source.class_names == ["background", "pool", "wall"] and source.num_classes == 3
  entry = source.records[4]
  assert (entry["record_id"], entry["case_id"], entry["slice"]) == ("p2#z001", "p2", 1)
  assert entry["shape"] == [5, 6] and entry["spacing"] == [2.0, 1.5]
  assert source.spacing_unit == "mm"
  np.testing.assert_array_equal(pixels[4].image[..., 0], raw.image(2)[:, :, 1])
  np.testing.assert_array_equal(pixels[4].mask, raw.label(2)[:, :, 1])
  # Pixel (0, 0) of the second slice lies one slice of 8 mm beyond the volume's first voxel.
  np.testing.assert_allclose(pixels[4].affine[:3, 3], (10, 20, 38))
  assert [e["has_mask"] for e in source.records] == [True] * 6 + [False] * 6
  assert pixels[6].mask is None and source.records[-1]["case_id"] == "p4"


@pytest.mark.parametrize("dims", [2, 3])
def test_reading_from_a_record_on_and_what_tells_a_change(root, dims):
  source, pixels = raw.read(root, spatial_dims=dims)
  for start in range(len(pixels) + 1):
    rest = list(source.read(start))
    assert len(rest) == len(pixels) - start
    for one, other in zip(rest, pixels[start:], strict=True):
      np.testing.assert_array_equal(one.image, other.image)
      np.testing.assert_array_equal(one.affine, other.affine)
  fingerprints = [source.fingerprint(place) for place in range(len(pixels))]
  raw.save(root / "labelsTr" / "p2.nii.gz", raw.label(2) * 0)
  raw.save(root / "imagesTs" / "p4_0000.nii.gz", raw.image(5))
  changed = [source.fingerprint(place) != before for place, before in enumerate(fingerprints)]
  assert changed == [entry["case_id"] in ("p2", "p4") for entry in source.records]


def test_whole_volumes(root):
  source, pixels = raw.read(root, spatial_dims=3, group_pattern=r"(p)")
  assert [e["record_id"] for e in source.records] == ["p1", "p2", "p3", "p4"]
  assert source.records[0]["spacing"] == [2.0, 1.5, 8.0] and source.records[0]["slice"] == -1
  assert source.records[0]["group_id"] == "p"
  np.testing.assert_array_equal(pixels[1].image[..., 0], raw.image(2))
  np.testing.assert_array_equal(pixels[1].mask, raw.label(2))


def test_plain_2d_images_and_older_layout(tmp_path):
  raw.describe(
    tmp_path, labels={"0": "background", "1": "organ"}, channel_names=None,
    modality={"0": "CT"}, file_ending=".nii",
  )  # fmt: skip
  raw.save(tmp_path / "imagesTr" / "a_0000.nii", raw.image(0, (5, 6)))
  raw.save(tmp_path / "labelsTr" / "a.nii", raw.label(0, (5, 6)) // 2)
  source, pixels = raw.read(tmp_path)
  assert source.records[0]["record_id"] == "a" and source.records[0]["slice"] == -1
  assert source.class_names == ["background", "organ"] and pixels[0].image.shape == (5, 6, 1)


def test_a_letter_is_one_however_unicode_writes_it(tmp_path):
  """As macOS writes it, and as all else does: in image, label and the list of dataset.json."""
  raw.describe(tmp_path)
  raw.save(tmp_path / "imagesTr" / "o\u0308_0000.nii.gz", raw.image(0))
  raw.save(tmp_path / "labelsTr" / "\u00f6.nii.gz", raw.label(0))
  (entry,) = raw.open_source(tmp_path, spatial_dims=3).records
  assert entry["case_id"] == "\u00f6" and entry["has_mask"]
  raw.describe(tmp_path, dataset={"o\u0308": {"images": ["imagesTr/o\u0308_0000.nii.gz"]}})
  (entry,) = raw.open_source(tmp_path, spatial_dims=3).records
  assert entry["case_id"] == "\u00f6"


def test_channels_are_stacked_and_scaled(tmp_path):
  raw.describe(tmp_path, channel_names={"0": "T1", "1": "T2"})
  raw.save(tmp_path / "imagesTr" / "a_0000.nii.gz", raw.image(0))
  raw.save(tmp_path / "imagesTr" / "a_0001.nii.gz", raw.image(1).astype(np.int16), slope=(0.5, -3))
  raw.save(tmp_path / "labelsTr" / "a.nii.gz", raw.label(0).astype(np.float32))
  source, pixels = raw.read(tmp_path, spatial_dims=3)
  assert source.num_channels == 2 and source.dtype == "float32"
  np.testing.assert_array_equal(pixels[0].image[..., 0], raw.image(0))
  np.testing.assert_allclose(pixels[0].image[..., 1], 0.5 * raw.image(1) - 3)
  np.testing.assert_array_equal(pixels[0].mask, raw.label(0))


def test_scaled_bytes_are_no_bytes(root):
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", raw.image(2), slope=(0.5, -3))
  source, pixels = raw.read(root)
  assert source.dtype == "float32"
  np.testing.assert_allclose(pixels[4].image[..., 0], 0.5 * raw.image(2)[:, :, 1] - 3)


def test_a_header_without_a_unit_is_in_mm_and_it_is_said_once(root):
  raw.save(root / "imagesTr" / "p3_0000.nii.gz", raw.image(3), unit=None)
  source = raw.open_source(root)
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
  source = raw.open_source(root, spatial_dims=dims)
  entry = source.records[0]
  got = [*entry["spacing"], *([entry["slice_spacing"]] if dims == 2 else [])]
  assert got == [3.0, 1.5, 4.0]
  (note,) = source.notes
  assert (
    "p1_0000.nii.gz: pixdim gives the spacing [3.0, 1.5, 4.0] mm, the affine [2.0, 1.5, " in note
  )


def test_without_a_positive_pixdim_all_distances_are_in_voxels_and_it_is_said(root):
  _with_pixdim(root / "imagesTr" / "p1_0000.nii.gz", (np.nan, 1.5, 4))
  source = raw.open_source(root)
  assert source.spacing_unit == "voxel" and source.records[3]["spacing"] is None
  assert any("p1_0000.nii.gz: the header gives no spacing" in note for note in source.notes)


def test_the_files_that_dataset_json_lists_are_the_cases(root, tmp_path):
  elsewhere = tmp_path / "elsewhere"
  raw.save(elsewhere / "scan.nii.gz", raw.image(7))
  raw.save(elsewhere / "truth.nii.gz", raw.label(7))
  listed = {
    "p2": {"images": ["imagesTr/p2_0000.nii.gz"], "label": "labelsTr/p2.nii.gz"},
    "far": {"images": [str(elsewhere / "scan.nii.gz")], "label": "./elsewhere/truth.nii.gz"},
    "bare": {"images": ["imagesTr/p3_0000.nii.gz"]},
  }
  raw.describe(root, dataset=listed)
  source, pixels = raw.read(root, spatial_dims=3)
  assert [(e["case_id"], e["has_mask"]) for e in source.records] == [
    ("bare", False), ("far", True), ("p2", True), ("p4", False),  # imagesTs is unlabelled as ever
  ]  # fmt: skip
  np.testing.assert_array_equal(pixels[1].mask, raw.label(7))
  for folder in ("labelsTr", "imagesTs"):  # neither is needed
    for path in (root / folder).iterdir():
      path.rename(elsewhere / path.name)
    (root / folder).rmdir()
  listed["p2"]["label"] = str(elsewhere / "p2.nii.gz")
  raw.describe(root, dataset=listed)
  assert len(raw.open_source(root, spatial_dims=3).records) == 3


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
  raw.describe(root, dataset=listed)
  raw.refused(root, message)


def test_what_nnunet_would_read_and_this_does_not_is_said(root):
  raw.describe(root, channel_names={"0": "CT"})
  (root / "splits_final.json").write_text("[]")
  normalisation, splits = raw.open_source(root).notes
  assert "normalises the channel 'CT' in its own way; here every channel" in normalisation
  assert "splits_final.json: not read" in splits


@pytest.mark.parametrize("dims", [2, 3])
def test_the_ignore_label_is_no_class(root, dims):
  raw.describe(root, labels={**raw.LABELS, "ignore": 3})
  label = raw.label(2)
  label[:, :, 1] = 3  # a slice that nobody drew
  label[0, 0, 0] = 3
  raw.save(root / "labelsTr" / "p2.nii.gz", label)
  source, pixels = raw.read(root, spatial_dims=dims)
  assert source.num_classes == 3 and source.class_names == ["background", "pool", "wall"]
  expected = np.where(label == 3, types.IGNORED, label)
  masks = pixels[1].mask if dims == 3 else np.stack([p.mask for p in pixels[3:6]], -1)
  np.testing.assert_array_equal(masks, expected)
  np.testing.assert_array_equal(
    pixels[0].mask, raw.label(1) if dims == 3 else raw.label(1)[:, :, 0]
  )
  assert "the label 'ignore' is no class" in source.notes[0]
  label[0, 0, 0] = 4
  raw.save(root / "labelsTr" / "p2.nii.gz", label)
  raw.refused(root, r"p2\.nii\.gz: the mask holds the value 4; expected class ids")


def test_an_ignore_label_that_is_not_the_highest_or_leaves_nothing(root):
  raw.describe(root, labels={"background": 0, "ignore": 1, "pool": 2})
  raw.refused(root, r"dataset\.json: 'labels' is .*expected .* the highest id for 'ignore'")
  raw.describe(root, labels={"background": 0, "ignore": 1})
  raw.refused(root, r"dataset\.json: 'labels' is .*expected two classes or more")
  raw.describe(root, labels={**raw.LABELS, "ignore": 3})
  raw.save(root / "labelsTr" / "p2.nii.gz", np.full(raw.SHAPE, 3, np.uint8))
  raw.refused(root, r"p2\.nii\.gz: every voxel is ignored.*take the file away")


def test_more_classes_than_a_byte_holds(root):
  labels = {"background": 0, **{f"c{n}": n for n in range(1, 256)}}
  raw.describe(root, labels=labels)
  raw.refused(root, "'labels' lists 256 classes, expected at most 255")
  labels.pop("c255")
  raw.describe(root, labels=labels)
  assert raw.open_source(root).num_classes == 255
  raw.describe(root, labels={**labels, "ignore": 255})
  assert raw.open_source(root).num_classes == 255


def test_microns_become_mm(root):
  for name in ("imagesTr/p1_0000", "labelsTr/p1"):
    raw.save(root / f"{name}.nii.gz", raw.label(1), (500, 500, 500), unit="micron")
  assert raw.open_source(root).records[0]["spacing"] == [0.5, 0.5]


@pytest.mark.skipif(not ACDC.is_dir(), reason="../shared/data/acdc is not there")
def test_real_cardiac_mr(tmp_path):
  names = ("patient001_frame01", "patient002_frame01")
  (tmp_path / "dataset.json").symlink_to(ACDC / "dataset.json")
  for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
    (tmp_path / part).mkdir()
    for name in names:
      file = f"{name}{suffix}.nii.gz"
      (tmp_path / part / file).symlink_to(ACDC / part / file)
  source, pixels = raw.read(tmp_path, group_pattern=r"(patient\d+)")
  assert source.class_names == ["background", "RV", "MYO", "LV"]
  assert source.spacing_unit == "mm" and "names no unit" in source.notes[0]
  assert {e["case_id"] for e in source.records} == set(names)
  assert {e["group_id"] for e in source.records} == {"patient001", "patient002"}
  assert max(one.mask.max() for one in pixels) == 3
