"""preference_file: lines as pairs of masks, or one line that names the file and its line."""

import types

import own_files
import pytest

from rndpo_jax import errors
from rndpo_jax.data import preference_file, records
from rndpo_jax.stages import mine_preferences

HEAD = ("image", "chosen", "rejected")
SPLIT_OF = {"im0": "unlabelled", "im1": "labelled", "im2": "val", "im3": "test"}
ENTRIES = [
  records.record(record_id=name, case_id=name, group_id=name, shape=own_files.SIZE, has_mask=True)
  for name in SPLIT_OF
]


def read(tiny_config, path):
  config = tiny_config(data__preferences=str(path))
  found, grids = preference_file.read(config, ENTRIES, SPLIT_OF)
  preference_file.check(found, grids, 2)
  return found


def folder(root):
  for n, name in enumerate(("good", "bad", "other")):
    own_files.write_mask(root / "masks" / f"{name}.png", own_files.mask(2, 2, 4 + n, 4))
  return root / "preferences.csv"


def write(root, *rows):
  return own_files.write_rows(folder(root), HEAD, rows)


def test_lines_become_pairs_in_their_order(tiny_config, tmp_path):
  """An image by path, channel or id; paths from the file's folder, or absolute."""
  good, bad = (tmp_path / "masks" / f"{name}.png" for name in ("good", "bad"))
  rows = [
    ("../images/im1.jpg", "masks/good.png", "masks/bad.png"),
    ("im0_0000.nii.gz", str(bad), "masks/../masks/good.png"),
    ("im1", "masks/bad.png", "masks/good.png"),  # another reader
  ]
  found = read(tiny_config, write(tmp_path, *rows))
  assert [item.image for item in found] == ["im1", "im0", "im1"]
  assert [item.chosen.resolve() for item in found] == [good, bad, bad]
  assert found[1].where.endswith("preferences.csv, line 3")
  dataset = types.SimpleNamespace(records=ENTRIES, tiles=None)
  items = mine_preferences.items_of(found, dataset, 1)
  assert items == [(0, (1,)), (1, (0,)), (1, (2,))]
  assert mine_preferences.items_of(found, dataset, 2) == [(0, (1,)), (1, (0, 2))]


def test_every_slice_of_a_volume_has_its_pairs():
  slices = [
    records.record(
      record_id=f"v#z{z:03d}", case_id="v", group_id="v", shape=(5, 4), slice_index=z, has_mask=True
    )
    for z in range(2)
  ]
  item = preference_file.Preference("v", None, None, "")
  dataset = types.SimpleNamespace(records=slices, tiles=None)
  assert mine_preferences.items_of([item, item], dataset, 4) == [(0, (0, 1)), (1, (0, 1))]


GOOD, BAD = "masks/good.png", "masks/bad.png"
REFUSED = {
  "unknown image": (("im9", GOOD, BAD), "line 2: the data set has no image 'im9'"),
  "held out for validation": (("im2", GOOD, BAD), "line 2: the image 'im2' is in the split 'val'"),
  "held out for test": (("im3", GOOD, BAD), "line 2: the image 'im3' is in the split 'test'"),
  "no such file": (("im0", GOOD, "masks/x.png"), "line 2: rejected: .*x.png: no such file"),
  "a folder": (("im0", "masks", BAD), "line 2: chosen: .*masks: no such file"),
  "no mask": (("im0", GOOD, "preferences.csv"), "line 2: rejected: .*not a format that masks are"),
  "the same file": (("im0", GOOD, "masks/../masks/good.png"), "line 2: chosen and rejected are"),
  "equal masks": (("im0", GOOD, "masks/same.png"), "line 2: .*hold the same mask"),
  "another size": (("im0", GOOD, "masks/small.png"), r"line 2: .*small.png: a mask of \(2, 2\)"),
  "unknown class id": (("im0", "masks/two.png", BAD), "line 2: .*two.png: the mask holds the val"),
  "empty cell": (("im0", GOOD, ""), "line 2: no rejected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_file_and_line(tiny_config, tmp_path, name):
  row, says = REFUSED[name]
  folder(tmp_path)
  for other, drawn in (
    ("same", own_files.mask(2, 2, 4, 4)), ("small", own_files.mask(0, 0, 1, 1)[:2, :2]),
    ("two", 2 * own_files.mask(0, 0, 3, 3)),
  ):  # fmt: skip
    own_files.write_mask(tmp_path / "masks" / f"{other}.png", drawn)
  with pytest.raises(errors.DataError, match=f"preferences.csv, {says}") as found:
    read(tiny_config, own_files.write_rows(tmp_path / "preferences.csv", HEAD, [row]))
  assert len(str(found.value).splitlines()) == 1
