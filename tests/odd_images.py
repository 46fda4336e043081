"""Odd PNG, JPEG and TIFF files, and odd file names, for `odd_inputs`."""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
from odd_inputs import CASE, Row
from PIL import Image, PngImagePlugin

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 255, (12, 12)).astype(np.uint8)
COLOUR = DRAW.integers(0, 255, (12, 12, 3)).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 200
MASK = np.zeros((12, 12), np.uint8)
MASK[3:9, 4:10] = 1


def encode(array, mode=None, ending="png", **options) -> bytes:
  image = array if isinstance(array, Image.Image) else Image.fromarray(array)
  image, content = image.convert(mode) if mode else image, io.BytesIO()
  image.save(content, {"tif": "tiff"}.get(ending, ending), **options)
  return content.getvalue()


def chunk(name: bytes, data: bytes, right=True) -> bytes:
  code = zlib.crc32(name + data) ^ (not right)
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", code)


def png(width, height, data=b"", bits=8, colour=0, extra=b"", right=True) -> bytes:
  """A PNG chunk by chunk; `data` are its raw rows, each after its filter's byte."""
  head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
  body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data, 9), right)
  return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


def paletted(transparency=None, colours=3):
  image = Image.fromarray(MASK)
  image = image.convert("P")
  image.putdata(MASK.ravel().tolist())
  image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0][: 3 * colours])
  return encode(image, **({} if transparency is None else {"transparency": transparency}))


def alpha(array, value):
  return np.concatenate([np.atleast_3d(array), np.full((12, 12, 1), value, np.uint8)], -1)


def comment():
  return png(12, 12, bytes(156), extra=chunk(b"tEXt", b"a\0" + b"x" * 10**6))


def flipped(content):
  """The same with a byte in its pixels changed."""
  place = content.index(b"IDAT") + 40
  return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def text_bomb():
  info = PngImagePlugin.PngInfo()
  info.add_text("a", "x" * (200 << 20), zip=True)
  return encode(GREY, pnginfo=info)


def lab():
  content = io.BytesIO()
  Image.new("LAB", (12, 12)).save(content, "tiff")
  return content.getvalue()


