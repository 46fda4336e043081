import pathlib
import signal

import numpy as np
import pytest
from PIL import Image

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import file_checks, records
from rndpo_jax.data.sources import folder, images

PH2 = pathlib.Path(__file__).parents[2] / "shared" / "data" / "ph2"
MASK = np.eye(6, 5, dtype=np.uint8)


def _grey(seed=0, size=(6, 5), dtype=np.uint8):
  return np.random.default_rng(seed).integers(0, 250, size).astype(dtype)


def _save(path, array, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **options)


@pytest.fixture
def root(tmp_path):
  """Three grey images, the last without mask."""
  for number, name in enumerate("abc"):
    _save(tmp_path / "images" / f"{name}.png", _grey(number))
  for name in "ab":
    _save(tmp_path / "masks" / f"{name}.png", MASK * 255)
  return tmp_path


def _open(root, **changes):
  config = config_lib.base_config()
  config.data.update({"source": "folder", "root": str(root), **changes})
  return folder.open_source(config)


def _read(root, **changes):
  source = _open(root, **changes)
  pixels = list(source.read(0))
  for entry, one in zip(source.records, pixels, strict=True):
    records.check_pixels(one, entry, source.num_classes)
  return source, pixels


def test_images_and_masks_are_paired_by_id(root):
  source, pixels = _read(root)
  assert [entry["record_id"] for entry in source.records] == ["a", "b", "c"]
  assert [entry["has_mask"] for entry in source.records] == [True, True, False]
  assert source.records[0]["slice"] == -1 and source.records[0]["spacing"] is None
  assert (source.num_channels, source.dtype, source.spacing_unit) == (1, "uint8", "voxel")
  np.testing.assert_array_equal(pixels[1].image[..., 0], _grey(1))
  np.testing.assert_array_equal(pixels[1].mask, MASK)  # 255 means 1
  assert pixels[2].mask is None


def test_a_pixel_is_1_mm_where_the_network_wants_a_spacing(root):
  """As under the names of nnU-Net: a picture's file has no place to say another."""
  source = _open(root, spacing=(1.0, 1.0))
  assert {tuple(entry["spacing"]) for entry in source.records} == {(1.0, 1.0)}
  assert source.spacing_unit == "voxel" and "a pixel is 1 mm" in source.notes[-1]
  assert _open(root).records[0]["spacing"] is None and not _open(root).notes


@pytest.mark.parametrize("root", ["gs://bucket/x", "s3://bucket/x"])
def test_a_bucket_is_refused_in_words(root):
  with pytest.raises(errors.DataError, match=f"a bucket cannot be read.*{root}.*gcsfuse"):
    folder.check_root(root)


def test_sizes_and_formats_may_differ(root):
  _save(root / "images" / "d.tif", _grey(3, (9, 4)))
  _save(root / "masks" / "d.tif", _grey(3, (9, 4)) % 2)
  _save(root / "images" / "e.JPG", _grey(4, (3, 4)), format="JPEG")
  source, pixels = _read(root)
  assert [tuple(entry["shape"]) for entry in source.records[3:]] == [(9, 4), (3, 4)]
  np.testing.assert_array_equal(pixels[3].mask, _grey(3, (9, 4)) % 2)


def test_colour(tmp_path):
  colour = np.stack([_grey(s) for s in range(3)], -1)
  _save(tmp_path / "images" / "a.png", colour)
  _save(tmp_path / "masks" / "a.png", np.repeat(MASK[..., None] * 2, 3, -1))
  source, pixels = _read(tmp_path, num_classes=3)
  assert source.num_channels == 3 and source.class_names[1:] == ["class 1", "class 2"]
  np.testing.assert_array_equal(pixels[0].image, colour)
  np.testing.assert_array_equal(pixels[0].mask, MASK * 2)  # equal channels are one


def test_deep_grey_becomes_float(root):
  deep = _grey(3, dtype=np.uint16) * 200
  _save(root / "images" / "d.png", deep)
  source, pixels = _read(root)
  assert source.dtype == "float32"
  np.testing.assert_array_equal(pixels[3].image[..., 0], deep.astype(np.float32))


