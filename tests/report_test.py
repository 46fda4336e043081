"""The report of made-up work directories: complete, self-contained, escaped, warning where due."""

import html.parser
import re

import numpy as np
import pytest
import report_files

from rndpo_jax.report import pictures, tables
from rndpo_jax.runtime import files
from rndpo_jax.stages import report


class _Page(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.addresses, self.words = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return re.sub(r"\s+", " ", " ".join(self.words))


def _page(workdir):
  report.run(None, workdir)
  content = (workdir / "report.html").read_text(encoding="utf-8")
  return content, _Page(content)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  return _page(report_files.make_workdir(tmp_path_factory.mktemp("report"), report_files.results()))


def test_page_is_self_contained_and_small(page):
  content, parsed = page
  assert len(content) < 2_000_000
  assert parsed.addresses and all(a.startswith("data:image/") for a in parsed.addresses)
  assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
  assert "url(" not in content and "@import" not in content


def test_ids_names_and_config_are_escaped(page):
  content, parsed = page
  assert report_files.EVIL not in content and "<i>" not in content and "<b>lungs" not in content
  assert parsed.text.count(report_files.EVIL) >= 3  # record, case and config, as text
  assert "--x=<y>" in parsed.text


def test_page_says_what_a_reader_needs(page):
  _, parsed = page
  for text in (
    "RN-DPO", "from 0.850 to 0.895 (+0.045)", "0.710 (0.660 to 0.760) 0.720 (0.640 to 0.800)",
    "unknown", "0.871", "without any training",
    "0.930 (0.900 to 0.960)", "It is optimistic, for the base was trained on them",
    "mm, lower is better", "within 2 mm", "3 were empty where the truth is not",
    "taken: masks identical", "29", "+0.040", "0.830", "score 1.000", "chosen", "rejected",
    "16 to 63", "0.912 of 0.912", "0.912 of 1", "0.167 of 1", "0.100 nats a pixel on right pairs",
    "The checkpoint of step 300 is delivered. On test it is +0.045 Dice from the base,",
    "best change", "Dice 0.900 (+0.100)", "1.2.3", "step 300", "step 200", "440",
  ):  # fmt: skip
    assert text in parsed.text, text
  assert "Warning" not in parsed.text and "Study judge" not in parsed.text
  # Result table: a smaller distance is an improvement, and shown as one.
  rows = tables.result_groups(report_files.results())[0]["rows"]
  assert {row["name"]: row["kind"] for row in rows} == dict.fromkeys(
    ("Dice", "IoU", "HD95", "ASSD", "NSD"), "better"
  )


def test_pictures_are_all_there(page):
  _, parsed = page
  tiles = [a for a in parsed.addresses if a.startswith("data:image/jpeg")]
  charts = [a for a in parsed.addresses if a.startswith("data:image/svg")]
  # 2 examples of an image and 4 proposals, 1 pair, 2 test cases of 4 pictures.
  assert len(tiles) == 2 * 5 + 1 + 2 * 4
  assert len(charts) == 1 + 4 + 1 + 1 + 1  # curve, training, judges, harm, region sizes


def test_study_judge_and_lost_gain_are_flagged(tmp_path):
  results = report_files.results("oracle", (0.85, 0.9, 0.88, 0.84))
  _, parsed = _page(report_files.make_workdir(tmp_path, results, channels=3))
  assert "Study judge." in parsed.text
  assert "worse than the base on test: Dice 0.840 against 0.850" in parsed.text
  assert "lies 0.060 Dice below the peak" in parsed.text


def test_figures_of_the_last_phase_alone_say_so(tmp_path):
  """Its training counts steps from its own start; its pairs' reference is what it starts from."""
  report_files.make_workdir(
    tmp_path, report_files.results() | {"terms": [["labelled"], ["preference"]]}
  )
  harm = report_files.harm_table()
  harm["curve"][0]["step"] = 150
  files.write_json(tmp_path / "evaluate" / "harm.json", harm)
  row = '{"step": 50, "kind": "val", "val_dice": 0.9, "val_kl": 0.1, "val_entropy": 0.2}\n'
  files.write_text(tmp_path / "finetune" / "metrics.jsonl", row)
  _, parsed = _page(tmp_path)
  for text in (
    "Of the last of 2 phases, whose steps are counted from its own start.",
    "KL divergence from the network that this fine-tuning started from",
    "RN-DPO, step 150: gradient from wrong pairs DPO, step 150",
  ):
    assert text in parsed.text, text


def test_the_headline_names_what_trained_and_no_judge_that_was_not_asked():
  found = tables.headline(report_files.results())
  assert found["title"] == "hearts & <b>lungs</b>: RN-DPO with the judge agreement"
  assert found["subtitle"].endswith("20 for test; pairs by top_vs_random, beta 10, seed 3")
  first, second = ["labelled", "weak_to_strong"], ["preference"]
  found = tables.headline(report_files.results() | {"terms": [first, second]})
  expected = "labelled + weak_to_strong, then RN-DPO with the judge agreement"
  assert found["title"].endswith(f": {expected}")
  found = tables.headline(
    report_files.results() | {"terms": [second, second], "objectives": ["ipo", "rn_dpo"]}
  )
  assert ": IPO, then RN-DPO with" in found["title"]
  found = tables.headline(report_files.results() | {"terms": [first], "pairs": {"count": 0}})
  assert found["title"].endswith(": labelled + weak_to_strong")
  assert found["subtitle"].endswith("20 for test; seed 3")


def test_numbers_as_text():
  assert tables.show(None) == "unknown" and tables.show(-0.25, 1) == "\u22120.2"
  assert [tables.signed(x) for x in (-0.0001, 0.0126, -0.5)] == ["+0.000", "+0.013", "\u22120.500"]


def test_volumes_are_shown_by_a_slice(tmp_path):
  _, parsed = _page(report_files.make_workdir(tmp_path, report_files.results(), shape=(20, 24, 6)))
  assert sum(a.startswith("data:image/jpeg") for a in parsed.addresses) == 2 * 5 + 1 + 2 * 4
  masks = np.zeros((3, 8, 8, 6), np.uint8)
  masks[1, 2:5, 2:5, 4] = 1
  volume = np.broadcast_to(np.arange(6.0)[:, None], (8, 8, 6, 1))
  image, shown = pictures.flat(volume, masks)
  assert (image == 4).all() and shown.shape == (3, 8, 8) and shown[1].sum() == 9


def test_window_holds_the_masks_and_their_surroundings():
  mask = np.zeros((90, 60), np.uint8)
  assert pictures.window([mask]) == (slice(None), slice(None))
  other = mask.copy()
  mask[20:30, 4], other[40, 50:60] = 1, 2
  # Rows 20 to 40 are taken: 21 * 1.5 is 31.5, about the middle 30.5. Columns 4 to 59: 84, so all.
  assert pictures.window([mask, other]) == (slice(15, 47), slice(0, 60))
  rows, columns = pictures.window([mask])  # 10 rows and 1 column: a third of the image
  assert rows == slice(10, 40) and columns == slice(0, 20)


def test_missing_pictures_and_metrics_leave_a_note(tmp_path):
  workdir = report_files.make_workdir(tmp_path, report_files.results())
  for name in ("pairs/examples.npz", "evaluate/gallery.npz", "finetune/metrics.jsonl"):
    (workdir / name).unlink()
  _, parsed = _page(workdir)
  for text in ("No examples were found", "No gallery was found", "No training metrics were found"):
    assert text in parsed.text


def test_same_files_give_the_same_bytes(tmp_path):
  workdir = report_files.make_workdir(tmp_path, report_files.results())
  first, _ = _page(workdir)
  assert _page(workdir)[0] == first
