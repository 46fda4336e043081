"""Odd NIfTI files, `dataset.json` files and config values, for `odd_inputs`."""

import gzip
import json
import struct

import nibabel
import numpy as np
from odd_inputs import CASE, Row

DRAW = np.random.default_rng(0)
IMAGE = DRAW.integers(0, 200, (12, 12, 2)).astype(np.uint8)
MASK = np.zeros((12, 12, 2), np.uint8)
MASK[3:9, 4:10] = 1
AFFINE = np.diag([1.5, 1.5, 8, 1])
LABELS = {"background": 0, "organ": 1}
# Where in the header of 348 bytes a number stands, and how it is written.
FIELDS = {
  "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"),
  "pixdim": (76, "8f"), "vox_offset": (108, "f"), "slope": (112, "f"), "inter": (116, "f"),
  "units": (123, "b"), "qform": (252, "h"), "sform": (254, "h"), "srow_x": (280, "4f"),
  "magic": (344, "4s"),
}  # fmt: skip


def nifti(array, affine=AFFINE, kind=nibabel.Nifti1Image, order="<", **fields) -> bytes:
  """The bytes of a file, with some fields of its header written over."""
  header = kind.header_class(endianness=order)
  header.set_data_dtype(array.dtype)
  header.set_xyzt_units("mm")
  content = bytearray(kind(array, affine, header, dtype=array.dtype).to_bytes())
  for name, value in fields.items():
    place, form = FIELDS[name]
    values = value if isinstance(value, tuple) else (value,)
    struct.pack_into(order + form, content, place, *values)
  return bytes(content)


def pixdim(*edges):
  return (1.0, *edges, 0.0, 0.0, 0.0, 0.0)


def cifti():
  axes = (nibabel.cifti2.ScalarAxis(["a"]), nibabel.cifti2.BrainModelAxis.from_mask(MASK > 0))
  data = np.zeros((1, int(MASK.sum())), np.float32)
  return nibabel.Cifti2Image(data, axes).to_bytes()


