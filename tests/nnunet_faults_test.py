"""nnunet: what cannot be read, or means something else, is named."""

import nibabel
import nnunet_raw as raw
import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.data.sources import cases


@pytest.fixture
def root(tmp_path):
  return raw.write(tmp_path)


def test_no_such_folder(tmp_path):
  raw.refused(tmp_path / "nowhere", "nowhere: no such folder")
  raw.refused(tmp_path, r"dataset\.json: no such file")
  raw.describe(tmp_path)
  raw.refused(tmp_path, r"labelsTr: no such folder; an nnU-Net raw folder holds")


def test_no_images(root):
  for path in [*(root / "imagesTr").iterdir(), *(root / "imagesTs").iterdir()]:
    path.unlink()
  raw.refused(root, r"imagesTr: no images; expected files CASE_0000\.nii\.gz")


def test_unreadable_header(root):
  (root / "imagesTr" / "p2_0000.nii.gz").write_bytes(b"no volume at all")
  raw.refused(root, r"p2_0000\.nii\.gz: no readable NIfTI header")


@pytest.mark.parametrize("part", ["imagesTr/p2_0000.nii.gz", "labelsTr/p2.nii.gz"])
def test_truncated_file(root, part):
  noise = np.random.default_rng(0).integers(0, 3, (40, 40, 20)).astype(np.uint8)
  for name in ("imagesTr/p2_0000.nii.gz", "labelsTr/p2.nii.gz"):
    raw.save(root / name, noise)
  path = root / part
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  raw.refused(root, f"{path.name}: truncated or damaged")


def test_a_flipped_bit_of_a_compressed_file_is_never_other_voxels(tmp_path):
  """gzip's checksum stands behind the last voxel: it must be read too."""
  path, voxels = tmp_path / "a.nii.gz", np.indices((24, 20, 12)).sum(0).astype(np.int16)
  raw.save(path, voxels)
  content, named = path.read_bytes(), 0
  for place in np.linspace(30, len(content) - 1, 40).astype(int):
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    try:
      found = cases.open_file(path).read(False)
    except errors.DataError as error:
      named += "a.nii.gz: " in str(error)
    else:
      np.testing.assert_array_equal(found, voxels)
  assert named > 30


def test_truncated_plain_file(tmp_path):
  raw.describe(tmp_path, file_ending=".nii")
  for name in ("imagesTr/a_0000.nii", "labelsTr/a.nii"):
    raw.save(tmp_path / name, raw.label(0))
  path = tmp_path / "imagesTr" / "a_0000.nii"
  path.write_bytes(path.read_bytes()[:-20])
  raw.refused(tmp_path, r"a_0000\.nii: truncated or damaged")


def test_mask_of_another_size(root):
  raw.save(root / "labelsTr" / "p2.nii.gz", raw.label(2, (5, 6, 4)))
  raw.refused(
    root, r"labelsTr/p2\.nii\.gz: \(5, 6, 4\) voxels, but .*Tr/p2_0000\.nii\.gz has \(5, 6, 3\)"
  )


def _moved(place, by):
  affine = raw.affine_of()
  affine[place] += by
  return affine


@pytest.mark.parametrize(
  ("affine", "message"),
  [
    (
      _moved((0, 3), 0.5),
      r"up to 0\.333 voxels .*Tr/p2_0000\.nii\.gz places them \(origin \[10\.5, .* origin \[10\.0",
    ),
    (
      raw.affine_of((2, 1.5, 8.5)),
      r"up to 0\.667 .*\(spacing .*8\.5\] against spacing .*8\.0\]\), exp",
    ),
    (
      np.diag([-1, 1, 1, 1]) @ raw.affine_of(),
      r"origin \[-10\.0.*directions \[\[-1\.0, .* copy the affine",
    ),
  ],
)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_label_on_another_grid(root, affine, message, spatial_dims):
  raw.save(root / "labelsTr" / "p2.nii.gz", raw.label(2), affine=affine)
  raw.refused(
    root,
    rf"labelsTr/p2\.nii\.gz: its header .*{message}",
    spatial_dims=spatial_dims,
  )


