"""The report of made-up work directories: complete, self-contained, escaped, warning where due."""

import html.parser
import io
import re

import numpy as np
import pytest

from rndpo_jax.evaluation import harm
from rndpo_jax.evaluation import results as results_lib
from rndpo_jax.report import pictures, tables
from rndpo_jax.runtime import files
from rndpo_jax.stages import report

EVIL = "<script>alert(1)</script>"


def _blob(shape, center, radius):
  grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
  return (((grid - center) ** 2).sum(axis=-1) < radius**2).astype(np.uint8)


def _results(judge="agreement", test_dice=(0.85, 0.87, 0.9, 0.895)):
  metrics = {"dice": 0.85, "iou": 0.75, "hd95": 6.5, "assd": 1.25, "nsd": 0.8}
  final = {"dice": test_dice[-1], "iou": 0.81, "hd95": 5.0, "assd": 1.0, "nsd": 0.86}
  counts = {"total": 40, "both": 1, "mask_only": 3, "label_only": 2}
  entry = {"split": "val", "used": True, "num_cases": 30}
  for key, value in (("pair_accuracy", 0.71), ("kendall_tau", 0.4), ("top1_regret", 0.03)):
    entry |= {key: value, f"{key}_ci": [value - 0.05, value + 0.05]}
  entry["labelled"] = {"pair_accuracy": 0.93, "pair_accuracy_ci": [0.9, 0.96], "num_cases": 5}
  entry["mined"] = {"weighted_accuracy": 0.72, "weighted_accuracy_ci": [0.64, 0.8]}
  unknown = {"pair_accuracy": None, "kendall_tau": None, "top1_regret": None, "split": "val"}
  content = {
    "dataset": "hearts & <b>lungs</b>",
    "seed": 3,
    "terms": [["preference"]],
    "objective": "rn_dpo",
    "beta": 10.0,
    "judge": judge,
    "study": judge == "oracle",
    "rule": "top_vs_random",
    "num_labelled_cases": 5,
    "num_cases": {"labelled": 5, "unlabelled": 55, "val": 10, "test": 20},
    "class_names": ["background", "ventricle <i>", "myocardium"],
    "spacing_unit": "mm",
    "nsd_tolerance": 2.0,
    "units": {"hd95": "mm", "assd": "mm"},
    "judges": {judge: entry, "confidence": unknown},
    "pairs": {"count": 400},
    "base": {"val": metrics, "test": metrics},
    "rankseg": {"val": {"dice": 0.871}, "test": {"dice": 0.871}},
    "finetuned": {"val": final, "test": final, "step": 300},
    "selected": {"val": final, "test": final, "step": 200, "rule": "validation"},
    "delivered": {
      "val": final,
      "test": final,
      "step": 300,
      "is_base": False,
      "reason": "The checkpoint of step 300 is delivered.",
      "difference": {"test": {"mean": 0.045, "ci": [0.01, 0.08], "probability": 1.0}},
    },
    "curve": [
      {"step": 100 * i, "val_dice": d - 0.01, "test_dice": d} for i, d in enumerate(test_dice)
    ],
    "sustained": {
      "peak": max(test_dice[1:]),
      "final": test_dice[-1],
      "last_third_mean": test_dice[-1],
      "fraction_above_base": 1.0,
      "drop_from_peak": max(test_dice[1:]) - test_dice[-1],
    },
    "empty_masks": {"finetuned": {"test": counts, "val": counts}},
  }
  return {**content, "warnings": results_lib.warnings(content, has_beta=True, is_judged=True)}


MANIFEST = {
  "num_pairs": 400,
  "num_images": 110,
  "dropped": {"tie": 11, "score_gap": 0, "identical": 29, "region_size": 0},
  "region_size": {
    "p5": 12.0,
    "p50": 240.0,
    "p95": 3100.0,
    "histogram": {"edges": [1, 10, 100, 1000, 4000], "counts": [0, 30, 300, 70]},
  },
  "score_gap": {"p5": 0.01, "p50": 0.1, "p95": 0.4},
  "rule": "top_vs_random",
  "judge": "agreement",
  "mix": "mc_dropout+logit_noise:8",
  "seed": 3,
  "proposals": {
    "split": "val",
    "diversity": 0.83,
    "base_dice": 0.85,
    "mean_dice": 0.8,
    "best_dice": 0.89,
  },
}


def _examples(shape, channels):
  rng = np.random.default_rng(0)
  n, k = 2, 4
  image = rng.normal(size=(n, *shape, channels)).astype(np.float32)
  middle = np.array(shape) / 2
  radii = [0, 4, 5, 6]
  masks = np.stack([_blob(shape, middle + i, r) for i, r in enumerate(radii)])
  masks[3][masks[2] > 0] = 2
  return {
    "image": image,
    "masks": np.stack([masks] * n),
    "scores": np.tile(np.linspace(0, 1, k, dtype=np.float32), (n, 1)),
    "chosen": np.array([3, -1], np.int32),
    "rejected": np.array([1, -1], np.int32),
    "record_id": np.array([EVIL, "second"]),
  }


