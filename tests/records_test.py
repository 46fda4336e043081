import json

import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.data import record_table, records


def _source(entries):
  return records.Source(
    name="toy",
    num_classes=2,
    class_names=["background", "organ"],
    num_channels=1,
    spatial_dims=2,
    spacing_unit="mm",
    dtype="uint8",
    records=entries,
    read=lambda start: iter(()),
    fingerprint=str,
  )


def _entry(**changes):
  values = {"record_id": "a#z003", "case_id": "a", "group_id": "p", "shape": (4, 5)}
  return records.record(**{**values, "slice_index": 3, "has_mask": True, **changes})


def _pixels(image=None, mask=None):
  image = np.zeros((4, 5, 1), np.float32) if image is None else image
  return records.Pixels(image, mask, np.eye(4), "images/a.tif", "masks/a.png")


def test_round_trip(tmp_path):
  entries = [_entry(spacing=(1.5, 2), slice_spacing=5), _entry(record_id="b", has_mask=False)]
  records.write(tmp_path, _source(entries), "d", "s")
  content = records.read(tmp_path)
  assert list(content["records"]) == entries
  assert entries[0] == {
    "record_id": "a#z003", "case_id": "a", "group_id": "p", "slice": 3, "shape": [4, 5],
    "spacing": [1.5, 2.0], "slice_spacing": 5.0, "has_mask": True,
  }  # fmt: skip
  assert content["class_names"] == ["background", "organ"] and content["spacing_unit"] == "mm"
  assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_a_table_gives_the_entries_it_was_made_of(tmp_path):
  entries = [
    _entry(record_id="é#1", case_id="é", spacing=(1, 2)),
    _entry(record_id="b", case_id="b", group_id="b", shape=(7, 7), has_mask=False, slice_index=-1),
    _entry(record_id="c", case_id="b", group_id="b", shape=(4, 5), spacing=(1.0, 2.0)),
  ]
  assert record_table.to_columns(entries)["grid"] == [0, 1, 0]
  assert len(record_table.to_columns(entries)["grids"]) == 2
  # All cases of one record: the ids are written once.
  alone = [_entry(record_id=name, case_id=name, group_id=name) for name in ("x", "y")]
  columns = record_table.to_columns(alone)
  assert columns["record_id"] == ["x", "y"]
  assert columns["case_id"] is None and columns["group_id"] is None
  slices = [_entry(record_id=name, case_id="k", group_id="k") for name in ("x", "y")]
  for given in (entries, alone, slices):
    records.write(tmp_path, _source(given), "d", "s")
    table = records.read(tmp_path)["records"]
    assert len(table) == len(given) and list(table) == given
    assert table[np.int64(1)] == given[1] == table[-1 - (len(given) == 3)]
    assert isinstance(table[1]["slice"], int) and isinstance(table[1]["has_mask"], bool)
    with pytest.raises(IndexError):
      table[len(given)]


def test_what_a_caller_does_to_an_entry_stays_his(tmp_path):
  records.write(tmp_path, _source([_entry(spacing=(1, 2))] * 2), "d", "s")
  table = records.read(tmp_path)["records"]
  table[0]["shape"].append(3)
  table[0]["spacing"].append(3)
  assert table[1]["shape"] == [4, 5] and table[1]["spacing"] == [1.0, 2.0]


@pytest.mark.parametrize(
  "change", [{"grid": None}, {"slice": [1]}, {"record_id": [3, 4]}, {"grids": ...}]
)
def test_columns_that_do_not_fit_are_named(tmp_path, change):
  entries = [_entry(), _entry(record_id="b")]
  records.write(tmp_path, _source(entries), "d", "s")
  content = json.loads((tmp_path / records.FILE).read_text())
  content["records"] |= change
  content["records"] = {k: v for k, v in content["records"].items() if v is not ...}
  (tmp_path / records.FILE).write_text(json.dumps(content))
  with pytest.raises(errors.DataError, match=r"records\.json: lacks records.*'prepare' again"):
    records.read(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "cannot be read as JSON"), ("[]", "expected an object"), ('{"name": "a"}', "lacks")],
)
def test_damaged_records_are_named(tmp_path, text, message):
  (tmp_path / records.FILE).write_text(text)
  with pytest.raises(errors.DataError, match=rf"records\.json.*{message}.*prepare"):
    records.read(tmp_path)


def test_missing_records_are_named(tmp_path):
  with pytest.raises(errors.DataError, match="no such file; run the stage 'prepare'"):
    records.read(tmp_path)


def test_extract():
  assert records.extract(r"(case\d+)_z\d+", "case12_z3", "case_pattern") == "case12"
  assert records.extract("", "case12_z3", "case_pattern") == "case12_z3"
  with pytest.raises(errors.DataError, match="config.data.case_pattern.*'scan1'"):
    records.extract(r"(case\d+)_z\d+", "scan1", "case_pattern")


def test_good_pixels_pass():
  # Beside the refusals below: the same check must let good pixels through.
  for mask in (np.ones((4, 5), np.uint8), None):
    assert records.check_pixels(_pixels(mask=mask), _entry(), 2) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_number_are_refused(value):
  image = np.zeros((4, 5, 1), np.float32)
  image[1, 2] = value
  with pytest.raises(errors.DataError, match=r"images/a\.tif: 1 NaN or infinite.*a#z003"):
    records.check_pixels(_pixels(image), _entry(), 2)


def test_mask_of_another_size_is_refused():
  with pytest.raises(errors.DataError, match=r"masks/a\.png.*\(5, 4\).*\(4, 5\)"):
    records.check_pixels(_pixels(mask=np.zeros((5, 4), np.uint8)), _entry(), 2)


def test_class_beyond_the_last_is_refused():
  with pytest.raises(errors.DataError, match=r"masks/a\.png.*class 2, expected 0\.\.1"):
    records.check_pixels(_pixels(mask=np.full((4, 5), 2, np.uint8)), _entry(), 2)


def test_image_unlike_its_header_is_refused():
  with pytest.raises(errors.DataError, match="its header says"):
    records.check_pixels(_pixels(np.zeros((4, 4, 1), np.uint8)), _entry(), 2)