def test_channel_on_another_grid(tmp_path):
  raw.describe(tmp_path, channel_names={"0": "T1", "1": "T2"})
  for channel, affine in (("0000", raw.affine_of()), ("0001", _moved((2, 3), 8))):
    raw.save(tmp_path / "imagesTr" / f"a_{channel}.nii.gz", raw.image(0), affine=affine)
  raw.save(tmp_path / "labelsTr" / "a.nii.gz", raw.label(0))
  raw.refused(tmp_path, r"a_0001\.nii\.gz: its header .*up to 5\.33 voxels .*a_0000\.nii\.gz")


def test_rounding_of_a_header_is_no_other_grid(root):
  """A quaternion of float32 numbers instead of the matrix, and a millionth of a mm."""
  turn = np.eye(4)
  turn[:2, :2] = [[np.cos(3.1), -np.sin(3.1)], [np.sin(3.1), np.cos(3.1)]]
  image = nibabel.Nifti1Image(raw.label(2), None)
  image.set_qform(turn @ _moved((0, 3), 1e-6), code=1)
  nibabel.save(image, root / "labelsTr" / "p2.nii.gz")
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", raw.image(2), affine=turn @ raw.affine_of())
  assert (nibabel.load(root / "labelsTr" / "p2.nii.gz").affine != turn @ raw.affine_of()).any()
  raw.read(root)


@pytest.mark.parametrize("value", [3, 1.5, np.nan, -1, 0.99999994])
def test_mask_value_outside_the_classes(root, value):
  label = raw.label(2).astype(np.float32)
  label[0, 0, 0] = value
  raw.save(root / "labelsTr" / "p2.nii.gz", label)
  raw.refused(root, rf"labelsTr/p2\.nii\.gz: the mask holds the value {value}; expected class ids")


def test_a_mask_of_0_and_255_is_one_of_0_and_1_as_in_pictures(tmp_path):
  raw.describe(tmp_path, labels={"background": 0, "wall": 1})
  label = raw.label(0) % 2
  raw.save(tmp_path / "imagesTr" / "a_0000.nii.gz", raw.image(0))
  raw.save(tmp_path / "labelsTr" / "a.nii.gz", 255 * label)
  _, pixels = raw.read(tmp_path)
  np.testing.assert_array_equal(np.stack([one.mask for one in pixels], -1), label)


def test_mask_without_image(root):
  raw.save(root / "labelsTr" / "p9.nii.gz", raw.label(0))
  raw.refused(root, r"labelsTr/p9\.nii\.gz: mask without image; expected .*p9_0000\.nii\.gz")


def test_two_images_with_one_id(root):
  raw.save(root / "imagesTs" / "p1_0000.nii.gz", raw.image(1))
  raw.refused(root, r"imagesTs/p1_0000\.nii\.gz: second image of the case 'p1'")


def test_missing_channel_and_name_without_channel(root):
  raw.describe(root, channel_names={"0": "T1", "1": "T2"})
  raw.refused(root, r"case 'p1' has the channels \[0\], dataset\.json lists 2")
  raw.save(root / "imagesTr" / "p7.nii.gz", raw.image(1))
  raw.refused(root, r"p7\.nii\.gz: expected CASE_0000\.nii\.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_number(root, value):
  image = raw.image(2).astype(np.float32)
  image[1, 1, 2] = value
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", image)
  raw.refused(root, r"p2_0000\.nii\.gz: 1 NaN or infinite values \(p2#z002\)")


def test_dimensions_that_do_not_fit(root):
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", raw.image(2, (5, 6, 3, 2)))
  raw.refused(root, r"p2_0000\.nii\.gz: 4 dimensions, \(5, 6, 3, 2\); expected an image or a vol")
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", raw.image(2, (5, 6)))
  raw.refused(root, r"2 dimensions, \(5, 6\); config\.data\.spatial_dims=3", spatial_dims=3)


def test_colour_voxels(root):
  colour = np.zeros(raw.SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
  raw.save(root / "imagesTr" / "p2_0000.nii.gz", colour)
  raw.refused(root, r"p2_0000\.nii\.gz: voxels of type")


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
  raw.describe(root, **changes)
  raw.refused(root, rf"dataset\.json.*{message}")


def test_config_keys_that_contradict(root):
  raw.refused(root, r"num_classes: found 4, but .*dataset\.json lists 3", num_classes=4)
  raw.refused(root, r"config\.data\.case_pattern", case_pattern="(p)")