_BIG = MASK.astype(np.float64)
_BIG[0, 0] = 1e300
# (name, content not yet compressed or None, what it is as an image, as a label; None: refused).
FILES = (
  ("plain", lambda: nifti(MASK), MASK, MASK),
  ("big-endian", lambda: nifti(MASK.astype(np.int16), order=">"), MASK, MASK),
  ("floats of 64 bits", lambda: nifti(MASK.astype(np.float64)), MASK, MASK),
  ("floats above float32", lambda: nifti(_BIG), None, None),
  ("64 bits", lambda: nifti(MASK.astype(np.int64)), MASK, MASK),
  ("NIfTI 2", lambda: nifti(MASK, kind=nibabel.Nifti2Image), MASK, MASK),
  ("CIFTI", cifti, None, None),
  ("complex", lambda: nifti(MASK.astype(np.complex64)), None, None),
  ("colour", lambda: nifti(np.zeros(MASK.shape, [(c, "u1") for c in "RGB"])), None, None),
  ("unknown datatype", lambda: nifti(MASK, datatype=9999), None, None),
  ("scaled", lambda: nifti(MASK, slope=2.0, inter=-1.0), MASK * 2.0 - 1, None),
  ("slope of 0", lambda: nifti(MASK, slope=0.0), MASK, MASK),
  ("slope of NaN", lambda: nifti(MASK, slope=float("nan")), MASK, MASK),
  ("slope of infinity", lambda: nifti(MASK, slope=float("inf")), MASK, MASK),
  ("NaN", lambda: nifti(np.where(MASK, np.nan, 0).astype(np.float32)), None, None),
  ("values above the classes", lambda: nifti(MASK * 9), MASK * 9, None),
  ("halves", lambda: nifti(MASK / np.float32(2)), MASK / 2, None),
  ("trailing axes of 1", lambda: nifti(MASK[..., None, None]), MASK, MASK),
  ("four axes", lambda: nifti(np.stack([MASK] * 3, -1)), None, None),
  ("two axes", lambda: nifti(MASK[..., 0]), MASK[..., 0], None),
  ("another size", lambda: nifti(MASK[:-1]), None, None),
  ("one voxel", lambda: nifti(MASK[:1, :1, :1]), None, None),
  ("dim of 0", lambda: nifti(MASK, dim=(3, 12, 0, 2, 1, 1, 1, 1)), None, None),
  ("negative dim", lambda: nifti(MASK, dim=(3, 12, -12, 2, 1, 1, 1, 1)), None, None),
  ("eight axes", lambda: nifti(MASK, dim=(8, 12, 12, 2, 1, 1, 1, 1)), None, None),
  ("header of 32767^3 voxels", lambda: nifti(MASK, dim=(3, *[32767] * 3, 1, 1, 1, 1)), None, None),
  ("header of 2000^3 voxels", lambda: nifti(MASK, dim=(3, *[2000] * 3, 1, 1, 1, 1)), None, None),
  ("bomb of 1.2 x 10^9 voxels", lambda: nifti(np.zeros((1100, 1100, 1000), np.uint8)), None, None),
  ("more data than the header says", lambda: nifti(MASK) + bytes(999), MASK, MASK),
  ("offset beyond the end", lambda: nifti(MASK, vox_offset=1e9), None, None),
  ("negative offset", lambda: nifti(MASK, vox_offset=-500.0), None, None),
  ("offset of NaN", lambda: nifti(MASK, vox_offset=float("nan")), None, None),
  ("wrong size of the header", lambda: nifti(MASK, sizeof_hdr=7), MASK, MASK),
  ("no magic", lambda: nifti(MASK, magic=b"abcd"), None, None),
  ("truncated", lambda: nifti(MASK)[:-40], None, None),
  ("half a header", lambda: nifti(MASK)[:200], None, None),
  ("pixdim of 0", lambda: nifti(MASK, pixdim=pixdim(0, 1.5, 8)), MASK, MASK),
  ("pixdim of 0, no sform", lambda: nifti(MASK, pixdim=pixdim(1, 0, 8), sform=0), MASK, None),
  ("negative pixdim", lambda: nifti(MASK, pixdim=pixdim(-1.5, 1.5, 8)), MASK, MASK),
  ("pixdim of NaN", lambda: nifti(MASK, pixdim=pixdim(float("nan"), 1.5, 8)), MASK, MASK),
  ("pixdim of infinity", lambda: nifti(MASK, pixdim=pixdim(float("inf"), 1.5, 8)), MASK, MASK),
  ("pixdim unlike sform", lambda: nifti(MASK, pixdim=pixdim(3, 3, 3)), MASK, MASK),
  ("no unit", lambda: nifti(MASK, units=0), MASK, MASK),
  ("unit that is none", lambda: nifti(MASK, units=5), MASK, MASK),
  ("sform of NaN", lambda: nifti(MASK, srow_x=(float("nan"), 0, 0, 0)), None, None),
  ("sform of zeros", lambda: nifti(MASK, srow_x=(0.0, 0, 0, 0)), None, None),
  ("moved by 5 mm", lambda: nifti(MASK, srow_x=(1.5, 0, 0, 5.0)), None, None),
)  # fmt: skip
# What the spacing must be, where it is not (1.5, 1.5).
SPACING = {
  "pixdim of 0": None, "pixdim of NaN": None, "pixdim of infinity": None,
  "pixdim of 0, no sform": None, "pixdim unlike sform": (3, 3),
}  # fmt: skip
SAYS = {
  "no unit": "names no unit", "unit that is none": "names no unit", "pixdim of 0": "in voxels",
  "pixdim of NaN": "in voxels", "pixdim of infinity": "in voxels",
  "pixdim of 0, no sform": "in voxels", "pixdim unlike sform": "pixdim is taken",
}  # fmt: skip
# As images without a label, of which nothing could be said to differ: None, refused.
UNLABELLED = {
  "header of 32767^3 voxels": None, "header of 2000^3 voxels": None, "negative dim": None,
  "bomb of 1.2 x 10^9 voxels": None, "CIFTI": None, "four axes": None, "two axes": MASK[..., 0],
  "another size": MASK[:-1], "sform of NaN": MASK, "sform of zeros": MASK, "moved by 5 mm": MASK,
}  # fmt: skip


