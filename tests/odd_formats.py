"""Odd MetaImage and NRRD files, and pictures under nnU-Net's names, for `odd_inputs`."""

import gzip
import json
import struct
import zlib

import numpy as np
from odd_images import COLOUR, GREY, encode
from odd_inputs import CASE, Row
from odd_volumes import LABELS, MASK, config_of

_TYPES = {"uint8": "UCHAR", "int16": "SHORT", "float32": "FLOAT", "float64": "DOUBLE"}
_KINDS = {"uint8": "uint8", "int16": "int16", "float32": "float", "float64": "double"}
SPACING = (1.5, 1.5, 8)
FLAT = MASK[:, :, 0]
_BIG = np.zeros((1100, 1100, 1000), np.uint8)


def mha(array, voxels=None, **fields) -> bytes:
  """A file by hand; a field that is None is left out."""
  lines = {
    "ObjectType": "Image", "NDims": array.ndim, "BinaryData": "True",
    "ElementSpacing": SPACING[: array.ndim], "DimSize": array.shape,
    "ElementType": f"MET_{_TYPES[array.dtype.name]}", **fields,
  }  # fmt: skip
  lines.setdefault("ElementDataFile", "LOCAL")
  words = [
    f"{name} = {' '.join(map(str, value)) if isinstance(value, tuple) else value}\n"
    for name, value in lines.items()
    if value is not None
  ]
  return "".join(words).encode() + (array.tobytes("F") if voxels is None else voxels)


def nrrd(array, voxels=None, magic="NRRD0004", **fields) -> bytes:
  """A file by hand; '_' of a field's name is a space."""
  lines = {
    "type": _KINDS[array.dtype.name], "dimension": array.ndim,
    "sizes": " ".join(map(str, array.shape)), "spacings": "1.5 1.5 8", "encoding": "raw",
    "endian": "little", **fields,
  }  # fmt: skip
  words = [f"{name.replace('_', ' ')}: {v}\n" for name, v in lines.items() if v is not None]
  content = array.tobytes("F") if voxels is None else voxels
  return f"{magic}\n{''.join(words)}\n".encode() + content


def gipl(array, voxels=None, size=None, spacing=SPACING, magic=0xEFFFE9B0) -> bytes:
  """A file of bytes by hand; numbers are big-endian."""
  size = (*(size or array.shape), 1)[:4]
  head = struct.pack(">4HH3f", *size, 8, *spacing)
  content = array.tobytes("F") if voxels is None else voxels
  return head + bytes(252 - len(head)) + struct.pack(">I", magic) + content


def _zipped(array):
  content = zlib.compress(array.tobytes("F"))
  return mha(array, content, CompressedData="True", CompressedDataSize=len(content))


def _four(array):
  return np.stack([array] * 3, -1)


def _text(array):
  return " ".join(map(str, array.ravel("F"))).encode()