def big_endian(array):
  """A TIFF of 16 bits, most significant byte first, tag by tag."""
  tags = ((256, 12), (257, 12), (258, 16), (259, 1), (262, 1), (273, 134), (277, 1), (278, 12))
  entries = [struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
  entries.append(struct.pack(">HHII", 279, 4, 1, 288))
  entries.append(struct.pack(">HHIHH", 339, 3, 1, 1, 0))
  head = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", len(entries))
  return head + b"".join(entries) + bytes(4) + array.astype(">u2").tobytes()


def tif(array, **options):
  return encode(array, ending="tif", **options)


def pages(ending):
  return encode(MASK, ending=ending, save_all=True, append_images=[Image.fromarray(MASK * 3)] * 2)


RED = np.stack([MASK * 255, MASK * 0, MASK * 0], -1)
GREY3 = np.repeat(MASK[..., None], 3, -1)
NINE = MASK * 0 + 9
# (name, ending, content, what it is as an image, what it is as a mask; None: must be refused).
FILES = (
  ("grey", "png", lambda: encode(MASK), MASK, MASK),
  ("1 bit", "png", lambda: encode(MASK * 255, "1"), MASK * 255, MASK),
  ("16 bits", "png", lambda: encode(MASK.astype(np.uint16) * 300), MASK * 300.0, None),
  ("colour of 16 bits", "png", lambda: png(12, 12, bytes(12 * 73), 16, 2), None, None),
  ("grey and alpha of 16 bits", "png", lambda: png(12, 12, bytes(12 * 49), 16, 4), None, None),
  ("colour, all equal", "png", lambda: encode(GREY3), GREY3, MASK),
  ("colour", "png", lambda: encode(RED), RED, None),
  ("palette", "png", paletted, RED, MASK),
  ("palette, one colour transparent", "png", lambda: paletted(0), None, MASK),
  ("grey, opaque alpha", "png", lambda: encode(MASK, "LA"), MASK, None),
  ("colour, opaque alpha", "png", lambda: encode(alpha(RED, 255)), RED, None),
  ("colour, alpha in use", "png", lambda: encode(alpha(RED, 7)), None, None),
  ("no data", "png", lambda: png(12, 12), None, None),
  ("EXIF turn", "png", lambda: encode(MASK, exif=exif(6)), MASK, MASK),
  ("0 and 255", "png", lambda: encode(MASK * 255), MASK * 255, MASK),
  ("values above the classes", "png", lambda: encode(MASK * 7), MASK * 7, None),
  ("wrong checksum, right pixels", "png", lambda: png(12, 12, bytes(156), right=False),
   MASK * 0, MASK * 0),
  ("damaged pixels", "png", lambda: flipped(encode(GREY)), None, None),
  ("truncated", "png", lambda: encode(GREY)[:-60], None, None),
  ("too few rows", "png", lambda: png(12, 12, bytes(40)), None, None),
  ("too many rows", "png", lambda: png(12, 12, bytes(13 * 500)), MASK * 0, MASK * 0),
  ("empty file", "png", lambda: b"", None, None),
  ("text in place of an image", "png", lambda: b"hello\n", None, None),
  ("no pixel", "png", lambda: png(0, 0), None, None),
  ("one pixel", "png", lambda: encode(GREY[:1, :1]), None, None),
  ("width above 2^31", "png", lambda: png(2**31, 1), None, None),
  ("bomb of 10^10 pixels", "png", lambda: png(10**5, 10**5), None, None),
  ("bomb of 1.7 x 10^8 pixels", "png", lambda: png(13000, 13000, bytes(13001 * 13000)), None, None),
  ("bomb of text", "png", text_bomb, None, None),
  ("comment of 1 MB", "png", comment, MASK * 0, MASK * 0),
  ("animation", "png", lambda: pages("png"), None, None),
  ("JPEG inside", "png", lambda: encode(NINE, ending="jpeg"), NINE, None),
  ("GIF inside", "png", lambda: encode(MASK, ending="gif"), None, None),
  ("PostScript inside", "png", lambda: encode(GREY3, ending="eps"), None, None),
  ("an ending in capitals", "PNG", lambda: encode(MASK), MASK, MASK),
  ("grey", "jpg", lambda: encode(NINE, ending="jpeg"), NINE, None),
  ("EXIF turn", "jpg", lambda: encode(NINE, ending="jpeg", exif=exif(6)), NINE, None),
  ("CMYK", "jpg", lambda: encode(COLOUR, "CMYK", "jpeg"), None, None),
  ("truncated", "jpg", lambda: encode(COLOUR, ending="jpeg")[:-80], None, None),
  ("grey", "tif", lambda: tif(MASK), MASK, MASK),
  ("three pages", "tif", lambda: pages("tif"), None, None),
  ("big-endian 16 bits", "tif", lambda: big_endian(MASK * 999.0), MASK * 999.0, None),
  ("big-endian class ids", "tif", lambda: big_endian(MASK), MASK, MASK),
  ("32 bits", "tif", lambda: tif(MASK.astype(np.int32) * 70000), MASK * 70000.0, None),
  ("floats", "tif", lambda: tif(MASK.astype(np.float32) / 2), MASK / 2, None),
  ("NaN", "tif", lambda: tif(np.where(MASK, np.nan, 1).astype(np.float32)), None, None),
  ("LZW", "tif", lambda: tif(MASK, compression="tiff_lzw"), MASK, MASK),
  ("orientation 6", "tif", lambda: tif(MASK, tiffinfo={274: 6}), np.rot90(MASK, -1),
   np.rot90(MASK, -1)),
  ("CMYK", "tif", lambda: encode(COLOUR, "CMYK", "tif"), None, None),
  ("LAB", "tif", lab, None, None),
  ("truncated", "tif", lambda: tif(GREY)[:60], None, None),
  ("directory that points at itself", "tif", lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0", None, None),
)  # fmt: skip


def folder(root: pathlib.Path, **parts) -> None:
  """Five whole cases and, as far as given, the files of a sixth: images, masks = (name, bytes)."""
  colour = parts.pop("colour", False)
  for part in ("images", "masks"):
    (root / part).mkdir()
    for n in range(5):
      image = np.repeat(GREY[..., None], 3, -1) if colour else GREY
      (root / part / f"{n}.png").write_bytes(encode(MASK if part == "masks" else image))
    if part in parts:
      name, content = parts[part]
      (root / part / name).write_bytes(content)


def _config(root, **changes):
  return {
    "data.source": "folder", "data.root": str(root), "data.phantom.num_cases": 152,
    "data.phantom.size": (72, 80), **changes,
  }  # fmt: skip


# What Pillow raises of a header that it cannot read, or will not.
_UNREADABLE = (
  OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def _as_image(content, ending, image):
  def make(root):
    written = content()
    try:
      colour = Image.open(io.BytesIO(written)).mode in ("RGB", "RGBA", "P", "CMYK", "LAB")
    except _UNREADABLE:
      colour = False
    folder(root, colour=colour, images=(f"{CASE}.{ending}", written))
    right = None if image is None else {"image": image if image.ndim == 3 else image[..., None]}
    return _config(root), right

  return make


def _as_mask(content, ending, mask):
  def make(root):
    folder(root, images=(f"{CASE}.png", encode(GREY)), masks=(f"{CASE}.{ending}", content()))
    return _config(root), (None if mask is None else {"image": GREY[..., None], "mask": mask})

  return make


def _named(name, ok):
  """Image and mask of an odd name."""

  def make(root):
    folder(root)
    for part in ("images", "masks"):
      path = os.path.join(os.fsencode(root / part), os.fsencode(name))
      with open(path, "wb") as file:
        file.write(encode(MASK))
    changes = {"data.case_pattern": rf"({CASE}|\d)"}
    return _config(root, **changes), ({"image": MASK[..., None], "mask": MASK} if ok else None)

  return make


def _special(part, make_it, ok=False):
  """Something that is no regular file in the place of one; `make_it` is given its path."""

  def make(root):
    folder(root, images=(f"{CASE}.png", encode(GREY)), masks=(f"{CASE}.png", encode(MASK)))
    path = root / part / f"{CASE}.png"
    path.rename(root / "kept.png")
    make_it(path)
    return _config(root), ({"image": GREY[..., None], "mask": MASK} if ok else None)

  return make


NAMES = (
  ("spaces in a name", f" {CASE} .png", True),
  ("quotes in a name", f"'{CASE}\".png", True),
  ("a formula as a name", f"={CASE}.png", True),
  ("percent and braces in a name", f"%s{{{CASE}}}.png", True),
  ("a name of 250 bytes", f"{CASE}{'x' * 243}.png", True),
  ("a name in Japanese", f"{CASE}\u982d\u90e8.png", True),
  ("an emoji in a name", f"{CASE}\U0001f469\u200d\u2695\ufe0f.png", True),
  ("markup in a name", f"<b>{CASE}&amp;.png", True),
  ("a dash before a name", f"-{CASE}.png", True),
  ("a name of dots", f"{CASE}..a.b.png", True),
  ("line break in a name", f"{CASE}\nerror: x.png", False),
  ("a bell in a name", f"{CASE}\a.png", False),
  ("a line separator in a name", f"{CASE}\u2028.png", False),
  ("a name that is no UTF-8", CASE.encode() + b"\xff.png", False),
  ("an escape sequence in a name", f"{CASE}\x1b[2J.png", False),
)
SPECIAL = (
  ("FIFO", os.mkfifo, False), ("symlink loop", lambda path: path.symlink_to(path.name), False),
  ("broken symlink", lambda path: path.symlink_to("nowhere.png"), False),
  ("symlink to /dev/zero", lambda path: path.symlink_to("/dev/zero"), False),
  ("folder", lambda path: path.mkdir(), False),
  ("symlink", lambda path: path.symlink_to("../kept.png"), True),
)  # fmt: skip


def _twins(root):
  """One id written in two ways: images é.png composed, and decomposed."""
  folder(root)
  for n, name in enumerate(("\u00e9.png", "e\u0301.png")):
    for part in ("images", "masks"):
      (root / part / name).write_bytes(encode(MASK + n))
  return _config(root), None


def _decomposed_mask(root):
  folder(root)
  (root / "images" / f"{CASE}\u00e9.png").write_bytes(encode(GREY))
  (root / "masks" / f"{CASE}e\u0301.png").write_bytes(encode(MASK))
  return _config(root, **{"data.case_pattern": rf"({CASE}|\d)"}), {
    "image": GREY[..., None],
    "mask": MASK,
  }


def _size_of_mask(root):
  folder(root, images=(f"{CASE}.png", encode(GREY)), masks=(f"{CASE}.png", encode(MASK[:-1])))
  return _config(root), None


def rows() -> list[Row]:
  found = []
  for name, ending, content, image, mask in FILES:
    kind = ending.lower().replace("jpg", "jpeg").replace("tif", "tiff")
    says = "orientation 6" if "EXIF" in name or "orientation" in name else ""
    found.append(Row(kind, f"{name}, as image", _as_image(content, ending, image), says))
    if kind != "jpeg":  # none is taken as a mask
      found.append(Row(kind, f"{name}, as mask", _as_mask(content, ending, mask)))
  found.append(Row("jpeg", "as mask", _as_mask(lambda: encode(MASK, ending="jpeg"), "jpg", None)))
  found += [Row("file", name, _named(file, ok)) for name, file, ok in NAMES]
  for name, make_it, ok in SPECIAL:
    for part in ("images", "masks"):
      found.append(Row("file", f"{name} as {part[:-1]}", _special(part, make_it, ok)))
  of_twins = Row("file", "image and mask, twins in Unicode", _decomposed_mask)
  found += [Row("file", "twins in Unicode", _twins), of_twins]
  return [*found, Row("file", "mask of another size", _size_of_mask)]