def _parts():
  return gzip.compress(nifti(MASK)[:400]) + gzip.compress(nifti(MASK)[400:])


# Files as they stand, and whether they are taken.
PACKED = (
  ("no gzip", lambda: nifti(MASK), False),
  ("empty file", lambda: b"", False),
  ("text", lambda: b"hello\n", False),
  ("gzip of nothing", lambda: gzip.compress(b""), False),
  ("gzip twice", lambda: gzip.compress(gzip.compress(nifti(MASK))), False),
  ("gzip in two parts", _parts, True),
  ("gzip with a tail", lambda: gzip.compress(nifti(MASK)) + bytes(512), True),
  ("gzip with its checksum wrong", lambda: gzip.compress(nifti(MASK))[:-8] + bytes(8), False),
  ("gzip cut", lambda: gzip.compress(nifti(IMAGE))[:-100], False),
)


def folder(root, text=None, files=None, **described):
  """Five whole cases, the case `odd`, then `files` {path: bytes} over them, and `dataset.json`."""
  info = {
    "labels": LABELS,
    "channel_names": {"0": "MR"},
    "file_ending": ".nii.gz",
    "numTraining": 6,
  }
  (root / "dataset.json").write_bytes(text or json.dumps({**info, **described}).encode())
  whole = {}
  for name in (*"01234", CASE):
    whole[f"imagesTr/{name}_0000.nii.gz"] = gzip.compress(nifti(MASK))
    whole[f"labelsTr/{name}.nii.gz"] = gzip.compress(nifti(MASK))
  for path, content in {**whole, **(files or {})}.items():
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_bytes(content)


def config_of(root, **changes):
  return {
    "data.source": "nnunet", "data.root": str(root), "data.num_classes": 0,
    "data.phantom.num_cases": 152, "data.phantom.size": (72, 80), **changes,
  }  # fmt: skip


def _right(array, name=""):
  first = array if array.ndim == 2 else array[:, :, 0]
  return {"image": first[..., None], "spacing": SPACING.get(name, (1.5, 1.5))}


def _as_image(name, content, image, packed=False, labelled=True):
  """The file as an image; what has an odd affine has it in its label too."""

  def make(root):
    written = content() if packed else gzip.compress(content(), 1)
    label = f"labelsTr/{CASE}.nii.gz"
    folder(root, files={f"imagesTr/{CASE}_0000.nii.gz": written})
    if name in SPACING:
      (root / label).write_bytes(written)
    if not labelled:
      (root / label).unlink()
    return config_of(root), (None if image is None else _right(image, name))

  return make


def _as_label(content, mask, packed=False):
  def make(root):
    written = content() if packed else gzip.compress(content(), 1)
    folder(root, files={f"labelsTr/{CASE}.nii.gz": written})
    return config_of(root), (
      None if mask is None else {"image": MASK[..., :1], "mask": mask[..., 0]}
    )

  return make


def rows() -> list[Row]:
  found = []
  for name, content, image, mask in FILES:
    says = SAYS.get(name, "")
    found.append(Row("nifti", f"{name}, as image", _as_image(name, content, image), says))
    found.append(Row("nifti", f"{name}, as label", _as_label(content, mask)))
  for name, content, ok in PACKED:
    array = MASK if ok else None
    found.append(Row("nifti", f"{name}, as image", _as_image(name, content, array, True)))
    found.append(Row("nifti", f"{name}, as label", _as_label(content, array, True)))
  contents = {name: content for name, content, *_ in FILES}
  for name, image in UNLABELLED.items():
    make = _as_image(name, contents[name], image, labelled=False)
    found.append(Row("nifti", f"{name}, unlabelled", make))
  return found
