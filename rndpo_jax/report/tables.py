"""What the report says in words and rows, from `results.json` and the mining manifest; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rndpo_jax.evaluation.metrics import METRICS

SPLITS = {"test": "Test", "val": "Validation"}


def show(value: float | None, digits: int = 3) -> str:
  """A number as text; 'unknown' for None."""
  return "unknown" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


def signed(value: float | None, digits: int = 3) -> str:
  """A difference with its sign, as '+0.012' or '\u22120.012' (a true minus); 'unknown' for None."""
  if value is None:
    return "unknown"
  value = round(value, digits) + 0.0  # no '-0.000'
  return f"{value:+.{digits}f}".replace("-", "\u2212")


def with_interval(entry: Mapping[str, Any], key: str) -> str:
  """A judge's figure with its interval; 'unknown' if there is no truth to measure it by."""
  interval = entry.get(f"{key}_ci")
  if entry.get(key) is None:
    return "unknown"
  if not interval or interval[0] is None:
    return show(entry[key])
  return f"{show(entry[key])} ({show(interval[0])} to {show(interval[1])})"


def headline(results: Mapping) -> dict[str, str]:
  """Title and subtitle."""
  # One a phase; a file of an older version has that of the last alone.
  objectives = results.get("objectives", [results["objective"]] * len(results["terms"]))
  judged, settings = "", [f"seed {results['seed']}"]
  if not {"preference", "online"}.isdisjoint(results["terms"][-1]):
    settings.insert(0, f"beta {results['beta']:g}")
  if results["pairs"]["count"]:
    judged = f" with the judge {results['judge']}"
    if results["judge"] == "preferences":
      judged = " on preferences of readers"
    settings.insert(0, f"pairs by {results['rule']}")
  phases = [
    " + ".join(objective if name == "preference" else name for name in terms)
    for terms, objective in zip(
      results["terms"], (x.replace("_", "-").upper() for x in objectives), strict=True
    )
  ]
  return {
    "title": f"{results['dataset']}: {', then '.join(phases)}{judged}",
    "subtitle": (
      f"{results['num_labelled_cases']} labelled cases, "
      f"{results['num_cases']['unlabelled']} unlabelled, {results['num_cases']['val']} for "
      f"validation, {results['num_cases']['test']} for test; {', '.join(settings)}"
    ),
  }


def tiles(results: Mapping) -> list[dict[str, str]]:
  """The figures at the top of the page."""
  base, held = results["base"]["test"]["dice"], results["sustained"]
  change = _change(base, held["final"])
  above, drop = held["fraction_above_base"], show(held["drop_from_peak"])
  judge = results["judges"].get(results["judge"], {})
  return [
    {"label": "Base, test Dice", "value": show(base), "note": "before fine-tuning", "kind": "soft"},
    {
      "label": "Last checkpoint, test Dice",
      "value": show(held["final"]),
      "note": f"{signed(change)} against the base",
      "kind": _kind(change),
    },
    {
      "label": "Checkpoints above the base",
      "value": "unknown" if above is None else f"{100 * above:.0f} %",
      "note": f"the last is {drop} below the peak",
      "kind": "soft",
    },
    {
      "label": "Pairs the judge gets right",
      "value": show(judge.get("pair_accuracy"), 2),
      "note": f"0.5 is chance; {results['pairs']['count']} pairs mined",
      "kind": "soft",
    },
  ]


def _change(before: float | None, after: float | None) -> float | None:
  return None if before is None else after - before


def result_groups(results: Mapping) -> list[dict[str, Any]]:
  """Rows of the result table, by split: test first; none of a split without cases."""
  return [
    {"name": f"{title} ({results['num_cases'][split]} cases)", "rows": _rows(results, split)}
    for split, title in SPLITS.items()
    if results["num_cases"][split]
  ]


def _rows(results: Mapping, split: str) -> list[dict[str, str]]:
  rows = []
  for name, base in results["base"][split].items():
    final = results["finetuned"][split][name]
    metric = METRICS[name]
    digits = 2 if metric.distance else 3
    change = final - base
    rows.append(
      {
        "name": metric.title,
        "unit": _unit(results, name),
        "base": show(base, digits),
        "rankseg": show(results["rankseg"][split][name], digits)
        if name in results["rankseg"][split]
        else "",
        "finetuned": show(final, digits),
        "change": signed(change, digits),
        "kind": _kind(-change if metric.distance else change),
        "selected": show(results["selected"][split][name], digits),
        "delivered": show(results["delivered"][split][name], digits),
      }
    )
  return rows


def _unit(results: Mapping, name: str) -> str:
  unit = {"voxel": "voxels"}.get(results["spacing_unit"], results["spacing_unit"])
  if METRICS[name].distance:
    return f"{unit}, lower is better"
  if name == "nsd":
    return f"0 to 1, within {results['nsd_tolerance']:g} {unit}"
  return "0 to 1"


def _kind(gain: float | None) -> str:
  return "soft" if not gain else "better" if gain > 0 else "worse"


def result_text(results: Mapping) -> str:
  """The result in one sentence, with what it was chosen by."""
  base, final = results["base"]["test"]["dice"], results["finetuned"]["test"]["dice"]
  if base is None:
    return "There are no test cases, so that what fine-tuning gave is not known."
  word = "raised" if final > base else "lowered" if final < base else "left"
  change = f"from {show(base)} to {show(final)} ({signed(final - base)})"
  selected = (
    "The 'selected' one is the best on validation, and needs validation labels to be found."
  )
  if results["selected"]["step"] is None:
    selected = "There are no validation cases, so that none is selected and no judge is measured."
  return (
    f"Fine-tuning {word} test Dice {change} at its last checkpoint, which nobody chose. {selected}"
  )


