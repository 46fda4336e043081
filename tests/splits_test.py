import json

import pytest
from etils import epath

from rndpo_jax import errors
from rndpo_jax.data import records, splits

COUNTS = {"num_labelled": 2, "num_val": 1, "num_test": 2, "num_unlabelled": -1, "seed": 0}


def _entries(groups=8, cases=2, bare=()):
  """Two slices a case; `bare` names cases whose second slice has no mask."""
  return [
    records.record(
      record_id=f"g{g}c{c}z{z}",
      case_id=f"g{g}c{c}",
      group_id=f"g{g}",
      shape=(4, 4),
      has_mask=f"g{g}c{c}" not in bare or z == 0,
    )
    for g in range(groups)
    for c in range(cases)
    for z in range(2)
  ]


def _make(entries, **changes):
  return splits.make_splits(entries, **{**COUNTS, **changes})


def _groups(cases):
  return {case[:2] for case in cases}


def test_groups_stay_together_and_none_is_lost():
  parts = _make(_entries())
  assert list(parts) == list(splits.NAMES)
  assert {name: len(_groups(cases)) for name, cases in parts.items()} == {
    "labelled": 2, "unlabelled": 3, "val": 1, "test": 2,
  }  # fmt: skip
  every = [case for cases in parts.values() for case in cases]
  assert sorted(every) == sorted({e["case_id"] for e in _entries()})
  groups = [group for cases in parts.values() for group in _groups(cases)]
  assert len(groups) == len(set(groups))


def test_the_seed_decides_and_the_order_of_records_does_not():
  assert _make(_entries()) == _make(_entries()[::-1])
  assert any(_make(_entries()) != _make(_entries(), seed=seed) for seed in range(1, 4))


def test_more_labels_keep_those_there_are_and_test_and_val():
  few, more = _make(_entries()), _make(_entries(), num_labelled=4)
  assert set(few["labelled"]) < set(more["labelled"])
  assert few["test"] == more["test"] and few["val"] == more["val"]


def test_a_group_with_a_record_without_mask_is_unlabelled():
  for seed in range(5):
    parts = _make(_entries(bare=("g3c1",)), seed=seed)
    assert {"g3c0", "g3c1"} <= set(parts["unlabelled"])


def test_unlabelled_can_be_limited():
  assert len(_groups(_make(_entries(), num_unlabelled=1)["unlabelled"])) == 1
  assert _make(_entries(), num_unlabelled=0)["unlabelled"] == []


def test_there_may_be_neither_validation_nor_test(tmp_path):
  parts = _make(_entries(), num_val=0, num_test=0)
  assert parts["val"] == parts["test"] == [] and len(_groups(parts["unlabelled"])) == 6
  path = epath.Path(tmp_path / "splits.json")
  path.write_text(json.dumps(parts))
  assert splits.read_split_file(path, _entries()) == parts


def test_more_labels_asked_for_than_there_are():
  with pytest.raises(errors.DataError, match="num_labelled=6.*9 groups with masks, found 8 of 8"):
    _make(_entries(), num_labelled=6)
  with pytest.raises(errors.DataError, match="found 4 of 8"):
    _make(_entries(bare=("g0c0", "g1c0", "g2c0", "g3c0")))


def test_no_unlabelled_left_or_too_few():
  with pytest.raises(errors.DataError, match="num_unlabelled"):
    _make(_entries(groups=5))
  with pytest.raises(errors.DataError, match="found 4, but 3 groups"):
    _make(_entries(), num_unlabelled=4)


def _file(tmp_path, **changes):
  content = {
    "labelled": ["g0c0", "g0c1"], "unlabelled": ["g1c0"], "val": ["g2c0"], "test": ["g3c0"],
  }  # fmt: skip
  path = tmp_path / "mine.json"
  path.write_text(json.dumps({**content, **changes}))
  return path


def test_split_file_is_taken_as_it_is(tmp_path):
  parts = splits.read_split_file(_file(tmp_path), _entries())
  assert parts["labelled"] == ["g0c0", "g0c1"] and parts["test"] == ["g3c0"]


FOLD = {"train": (0, 1), "val": (2, 3)}