def _gallery(shape, channels):
  image = np.random.default_rng(1).integers(0, 256, (*shape, channels)).astype(np.uint8)
  arrays = {
    "case_id": np.array([f"case {EVIL}", "other"]),
    "why": np.array(["best change", "worst change"]),
    "base_dice": np.array([0.8, 0.9]),
    "finetuned_dice": np.array([0.9, 0.85]),
  }
  for i in range(2):
    arrays |= {f"image_{i}": image, f"label_{i}": _blob(shape, (9, 9), 5)}
    arrays |= {f"base_{i}": _blob(shape, (8, 9), 5), f"finetuned_{i}": _blob(shape, (9, 9), 4)}
  return arrays


def _save(path, arrays):
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  files.write_bytes(path, content.getvalue())


def _harm():
  """Of six pairs, one of them wrong and large."""
  size, gain = np.array([4, 4, 10, 10, 20, 500]), np.array([0.1, 0.1, 0.1, 0.1, 0.1, -0.1])
  h = np.array([np.zeros(6), 0.1 * size])
  options = {"edges": (16, 64), "beta": 10.0, "normalization": "region"}
  return harm.account([0, 50], h, size, gain, *np.ones((2, 6)), **options)


def make_workdir(workdir, results, *, shape=(20, 24), channels=1):
  files.write_json(workdir / "evaluate" / "harm.json", _harm())
  files.write_json(workdir / "results.json", results)
  files.write_json(workdir / "pairs" / "manifest.json", MANIFEST)
  _save(workdir / "pairs" / "examples.npz", _examples(shape, channels))
  _save(workdir / "evaluate" / "gallery.npz", _gallery(shape[:2], channels))
  rows = [
    f'{{"step": {step}, "kind": "train", "loss": {0.69 - step / 1000}, "accuracy": 0.7, '
    f'"h_mean": {step / 10}, "chosen_log_ratio": -{step}, "rejected_log_ratio": -{2 * step}}}'
    for step in range(10, 300, 10)
  ]
  files.write_text(workdir / "finetune" / "metrics.jsonl", "\n".join(rows) + "\n")
  config = {"data": {"name": EVIL}}
  made = {
    "config": config,
    "versions": {"jax": "1.2.3"},
    "device_kind": "cpu",
    "git_revision": None,
  }
  files.write_json(workdir / "config.json", made | {"command": "python -m launch.run --x=<y>"})
  return workdir


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
  return _page(make_workdir(tmp_path_factory.mktemp("report"), _results()))


def test_page_is_self_contained_and_small(page):
  content, parsed = page
  assert len(content) < 2_000_000
  assert parsed.addresses and all(a.startswith("data:image/") for a in parsed.addresses)
  assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
  assert "url(" not in content and "@import" not in content


def test_ids_names_and_config_are_escaped(page):
  content, parsed = page
  assert EVIL not in content and "<i>" not in content and "<b>lungs" not in content
  assert parsed.text.count(EVIL) >= 3  # record, case and config, as text
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
  rows = tables.result_groups(_results())[0]["rows"]
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
  results = _results("oracle", (0.85, 0.9, 0.88, 0.84))
  _, parsed = _page(make_workdir(tmp_path, results, channels=3))
  assert "Study judge." in parsed.text
  assert "worse than the base on test: Dice 0.840 against 0.850" in parsed.text
  assert "lies 0.060 Dice below the peak" in parsed.text


def test_figures_of_the_last_phase_alone_say_so(tmp_path):
  """Its training counts steps from its own start; its pairs' reference is what it starts from."""
  make_workdir(tmp_path, _results() | {"terms": [["labelled"], ["preference"]]})
  harm = _harm()
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
  found = tables.headline(_results())
  assert found["title"] == "hearts & <b>lungs</b>: RN-DPO with the judge agreement"
  assert found["subtitle"].endswith("20 for test; pairs by top_vs_random, beta 10, seed 3")
  first, second = ["labelled", "weak_to_strong"], ["preference"]
  found = tables.headline(_results() | {"terms": [first, second]})
  expected = "labelled + weak_to_strong, then RN-DPO with the judge agreement"
  assert found["title"].endswith(f": {expected}")
  found = tables.headline(_results() | {"terms": [second, second], "objectives": ["ipo", "rn_dpo"]})
  assert ": IPO, then RN-DPO with" in found["title"]
  found = tables.headline(_results() | {"terms": [first], "pairs": {"count": 0}})
  assert found["title"].endswith(": labelled + weak_to_strong")
  assert found["subtitle"].endswith("20 for test; seed 3")


def test_numbers_as_text():
  assert tables.show(None) == "unknown" and tables.show(-0.25, 1) == "\u22120.2"
  assert [tables.signed(x) for x in (-0.0001, 0.0126, -0.5)] == ["+0.000", "+0.013", "\u22120.500"]


def test_volumes_are_shown_by_a_slice(tmp_path):
  _, parsed = _page(make_workdir(tmp_path, _results(), shape=(20, 24, 6)))
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
  workdir = make_workdir(tmp_path, _results())
  for name in ("pairs/examples.npz", "evaluate/gallery.npz", "finetune/metrics.jsonl"):
    (workdir / name).unlink()
  _, parsed = _page(workdir)
  for text in ("No examples were found", "No gallery was found", "No training metrics were found"):
    assert text in parsed.text


def test_same_files_give_the_same_bytes(tmp_path):
  workdir = make_workdir(tmp_path, _results())
  first, _ = _page(workdir)
  assert _page(workdir)[0] == first