def test_a_compressed_file_of_8_bits_is_read_wherever_its_tags_stand(tmp_path):
  """Pillow says with the mode where they stand: at 16, or at 1600, is no depth of 16 bits."""
  for height in range(40, 60):
    image = np.random.default_rng(height).integers(0, 255, (height, 9, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert images.header(tmp_path / "a.tif").dtype == "uint8"
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.tif"), image)


def test_a_tiff_whose_0_is_white_is_refused(tmp_path):
  """Pillow inverts it: a mask of 0 and 255 would change sides."""
  path = tmp_path / "a.tif"
  Image.fromarray(MASK * 255).save(path, tiffinfo={262: 0})
  for read in (images.header, lambda path: images.read_mask(path, 2)):
    with pytest.raises(errors.DataError, match="a.tif: a TIFF in which 0 is white"):
      read(path)
  Image.fromarray(MASK * 255).save(path)
  np.testing.assert_array_equal(images.read_mask(path, 2), MASK)


def test_palette_masks_are_indices_and_palette_images_are_colours(tmp_path):
  palette = Image.fromarray(MASK, mode="P")
  palette.putpalette([0, 0, 0, 200, 10, 30])
  for part in ("images", "masks"):
    (tmp_path / part).mkdir()
    palette.save(tmp_path / part / "a.png")
  _, pixels = _read(tmp_path)
  np.testing.assert_array_equal(pixels[0].mask, MASK)
  np.testing.assert_array_equal(pixels[0].image[0, 0], [200, 10, 30])


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
  rgba = np.full((6, 5, 4), 255, np.uint8)
  rgba[..., 0] = _grey()
  _save(tmp_path / "a.png", rgba)
  np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), rgba[..., :3])
  rgba[2, 3, 3] = 254
  _save(tmp_path / "b.png", rgba)
  with pytest.raises(errors.DataError, match=r"b\.png: transparent"):
    images.read_image(tmp_path / "b.png")


def test_case_pattern_groups_slices_in_natural_order(tmp_path):
  for name in ("s1_z10", "s1_z9", "s2_z1"):
    _save(tmp_path / "images" / f"{name}.png", _grey())
    _save(tmp_path / "masks" / f"{name}.png", MASK)
  entries = _open(tmp_path, case_pattern=r"(s\d)_z", group_pattern=r"(s)").records
  assert [(e["record_id"], e["case_id"], e["slice"]) for e in entries] == [
    ("s1_z9", "s1", 0), ("s1_z10", "s1", 1), ("s2_z1", "s2", 0),
  ]  # fmt: skip
  assert {e["group_id"] for e in entries} == {"s"}
  with pytest.raises(errors.DataError, match="config.data.case_pattern.*'s1_z9'"):
    _open(tmp_path, case_pattern=r"(case\d+)")
  _save(tmp_path / "images" / "s2_z2.png", _grey(size=(7, 7)))
  with pytest.raises(errors.DataError, match=r"s2_z2\.png: \(7, 7\).*s2_z1\.png.*'s2'"):
    _open(tmp_path, case_pattern=r"(s\d)_z")


def test_a_pattern_that_takes_for_ever_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(file_checks, "_MATCH_SECONDS", 0.1)
  with pytest.raises(errors.DataError, match=r"config.data.case_pattern: '\(a\+\)\+\$' takes more"):
    records.extract("(a+)+$", "a" * 60 + "b", "case_pattern")
  assert records.extract("(a+)+$", "aaa", "case_pattern") == "aaa"
  assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_an_image_of_one_pixel_is_named(tmp_path):
  for part, value in (("images", 7), ("masks", 1)):
    (tmp_path / part).mkdir()
    Image.fromarray(np.full((1, 1), value, np.uint8)).save(tmp_path / part / "a.png")
  with pytest.raises(errors.DataError, match="a.png: an image of one pixel"):
    _open(tmp_path)


def test_other_files_are_left_alone(root):
  for name in (".hidden.png", "LICENSE.txt"):
    (root / "images" / name).write_text("text")
  assert len(_open(root).records) == 3


def _refused(root, message, **changes):
  with pytest.raises(errors.DataError, match=message):
    _read(root, **changes)


def test_no_such_folder(tmp_path):
  _refused(tmp_path / "nowhere", r"nowhere: no such folder; set config\.data\.root")
  _refused("", r"config\.data\.root: not set")
  _refused(tmp_path, r"images: no such folder; expected images/ID\.png")


def test_no_images(root):
  for path in (root / "images").iterdir():
    path.unlink()
  _refused(root, "images: no images; expected files ID.png")


@pytest.mark.parametrize("name", ["a.png", "d.jpg", "d.tif"])
def test_image_without_readable_header(root, name):
  (root / "images" / name).write_bytes(b"no image at all")
  _refused(root, rf"{name}: no readable header")