def delivered_text(results: Mapping) -> str:
  """What `delivered/` holds and why, and what that gives on test."""
  found = results["delivered"]["difference"]["test"]
  if found is None:
    return results["delivered"]["reason"]
  interval = ""
  if found["ci"]:
    interval = f", 95% interval over cases {' to '.join(signed(x) for x in found['ci'])}"
  gain = f"On test it is {signed(found['mean'])} Dice from the base{interval}; test chose nothing."
  return results["delivered"]["reason"] + ("" if results["delivered"]["is_base"] else f" {gain}")


def empty_text(results: Mapping) -> str:
  """How many masks were empty, and how they counted."""
  count = results["empty_masks"]["finetuned"]["test"]
  if not count["total"]:
    return ""
  return (
    f"Of the {count['total']} test masks (one a case and class) of the last checkpoint, "
    f"{count['mask_only']} were empty where the truth is not, {count['label_only']} the other way "
    f"round (both count as Dice 0 and the image's diagonal as distance), and {count['both']} were "
    "rightly empty (Dice 1, distance 0)."
  )


def sustained_rows(results: Mapping) -> list[tuple[str, str]]:
  """Rows of the sustained performance."""
  held = results["sustained"]
  return [
    ("Base", show(results["base"]["test"]["dice"])),
    ("Peak", show(held["peak"])),
    ("Last checkpoint", show(held["final"])),
    ("Mean of the last third of checkpoints", show(held["last_third_mean"])),
    ("Share of checkpoints above the base", show(held["fraction_above_base"], 2)),
    ("Drop from peak to last", show(held["drop_from_peak"])),
  ]


def judge_rows(results: Mapping) -> list[tuple[str, ...]]:
  """Rows of judge reliability, the judge of the run first."""
  names = sorted(results["judges"], key=lambda name: (name != results["judge"], name))
  rows = []
  for name in names:
    entry = results["judges"][name]
    used = " (this run's)" if name == results["judge"] else ""
    keys = ("pair_accuracy", "kendall_tau", "top1_regret")
    figures = [with_interval(entry, key) for key in keys]
    mined = with_interval(entry.get("mined", {}), "weighted_accuracy")
    labelled = with_interval(entry.get("labelled", {}), "pair_accuracy")
    count = str(entry.get("num_cases") or "unknown")
    rows.append((f"{name}{used}", figures[0], mined, *figures[1:], count, labelled))
  return rows


def proposal_rows(manifest: Mapping) -> list[tuple[str, str]]:
  """Rows of the proposals' diversity and headroom."""
  found = manifest["proposals"]
  known = found["best_dice"] is not None and found["base_dice"] is not None
  headroom = signed(found["best_dice"] - found["base_dice"]) if known else "unknown"
  return [
    ("Mean Dice between proposals of an image (lower: more diverse)", show(found["diversity"])),
    ("Dice of the base", show(found["base_dice"])),
    ("Mean Dice of the proposals", show(found["mean_dice"])),
    ("Dice of the best proposal", show(found["best_dice"])),
    ("Headroom: best proposal against the base", headroom),
  ]


DROPPED = {
  "not_finite": "taken: judge score not finite",
  "tie": "taken: judge scores equal",
  "score_gap": "taken: score gap too small",
  "identical": "taken: masks identical",
  "region_size": "taken: region size outside the limits",
}


def pair_rows(manifest: Mapping) -> list[tuple[str, str]]:
  """Rows of what mining kept, and what each filter took."""
  dropped = manifest["dropped"]
  total = manifest["num_pairs"] + sum(dropped.values())
  rows = [(f"Found by the rule {manifest['rule']}", str(total))]
  rows += [(DROPPED.get(name, name), str(count)) for name, count in dropped.items()]
  return [*rows, (f"Kept, from {manifest['num_images']} images", str(manifest["num_pairs"]))]


def harm_rows(harm: Mapping) -> list[tuple[str, ...]]:
  """Rows by region size: pairs, share wrong, and each kind's share of the gradient at the start."""
  start = harm["curve"][0]
  rows = []
  for place, entry in enumerate(harm["bins"]):
    if not entry["num_pairs"]:
      continue
    end = "and more" if entry["below"] is None else f"to {entry['below'] - 1}"
    shares = [start[kind]["bins"][place] for kind in ("region", "none")]
    cells = [f"{show(s['wrong_mass'])} of {show(s['mass'])}" for s in shares]
    rows.append(
      (f"{entry['from']} {end}", str(entry["num_pairs"]), show(entry["wrong_share"]), *cells)
    )
  whole = [f"{show(start[kind]['wrong_mass'])} of 1" for kind in ("region", "none")]
  return [*rows, ("all", str(harm["num_pairs"]), show(harm["wrong_share"]), *whole)]


def harm_text(harm: Mapping) -> str:
  """What was counted, in words."""
  last = harm["curve"][-1]
  moved = last["h_per_pixel"]
  return (
    f"Of the validation images' pairs, mined as those of the unlabelled images, "
    f"{show(harm['wrong_share'])} are the wrong way round. Their share of the gradient (L1 on the "
    "logits) is shown for RN-DPO, which divides by the region size, and for DPO at the beta that "
    f"does the same to a pair of the median size ({show(harm['median_region_size'], 0)} pixels). "
    f"At step {last['step']} it is {show(last['region']['wrong_mass'])} and "
    f"{show(last['none']['wrong_mass'])}. By then h, the margin gained, is "
    f"{show(moved['right'])} nats a pixel on right pairs and {show(moved['wrong'])} on wrong ones; "
    "above 0 on wrong pairs means that errors are learned."
  )
