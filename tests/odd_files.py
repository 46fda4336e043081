"""Odd proposals, scores and preferences beside whole images, for `odd_inputs`."""

import os

import odd_images
from odd_images import GREY, MASK, encode, png
from odd_inputs import CASE, Row

SCORES, LINES = "proposals/scores.csv", "preferences.csv"
_OWN = {"proposals.mix": "file:2", "judge.name": "file", "judge.compare": ("agreement",)}
_READERS = {"proposals.mix": "base:1,tta+threshold:7", "judge.num_bootstrap": 1000,
            "judge.gate.action": "refuse"}  # fmt: skip


def _folder(root) -> None:
  """A sixth image without a mask, two proposals of it with scores, and one preference."""
  odd_images.folder(root, images=(f"{CASE}.png", encode(GREY)))
  for n, name in enumerate("ab"):
    (root / "proposals" / name).mkdir(parents=True)
    (root / "proposals" / name / f"{CASE}.png").write_bytes(encode((1 - n) * MASK))
  (root / SCORES).write_text(f"image,proposal,score\n{CASE},a,1\n{CASE},b,2\n")
  line = ",".join([f"images/{CASE}.png", *(f"proposals/{n}/{CASE}.png" for n in "ab")])
  (root / LINES).write_text(f"image,chosen,rejected\n{line}\n")


def _with(change, ok=False, readers=False):
  """Changes the folder; the image itself is taken as it is if `ok`."""

  def make(root):
    _folder(root)
    change(root)
    own = {"data.preferences": str(root / LINES), **_READERS} if readers else _OWN
    where = (
      {} if readers else {"data.proposals": str(root / "proposals"), "mine.pairs_per_image": 1}
    )
    return odd_images._config(root, **own, **where), ({"image": GREY[..., None]} if ok else None)

  return make


def _put(name, content):
  return lambda root: (root / name).write_bytes(content)


def _special(name, make_it):
  def change(root):
    (root / name).unlink()
    make_it(root / name)

  return change


def _more(name, text):
  def change(root):
    (root / name).write_text((root / name).read_text() + text)

  return change


def _zeros(path):
  path.symlink_to("/dev/zero")


def _nothing(root):
  pass


_A = f"proposals/a/{CASE}.png"
SCORE_FILES = (
  ("as they should be", _with(_nothing, True)),
  ("BOM and CRLF", _with(
    _put(SCORES, b"\xef\xbb\xbfimage,proposal,score\r\nodd,a,1\r\nodd,b,2\r\n"), True)),
  ("other columns beside them", _with(_put(SCORES, b"x,score,image,proposal\n,1,odd,a\n,2,odd,b\n"),
                                      True)),
  ("semicolons", _with(_put(SCORES, b"image;proposal;score\nodd;a;1\nodd;b;2\n"))),
  ("decimal comma", _with(_put(SCORES, b"image,proposal,score\nodd,a,0,5\nodd,b,1\n"))),
  ("UTF-16", _with(_put(SCORES, "image,proposal,score\n".encode("utf-16")))),
  ("null bytes", _with(_put(SCORES, b"image,proposal,score\nodd,a,\0\n"))),
  ("an open quote", _with(_more(SCORES, '"odd,a,1\n'))),
  ("a cell of 10^6 letters", _with(_more(SCORES, "x" * 10**6 + ",a,1\n"))),
  ("a number of 10^5 digits", _with(_more(SCORES, "odd,a," + "9" * 10**5 + "\n"))),
  ("a formula", _with(_more(SCORES, "=1+1,a,1\n"))),
  ("an escape sequence", _with(_more(SCORES, "\x1b[2J,a,1\n"))),
  ("FIFO", _with(_special(SCORES, os.mkfifo))),
  ("symlink to /dev/zero", _with(_special(SCORES, _zeros))),
  ("folder", _with(_special(SCORES, lambda path: path.mkdir()))),
  ("missing", _with(_special(SCORES, _nothing))),
)  # fmt: skip
MASKS = (
  ("bomb of 10^10 pixels", _with(_put(_A, png(10**5, 10**5)))),
  ("truncated", _with(_put(_A, encode(MASK)[:60]))),
  ("colour", _with(_put(_A, encode(odd_images.COLOUR)))),
  ("0 and 255", _with(_put(_A, encode(255 * MASK)), True)),
  ("class 2", _with(_put(_A, encode(2 * MASK)))),
  ("another size", _with(_put(_A, encode(MASK[:-1])))),
  ("FIFO", _with(_special(_A, os.mkfifo))),
  ("broken symlink", _with(_special(_A, lambda path: path.symlink_to("nowhere.png")))),
  ("NIfTI that is none", _with(_put("proposals/a/0.nii.gz", b"x"))),
  ("one of an unknown image", _with(_put("proposals/a/none.png", encode(MASK)))),
  ("line break in a name", _with(_put("proposals/a/a\nb.png", encode(MASK)))),
  ("a third folder", _with(lambda root: (root / "proposals/c").mkdir())),
  ("symlink loop as folder", _with(lambda root: (root / "proposals/c").symlink_to("c"), True)),
)  # fmt: skip


def _line(text):
  return _with(_more(LINES, text + "\n"), readers=True)


_B = f"proposals/b/{CASE}.png"
_PAIR = f"{_A},{_B}"
PREFERENCES = (
  ("as it should be", _with(_nothing, True, readers=True)),
  ("a device as mask", _line(f"{CASE},/dev/zero,{_B}")),
  ("a folder as mask", _line(f"{CASE},proposals,{_B}")),
  ("an unknown image", _line(f"nobody,{_PAIR}")), ("a path of dots", _line(f"..,{_PAIR}")),
  ("masks swapped", _with(_more(LINES, f"{CASE},{_B},{_A}\n"), True, True)),
  ("one mask twice", _line(f"{CASE},{_A},{_A}")),
  ("two columns", _line(f"{CASE},{_A}")),
  ("a name of 10^4 letters", _line(f"{CASE},{'x' * 10**4},{_B}")),
  ("a null byte in a path", _line(f"{CASE},a\0b,{_B}")),
  ("head alone", _with(_put(LINES, b"image,chosen,rejected\n"), readers=True)),
  ("symlink to /dev/zero", _with(_special(LINES, _zeros), readers=True)),
)  # fmt: skip


def rows() -> list[Row]:
  tables = {"scores": SCORE_FILES, "masks": MASKS, "lines": PREFERENCES}
  return [Row(kind, *entry) for kind, table in tables.items() for entry in table]
