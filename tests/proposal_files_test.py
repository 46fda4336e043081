"""proposal_files and mask_files: masks and scores as they came, or one line that says where."""

import nibabel
import numpy as np
import own_files
import pytest
from PIL import Image

from rndpo_jax import errors
from rndpo_jax.data import geometry, mask_files, proposal_files, records

IDS = [f"im{n}" for n in range(4)]
HEAD = ("image", "proposal", "score")
ENTRIES = [
  records.record(record_id=name, case_id=name, group_id=name, shape=own_files.SIZE, has_mask=False)
  for name in IDS
]
SLICES = [
  records.record(
    record_id=f"v#z{z:03d}", case_id="v", group_id="v", shape=(5, 4), slice_index=z, has_mask=False
  )
  for z in range(3)
]


class Dataset:
  """What `make_load` reads."""

  num_classes, size, crop, native, tiles = 2, (16, 16), (20, 16), None, None

  def __init__(self, entries):
    self.records = entries


def config_of(tiny_config, root, **changes):
  options = {"proposals__mix": "file:3", "judge__name": "file", "judge__compare": ("agreement",)}
  return tiny_config(data__proposals=str(root), **{**options, **changes})


def read(tiny_config, root, entries=ENTRIES, **changes):
  found = proposal_files.open_files(config_of(tiny_config, root, **changes), entries)
  proposal_files.check(found, 2)
  return found


def test_masks_and_scores_come_as_they_are_and_missing_ones_are_filled(tiny_config, tmp_path):
  missing = {("im1", "g2"), ("im2", "g2"), ("im2", "g10"), ("im3", "g1")}
  missing |= {("im2", "g1")}
  root = own_files.proposals(tmp_path, IDS, ("g10", "g2", "g1"), missing)
  for name in IDS:  # another format for one generator
    path = root / "g1" / f"{name}.png"
    if path.exists():
      Image.open(path).save(path.with_suffix(".tif"))
      path.unlink()
  (root / "g1" / "dataset.json").write_text("{}")  # as nnU-Net leaves beside its masks
  (root / ".DS_Store").write_text("")
  rows = (root / "scores.csv").read_text().splitlines()  # quoted, and with a space before
  rows = [", ".join(f'"{cell}"' for cell in row.split(",")) for row in rows]
  (root / "scores.csv").write_text("\n".join(rows))
  found = read(tiny_config, root)
  assert found.names == ("g1", "g2", "g10")
  load = proposal_files.make_load(found, Dataset(ENTRIES))
  heights = {"g10": 2, "g2": 3, "g1": 4}
  for place, name in enumerate(IDS):
    got = load(place)
    there = [(name, generator) not in missing for generator in found.names]
    assert got.present.tolist() == there
    drawn = [own_files.mask(4, 3 + place % 4, heights[g], 5) for g in found.names]
    drawn = [geometry.mask_to_model(m, Dataset.size, Dataset.crop) for m in drawn]
    stand_in = next((m for m, is_there in zip(drawn, there, strict=True) if is_there), 0 * drawn[0])
    for n, generator in enumerate(found.names):
      np.testing.assert_array_equal(got.masks[n], drawn[n] if there[n] else stand_in)
      score = np.float32(0.1 * heights[generator]) if there[n] else np.float32(np.nan)
      np.testing.assert_array_equal(got.scores[n], score)
  assert load(2).present.sum() == 0 and load(2).masks.max() == 0


def test_the_fingerprint_is_of_content_alone(tiny_config, tmp_path):
  one = own_files.proposals(tmp_path / "one", IDS)
  two = own_files.proposals(tmp_path / "two", IDS[::-1])
  for name in IDS[::-1]:  # the masks of `one`, written in another order
    for generator in "abc":
      (two / generator / f"{name}.png").write_bytes((one / generator / f"{name}.png").read_bytes())
  prints = [proposal_files.fingerprint(read(tiny_config, root)) for root in (one, two)]
  assert prints[0] == prints[1]
  lines = (two / "scores.csv").read_text().splitlines()
  lines[1] = lines[1].rpartition(",")[0] + ",0.77"
  (two / "scores.csv").write_text("\n".join(lines))
  assert proposal_files.fingerprint(read(tiny_config, two)) != prints[0]
  own_files.write_mask(one / "a" / "im0.png", own_files.mask(0, 0, 1, 1))
  assert proposal_files.fingerprint(read(tiny_config, one)) != prints[0]