def test_ids_are_compared_in_their_composed_form(tmp_path):
  """As sources have them: a list that was written on macOS may hold the other one."""
  entries = [{**one, "case_id": f"\u00f6{one['case_id']}"} for one in _entries()]
  there = json.loads(_file(tmp_path).read_text())
  there = {name: [f"o\u0308{case}" for case in cases] for name, cases in there.items()}
  assert splits.read_split_file(_file(tmp_path, **there), entries)["test"] == ["\u00f6g3c0"]
  fold = [{name: [f"o\u0308g{g}c{c}" for g in part for c in (0, 1)] for name, part in FOLD.items()}]
  (tmp_path / "folds.json").write_text(json.dumps(fold))
  asked = {"fold": 0, "num_labelled": 1, "num_test": 1, "num_unlabelled": -1, "seed": 0}
  parts = splits.read_fold(tmp_path / "folds.json", entries, **asked)
  assert sorted(parts["val"] + parts["test"])[0] == "\u00f6g2c0"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"val": ["g9c0"]}, "unknown case id 'g9c0' in 'val'"),
    ({"val": [["g2c0"]]}, r"unknown case id \['g2c0'\] in 'val'"),
    ({"val": ["g0c0"]}, "'g0c0' stands in 'labelled' and in 'val'"),
    ({"val": ["g2c0", "g2c0"]}, "'g2c0' stands in 'val' and in 'val'"),
    ({"val": ["g3c1"]}, "one group, 'g3'"),
    ({"labelled": []}, "'labelled' is no list of case ids, or an empty one"),
    ({"val": "g2c0"}, "'val' is no list"),
    ({"train": ["g4c0"]}, "found the keys"),
    ({"test": ["g4c0"]}, "'g4c0' in 'test' has a record without mask"),
  ],
)
def test_split_files_that_cannot_be(tmp_path, changes, message):
  with pytest.raises(errors.DataError, match=f"mine.json.*{message}"):
    splits.read_split_file(_file(tmp_path, **changes), _entries(bare=("g4c0",)))


def test_split_file_that_is_missing_or_no_json(tmp_path):
  with pytest.raises(errors.DataError, match="nothing.json: no such file"):
    splits.read_split_file(tmp_path / "nothing.json", _entries())
  path = tmp_path / "text.json"
  path.write_text("labelled: a")
  with pytest.raises(errors.DataError, match="text.json: cannot be read as JSON"):
    splits.read_split_file(path, _entries())


# Groups 0 to 3 are trained on, 4 to 6 held out, 7 is not listed; g3c1 has no mask.
FOLDS = [
  {"train": ["g9c9"], "val": []},
  {
    "train": [f"g{g}c{c}" for g in range(4) for c in range(2)],
    "val": [f"g{g}c{c}" for g in range(4, 7) for c in range(2)],
  },
]


def _fold(tmp_path, content=FOLDS, **changes):
  path = tmp_path / "splits_final.json"
  path.write_text(json.dumps(content))
  asked = {"fold": 1, "num_labelled": 2, "num_test": 1, "num_unlabelled": -1, "seed": 0}
  return splits.read_fold(path, _entries(bare=("g3c1",)), **{**asked, **changes})


def test_a_fold_of_nnunet_holds_out_validation_and_test(tmp_path):
  parts = _fold(tmp_path)
  assert _groups(parts["val"]) | _groups(parts["test"]) == {"g4", "g5", "g6"}
  assert len(_groups(parts["test"])) == 1 and len(_groups(parts["val"])) == 2
  assert len(_groups(parts["labelled"])) == 2 and _groups(parts["labelled"]) < {"g0", "g1", "g2"}
  assert sum(map(len, parts.values())) == 16 and {"g3", "g7"} < _groups(parts["unlabelled"])
  assert _fold(tmp_path) == parts
  assert {tuple(_fold(tmp_path, seed=seed)["test"]) for seed in range(20)} > {tuple(parts["test"])}
  more = _fold(tmp_path, num_labelled=3)
  assert more["test"] == parts["test"] and set(more["labelled"]) > set(parts["labelled"])


@pytest.mark.parametrize(
  ("content", "changes", "message"),
  [
    (FOLDS, {"fold": 2}, r"json: 2 folds, but config.data.split_fold is 2; expected 0 to 1"),
    (FOLDS, {"fold": 0}, "unknown case id 'g9c9' in 'train'"),
    (FOLDS, {"num_test": 3}, "num_test: found 3, but the fold 1 of .* holds out 3 groups"),
    (FOLDS, {"num_labelled": 4}, "num_labelled=4.*found 3 of 5"),
    ({"labelled": []}, {}, "holds a dict, expected a list; .*leave it at -1"),
    ([1, 2], {}, "'train' is no list of case ids"),
    ([0, {"train": ["g0c0"], "val": ["g3c1"]}], {}, "'g3c1' in 'val' has a record without mask"),
    ([0, {"train": ["g0c0"], "val": ["g0c1"]}], {}, "one group, 'g0'"),
    ([0, {"train": ["g0c0", "g2c0"], "val": ["g4c0", "g5c0"]}], {}, "one group, 'g4'"),
  ],
)  # fmt: skip
def test_folds_that_cannot_be(tmp_path, content, changes, message):
  with pytest.raises(errors.DataError, match=message):
    _fold(tmp_path, content, **changes)


def test_a_list_of_folds_as_a_split_file_names_the_key(tmp_path):
  path = tmp_path / "splits_final.json"
  path.write_text(json.dumps(FOLDS))
  with pytest.raises(errors.DataError, match="holds a list.*config.data.split_fold"):
    splits.read_split_file(path, _entries())
