"""The files of a made-up work directory that the report reads."""

import io

import numpy as np

from rndpo_jax.evaluation import harm
from rndpo_jax.evaluation import results as results_lib
from rndpo_jax.runtime import files

EVIL = "<script>alert(1)</script>"


def _blob(shape, center, radius):
  grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
  return (((grid - center) ** 2).sum(axis=-1) < radius**2).astype(np.uint8)


def results(judge="agreement", test_dice=(0.85, 0.87, 0.9, 0.895)):
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


def harm_table():
  """Of six pairs, one of them wrong and large."""
  size, gain = np.array([4, 4, 10, 10, 20, 500]), np.array([0.1, 0.1, 0.1, 0.1, 0.1, -0.1])
  h = np.array([np.zeros(6), 0.1 * size])
  options = {"edges": (16, 64), "beta": 10.0, "normalization": "region"}
  return harm.account([0, 50], h, size, gain, *np.ones((2, 6)), **options)


def make_workdir(workdir, results, *, shape=(20, 24), channels=1):
  files.write_json(workdir / "evaluate" / "harm.json", harm_table())
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