def nifti(path, drawn, affine=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(nibabel.Nifti1Image(drawn, np.eye(4) if affine is None else affine), path)
  return path


def test_a_volume_is_the_masks_of_its_slices(tiny_config, tmp_path):
  volume = np.random.default_rng(0).integers(0, 2, (5, 4, 3)).astype(np.uint8)
  for name in ("a", "b"):
    nifti(tmp_path / name / "v.nii.gz", volume if name == "a" else 1 - volume)
  own_files.write_rows(tmp_path / "scores.csv", HEAD, [("v", "a", 0.25), ("v", "b", -3)])
  found = read(tiny_config, tmp_path, SLICES, proposals__mix="file:2", mine__pairs_per_image=1)
  assert found.grids == {"v": mask_files.Grid((5, 4, 3), 0)}
  dataset = Dataset(SLICES)
  dataset.size, dataset.crop = (5, 4), ()
  load = proposal_files.make_load(found, dataset)
  for z in range(3):
    np.testing.assert_array_equal(load(z).masks, [volume[..., z], 1 - volume[..., z]])
    assert load(z).scores.tolist() == [0.25, -3.0]


def test_a_volume_of_another_place_is_refused(tmp_path):
  volume, grid = np.zeros((5, 4, 3), np.uint8), mask_files.Grid((5, 4, 3), 0)
  affine = np.diag([2.0, 2.0, 2.0, 1.0])
  path = nifti(tmp_path / "v.nii.gz", volume, affine)
  np.testing.assert_array_equal(mask_files.check(path, grid, 2, lambda index: affine), volume)
  mask_files.check(path, grid, 2, lambda index: np.eye(4))  # unknown
  flipped = affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
  with pytest.raises(errors.DataError, match="scores.csv, line 3: .*v.nii.gz: its header places"):
    mask_files.check(path, grid, 2, lambda index: flipped, "scores.csv, line 3")


def lines_of(root):
  return (root / "scores.csv").read_text().splitlines()


def with_line(number, text):
  def change(root):
    lines = lines_of(root)
    lines[number - 1] = text
    (root / "scores.csv").write_text("\n".join(lines))

  return change


def add_line(text):
  return lambda root: (root / "scores.csv").write_text("\n".join([*lines_of(root), text]))


def drawn_mask(name, drawn):
  return lambda root: own_files.write_mask(root / name, np.asarray(drawn, np.uint8))


def moved(old, new):
  return lambda root: (root / old).rename(root / new)


def written(name, content):
  return lambda root: (root / name).write_bytes(content)


# Of four images and the proposals a, b, c, lines 2 to 13: what is done, and what must be said.
REFUSED = {
  "no scores": (lambda root: (root / "scores.csv").unlink(), "scores.csv: no such file"),
  "empty file": (written("scores.csv", b""), "line 1: found 0 columns 'image' among none"),
  "another head": (with_line(1, "image,proposal,dice"), "line 1: found 0 columns 'score'"),
  "a column twice": (with_line(1, "image,image,score"), "line 1: found 2 columns 'image'"),
  "head alone": (written("scores.csv", b"image,proposal,score\n"), "no row under the column names"),
  "no text": (written("scores.csv", b"image,proposal,score\n\xff"), "cannot be read as CSV"),
  "missing score": (with_line(4, "im0,c,"), "scores.csv, line 4: no score"),
  "missing cell": (with_line(4, "im0,c"), "scores.csv, line 4: no score"),
  "a comma too many": (with_line(4, "im0,c,0,5"), "scores.csv, line 4: 4 cells under 3 column"),
  "missing line": (with_line(4, ""), "scores.csv: no score of .*im0.png .* proposal 'c'"),
  "NaN": (with_line(3, "im0,b,nan"), "scores.csv, line 3: score 'nan'; expected a finite number"),
  "infinite": (with_line(3, "im0,b,1e39"), "scores.csv, line 3: score '1e39'"),
  "a word": (with_line(3, "im0,b,good"), "scores.csv, line 3: score 'good'"),
  "unknown image": (add_line("im9,b,1"), "scores.csv, line 14: the data set has no image 'im9'"),
  "unknown proposal": (add_line("im0,d,1"), "line 14: no proposal 'd'; .* the folders a, b, c"),
  "two scores": (add_line("im0,b,1"), "line 14: a second score .* beside .*scores.csv, line 3"),
  "score without mask": (
    lambda root: (root / "b/im0.png").unlink(), "scores.csv, line 3: a score, but .* has no mask",
  ),
  "line break in a name": (add_line('"im\n0",b,1'), "line 15: the name .* holds line breaks"),
  "mask of an unknown image": (drawn_mask("a/im9.png", [[0, 1]]), "a/im9.png: the data set has no"),
  "another size": (
    drawn_mask("b/im0.png", [[0, 1]]),
    r"scores.csv, line 3: .*b/im0.png: a mask of \(1, 2\) pixels for an image of \(20, 18\)",
  ),
  "unknown class id": (
    drawn_mask("b/im0.png", own_files.mask(0, 0, 3, 3) * 2),
    "scores.csv, line 3: .*b/im0.png: the mask holds the value 2; expected class ids 0..1",
  ),
  "no image file": (written("b/im0.png", b"x"), "line 3: .*b/im0.png: no readable header"),
  "JPEG": (moved("b/im0.png", "b/im0.jpg"), "b/im0.jpg: not a format that masks are taken in"),
  "two of one id": (
    drawn_mask("b/im0.tif", own_files.mask(0, 0, 3, 3)), "im0.tif: second mask of the id 'im0'",
  ),
  "a folder too few": (moved("c", ".c"), r"2 folders of masks \(a, b\), but .* file:3.*set file:2"),
  "no folder": (lambda root: root.rename(f"{root}.away"), "no such folder; expected one with"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_file_and_line(tiny_config, tmp_path, name):
  change, says = REFUSED[name]
  root = own_files.proposals(tmp_path / "own", IDS)
  read(tiny_config, root)
  change(root)
  with pytest.raises(errors.DataError, match=says) as found:
    read(tiny_config, root)
  assert len(str(found.value).splitlines()) == 1


def test_without_the_judge_scores_are_not_read(tiny_config, tmp_path):
  root = own_files.proposals(tmp_path, IDS, scores=False)
  found = read(tiny_config, root, judge__name="agreement")
  assert found.scores is None
  assert np.isnan(proposal_files.make_load(found, Dataset(ENTRIES))(0).scores).all()