@pytest.mark.parametrize("name", ["d.png", "d.jpg", "d.tif"])
def test_truncated_image(root, name):
  path = root / "images" / name
  _save(path, _grey(size=(200, 200)))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  _refused(root, rf"{name}: (truncated or damaged|no readable header)")


def test_truncated_mask(root):
  path = root / "masks" / "c.png"
  _save(path, _grey(size=(200, 200)))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  _refused(root, r"masks/c\.png: truncated")


def test_mask_of_another_size(root):
  _save(root / "masks" / "b.png", MASK[:4])
  _refused(root, r"masks/b\.png: a mask of \(4, 5\) pixels for an image of \(6, 5\)")


@pytest.mark.parametrize(
  ("mask", "num_classes", "found"),
  [(MASK * 2, 2, "2"), (MASK * 255, 3, "255"), (MASK * 254 + np.eye(6, 5, 1), 2, "254")],
)
def test_mask_value_outside_the_classes(root, mask, num_classes, found):
  _save(root / "masks" / "a.png", mask.astype(np.uint8))
  _save(root / "masks" / "b.png", MASK)
  _refused(
    root, rf"a\.png.*value {found}; expected class ids 0\.\.{num_classes - 1}",
    num_classes=num_classes,
  )  # fmt: skip


def test_mask_of_several_colours(root):
  _save(root / "masks" / "a.png", np.stack([MASK, MASK, MASK * 0], -1))
  _refused(root, r"a\.png: a mask of 3 channels")


def test_float_values_that_are_no_number_are_refused(root):
  image = _grey(3).astype(np.float32)
  image[0, 0] = np.nan
  _save(root / "images" / "d.tif", image)
  _refused(root, r"d\.tif: 1 NaN or infinite")


def test_mask_without_image(root):
  _save(root / "masks" / "z.png", MASK)
  _refused(root, r"masks/z\.png: mask without image; expected .*images/z\.png")


def test_two_images_with_one_id(root):
  _save(root / "images" / "a.jpg", _grey())
  _refused(root, r"a\.png: second file of the id 'a', beside a\.jpg")


def test_grey_and_colour_mixed(root):
  _save(root / "images" / "d.png", np.stack([_grey()] * 3, -1))
  _refused(root, r"a\.png is grey and .*d\.png is RGB")


def test_stack_in_one_file(root):
  pages = [Image.fromarray(_grey(s)) for s in range(3)]
  pages[0].save(root / "images" / "d.tif", save_all=True, append_images=pages[1:])
  _refused(root, r"d\.tif: a stack of 3 images.*nnunet")


def test_what_would_be_overlooked_or_misread_is_refused(root):
  _refused(root, "spatial_dims: found 3.*nnunet", spatial_dims=3)
  _refused(root, "num_classes: found 0", num_classes=0)
  Image.new("CMYK", (4, 4)).save(root / "images" / "d.tif")
  _refused(root, r"d\.tif: colour mode 'CMYK'")
  (root / "images" / "d.tif").unlink()
  _save(root / "masks" / "c.jpg", MASK)
  _refused(root, r"c\.jpg.*JPEG changes class ids")
  (root / "masks" / "c.jpg").rename(root / "images" / "c.gif")
  _refused(root, r"c\.gif.*overlooked")
  (root / "images" / "c.gif").unlink()
  (root / "images" / "p" / "t1").mkdir(parents=True)
  (root / "images" / "p" / "notes.txt").touch()
  assert len(_open(root).records) == 3
  _save(root / "images" / "p" / "t1" / "d.png", MASK)
  _refused(root, r"t1/d\.png: in a folder of its own.* named as t1_d\.png")


@pytest.mark.skipif(not PH2.is_dir(), reason="../shared/data/ph2 is not there")
def test_real_dermoscopy(tmp_path):
  source = _open(PH2)
  assert len(source.records) == 200 and all(e["has_mask"] for e in source.records)
  assert source.num_channels == 3 and source.records[0]["shape"] == [192, 256]
  for part in ("images", "masks"):
    (tmp_path / part).mkdir()
    for entry in source.records[:3]:
      name = f"{entry['record_id']}.png"
      (tmp_path / part / name).symlink_to(PH2 / part / name)
  _, pixels = _read(tmp_path)
  assert all(0.02 < one.mask.mean() < 0.98 for one in pixels)
