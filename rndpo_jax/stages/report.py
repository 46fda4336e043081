"""Stage 'report': the files of the stages before it -> `report.html`, one self-contained page."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

from rndpo_jax.data import preference_file
from rndpo_jax.mining import judge_gate
from rndpo_jax.report import charts, figures, pictures, tables
from rndpo_jax.runtime import files

# Entries of `results.json` that are tables of their own.
RESULTS = ("base", "rankseg", "finetuned", "selected", "delivered", "sustained", "judges", "pairs")
TEMPLATE = pathlib.Path(__file__).parents[1] / "report" / "report.html.j2"


def run(config, workdir: os.PathLike) -> None:
  """Writes `report.html`; reads files alone, computes nothing.

  Raises:
    FileNotFoundError: if `results.json` or the mining manifest is missing.
  """
  del config  # the resolved one stands in `config.json`
  workdir = epath.Path(workdir)
  kinds = dict.fromkeys(RESULTS, dict)
  results = files.read_json(
    workdir / "results.json", study=bool, curve=list, class_names=list, terms=list, **kinds
  )
  manifest = files.read_json(
    workdir / "pairs" / "manifest.json",
    **dict.fromkeys(("region_size", "score_gap", "proposals"), dict),
    **dict.fromkeys(("mix", "judge"), str),
    num_pairs=int,
  )
  made = _read_made(workdir)
  harm = files.read_json(workdir / "evaluate" / "harm.json", bins=list, curve=list, beta=dict)
  context = {
    "results": results,
    "study": results["study"],
    **tables.headline(results),
    **_result_part(results),
    **_mining_part(results, manifest),
    "harm_start": harm["curve"][0]["step"],
    "harm_rows": tables.harm_rows(harm),
    "harm_text": tables.harm_text(harm) if harm["num_pairs"] else None,
    "harm_chart": charts.harm_chart(harm),
    "training_charts": charts.training_charts(
      workdir, results["terms"][-1], results.get("finetune_folder", "finetune")
    ),
    "has_preference": "preference" in results["terms"][-1],
    **pictures.examples(workdir / "pairs" / "examples.npz"),
    **pictures.cases(workdir / "evaluate" / "gallery.npz", results["class_names"]),
    **made,
  }
  files.write_text(workdir / "report.html", render(context))


def render(context: Mapping[str, Any]) -> str:
  """The page; whatever comes from data, such as a case id, is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE.parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(TEMPLATE.name).render(context)


def _result_part(results) -> dict[str, Any]:
  names = ", ".join(results["class_names"][1:])
  return {
    "warnings": results["warnings"],
    "tiles": tables.tiles(results),
    "results_text": tables.result_text(results),
    "result_groups": tables.result_groups(results),
    "steps": {name: results[name]["step"] for name in ("finetuned", "selected", "delivered")},
    "delivered_text": tables.delivered_text(results),
    "foreground": f"the foreground classes ({names})",
    "empty_text": tables.empty_text(results),
    "sustained_rows": tables.sustained_rows(results),
    "sustained_text": _sustained_text(results["sustained"]),
    "curve_chart": charts.curve_chart(results),
  }


def _sustained_text(held) -> str:
  if held["final"] is None:
    return "There are no test cases to tell it by."
  return (
    f"Of the fine-tuned checkpoints, {100 * held['fraction_above_base']:.0f} % are above the "
    f"base on test. The best reached {tables.show(held['peak'])}, the last "
    f"{tables.show(held['final'])}. Judge a run by where it ends, not by its best moment: "
    "without test labels nobody can stop at the peak."
  )


def _mining_part(results, manifest) -> dict[str, Any]:
  rows = []
  for name, entry in sorted(results["judges"].items()):
    interval = entry.get("pair_accuracy_ci")
    if entry.get("pair_accuracy") is not None and interval and interval[0] is not None:
      rows.append((name, entry["pair_accuracy"], *interval))
  label = "pair accuracy (dashed: chance)"
  return {
    "judge_split": _split_name(next(iter(results["judges"].values()), {})),
    "judges_are_measured": all(judge_gate.is_measured(x) for x in results["judges"].values()),
    "judge_rows": tables.judge_rows(results),
    "judge_chart": figures.intervals(rows, chance=0.5, label=label) if rows else None,
    "proposal_split": _split_name(manifest["proposals"]),
    "proposal_rows": tables.proposal_rows(manifest),
    "pair_rows": tables.pair_rows(manifest),
    "mining_text": f"{_origin(manifest)} {_kept_text(manifest)}",
    "region_chart": _region_chart(manifest["region_size"]) if manifest["num_pairs"] else None,
    "region_text": (
      "How many pixels the two masks of a pair differ in. A plain DPO update grows with it; "
      "RN-DPO divides by it, so that a few gross proposals do not rule the training."
    ),
  }


def _region_chart(size) -> str:
  quantiles = {name: size[name] for name in ("p5", "p50", "p95")}
  return figures.histogram(size["histogram"]["edges"], size["histogram"]["counts"], quantiles)


def _kept_text(manifest) -> str:
  if not manifest["num_pairs"]:
    return "There are no pairs."
  gaps = ", ".join(tables.show(manifest["score_gap"][q]) for q in ("p5", "p50", "p95"))
  return (
    "A pair of equal scores or of identical masks tells the network nothing. Score gap of the kept "
    f"pairs, 5th, 50th and 95th percentile: {gaps}."
  )


def _origin(manifest) -> str:
  if manifest["judge"] == preference_file.NAME:
    return "The pairs are preferences of readers, which no judge scored."
  return f"Proposals were drawn by {manifest['mix']}."


def _split_name(entry: Mapping[str, Any]) -> str:
  split = entry.get("split") or "val"
  return tables.SPLITS.get(split, split).lower()


def _read_made(workdir: epath.Path) -> dict[str, Any]:
  """How the run was made: command, versions, config."""
  path = workdir / "config.json"
  content = files.read_json(path) if path.exists() else {}
  config = content.pop("config", {})
  default = "python -m launch.run --config=configs/NAME.py --workdir=DIR"
  command = content.pop("command", default)
  versions = content.pop("versions", {})
  environment = [
    (key.replace("_", " "), "unknown" if value is None else str(value))
    for key, value in content.items()
  ]
  return {
    "command": command if isinstance(command, str) else " ".join(map(str, command)),
    "environment": environment + [(name, str(version)) for name, version in versions.items()],
    "config_text": json.dumps(config, indent=2),
  }