_NAN = np.where(MASK, np.nan, 0).astype(np.float32)
# (ending, name, content, what it is as an image, as a label; None: refused).
FILES = (
  (".mha", "plain", lambda: mha(MASK), MASK, MASK),
  (".mha", "compressed", lambda: _zipped(MASK), MASK, MASK),
  (".mha", "compressed, damaged", lambda: _zipped(MASK)[:-9] + bytes(9), None, None),
  (".mha", "big-endian",
   lambda: mha(MASK.astype(">i2"), BinaryDataByteOrderMSB="True"), MASK, MASK),
  (".mha", "as text", lambda: mha(MASK, _text(MASK), BinaryData="False"), None, None),
  (".mha", "floats", lambda: mha(MASK.astype(np.float64)), MASK, MASK),
  (".mha", "halves", lambda: mha(MASK / np.float32(2)), MASK / 2, None),
  (".mha", "values above the classes", lambda: mha(MASK * 9), MASK * 9, None),
  (".mha", "NaN", lambda: mha(_NAN), None, None),
  (".mha", "colour", lambda: mha(MASK, MASK.tobytes() * 3, ElementNumberOfChannels=3), None, None),
  (".mha", "truncated", lambda: mha(MASK)[:-40], None, None),
  (".mha", "half a header", lambda: mha(MASK)[:60], None, None),
  (".mha", "more data than the header says", lambda: mha(MASK) + bytes(999), MASK, MASK),
  (".mha", "no size", lambda: mha(MASK, DimSize=None), None, None),
  (".mha", "four axes", lambda: mha(_four(MASK), ElementSpacing=(1, 1, 1, 1)), None, None),
  (".mha", "another size", lambda: mha(MASK[:-1]), None, None),
  (".mha", "one voxel", lambda: mha(MASK[:1, :1, :1]), None, None),
  (".mha", "size of 0", lambda: mha(MASK, DimSize=(12, 0, 2)), None, None),
  (".mha", "negative size", lambda: mha(MASK, DimSize=(12, -12, 2)), None, None),
  (".mha", "size of 2000^3", lambda: mha(MASK, DimSize=(2000,) * 3), None, None),
  (".mha", "bomb of 1.2 x 10^9 voxels", lambda: _zipped(_BIG), None, None),
  (".mha", "spacing of 0", lambda: mha(MASK, ElementSpacing=(0, 1.5, 8)), None, None),
  (".mha", "negative spacing", lambda: mha(MASK, ElementSpacing=(-1.5, 1.5, 8)), None, None),
  (".mha", "spacing of NaN", lambda: mha(MASK, ElementSpacing=("nan", 1.5, 8)), None, None),
  (".mha", "directions of 0", lambda: mha(MASK, TransformMatrix=(0,) * 9), None, None),
  (".mha", "moved by 5 mm", lambda: mha(MASK, Offset=(5, 0, 0)), None, None),
  (".mha", "voxels in another file", lambda: mha(MASK, b"", ElementDataFile="a.raw"), None, None),
  (".mha", "a list of files", lambda: mha(MASK, b"a\nb\n", ElementDataFile="LIST"), None, None),
  (".mha", "empty file", lambda: b"", None, None),
  (".mha", "text", lambda: b"hello\n", None, None),
  (".nrrd", "plain", lambda: nrrd(MASK), MASK, MASK),
  (".nrrd", "compressed", lambda: nrrd(MASK, gzip.compress(MASK.tobytes("F")), encoding="gzip"),
   MASK, MASK),
  (".nrrd", "compressed, damaged",
   lambda: nrrd(MASK, gzip.compress(MASK.tobytes("F"))[:-12] + bytes(12), encoding="gzip"),
   None, None),
  (".nrrd", "as text", lambda: nrrd(MASK, _text(MASK), encoding="ascii"), MASK, MASK),
  (".nrrd", "vectors", lambda: nrrd(np.stack([MASK] * 3), kinds="vector domain domain domain",
   spacings="nan 1 1 1"), None, None),
  (".nrrd", "truncated", lambda: nrrd(MASK)[:-40], None, None),
  (".nrrd", "half a header", lambda: nrrd(MASK)[:60], None, None),
  (".nrrd", "voxels in another file", lambda: nrrd(MASK, b"", data_file="a.raw"), None, None),
  (".nrrd", "voxels in /dev/zero", lambda: nrrd(MASK, b"", datafile="/dev/zero"), None, None),
  (".nrrd", "no magic", lambda: nrrd(MASK, magic="NRRD"), None, None),
  (".nrrd", "unknown encoding", lambda: nrrd(MASK, encoding="jpeg"), None, None),
  (".nrrd", "size of 2000^3", lambda: nrrd(MASK, sizes="2000 2000 2000"), None, None),
  (".nrrd", "empty file", lambda: b"", None, None),
  (".mhd", "header of an .mha", lambda: mha(MASK), MASK, MASK),
  (".mhd", "voxels that are not there", lambda: mha(MASK, b"", ElementDataFile="no"), None, None),
  (".mhd", "voxels in a device", lambda: mha(MASK, b"", ElementDataFile="/dev/zero"), None, None),
  (".mhd", "numbered files", lambda: mha(MASK, b"", ElementDataFile="a%d.raw 1 2 1"), None, None),
  (".gipl", "plain", lambda: gipl(MASK), MASK, MASK),
  (".gipl", "more data than the header says", lambda: gipl(MASK) + bytes(99), MASK, MASK),
  (".gipl", "truncated", lambda: gipl(MASK)[:-40], None, None),
  (".gipl", "half a header", lambda: gipl(MASK)[:60], None, None),
  (".gipl", "no magic", lambda: gipl(MASK, magic=1), None, None),
  (".gipl", "four axes", lambda: gipl(_four(MASK)), None, None),
  (".gipl", "another size", lambda: gipl(MASK[:-1]), None, None),
  (".gipl", "size of 0", lambda: gipl(MASK, size=(12, 0, 2)), None, None),
  (".gipl", "size of 2000^3", lambda: gipl(MASK, size=(2000,) * 3), None, None),
  (".gipl", "spacing of NaN", lambda: gipl(MASK, spacing=(np.nan, 1.5, 8)), None, None),
  (".gipl", "empty file", lambda: b"", None, None),
  (".gipl", "text", lambda: b"hello\n", None, None),
  (".bmp", "plain", lambda: encode(FLAT, ending="bmp"), FLAT, FLAT),
  (".bmp", "colour", lambda: encode(COLOUR, ending="bmp"), None, None),
  (".bmp", "truncated", lambda: encode(GREY, ending="bmp")[:-9], None, None),
  (".bmp", "another size", lambda: encode(FLAT[:-1], ending="bmp"), None, None),
  (".png", "plain", lambda: encode(FLAT), FLAT, FLAT),
  (".png", "0 and 255", lambda: encode(FLAT * 255), FLAT * 255, FLAT),
  (".png", "colour", lambda: encode(COLOUR), None, None),
  (".png", "truncated", lambda: encode(GREY)[:60], None, None),
  (".png", "another size", lambda: encode(FLAT[:-1]), None, None),
  (".tif", "plain", lambda: encode(FLAT, ending="tif"), FLAT, FLAT),
  (".tif", "PNG inside", lambda: encode(FLAT), FLAT, FLAT),
  (".tif", "16 bits", lambda: encode(FLAT.astype(np.uint16) * 300, ending="tif"), FLAT * 300.0,
   None),
)  # fmt: skip
_WHOLE = {
  ".mha": lambda: mha(MASK), ".mhd": lambda: mha(MASK), ".nrrd": lambda: nrrd(MASK),
  ".gipl": lambda: gipl(MASK), ".bmp": lambda: encode(FLAT, ending="bmp"),
  ".png": lambda: encode(FLAT), ".tif": lambda: encode(FLAT, ending="tif"),
}  # fmt: skip


def _nnunet(ending, content, array, is_label):
  """Five whole cases and one with the file as image or label."""

  def make(root):
    info = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(info))
    for part in ("imagesTr", "labelsTr"):
      (root / part).mkdir()
    for name in (*"01234", CASE):
      for part, path in ((0, f"imagesTr/{name}_0000"), (1, f"labelsTr/{name}")):
        is_odd = name == CASE and part == is_label
        (root / f"{path}{ending}").write_bytes((content if is_odd else _WHOLE[ending])())
    if array is None:
      return config_of(root), None
    first = array if array.ndim == 2 else array[:, :, 0]
    right = {"mask": first} if is_label else {"image": first[..., None]}
    if ending not in (".png", ".bmp", ".tif"):
      right["spacing"] = SPACING[:2]
    return config_of(root), right

  return make


def rows() -> list[Row]:
  found = []
  for ending, name, content, image, label in FILES:
    kind = "nnunet" if ending in (".png", ".bmp", ".tif") else "itk"
    for array, is_label in ((image, False), (label, True)):
      what = f"{ending} {name}, as {'label' if is_label else 'image'}"
      found.append(Row(kind, what, _nnunet(ending, content, array, is_label)))
  return found
