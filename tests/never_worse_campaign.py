"""Judges from perfect to adversarial on bases from poor to good: is what is delivered ever worse?

  python tests/never_worse_campaign.py --workdir=DIR [--bases=5,40,400] [--seeds=0,1,2]
      [--judges=oracle,reversed,...] [--steps=200] [--beta=10]

Each cell fine-tunes with the gate off, so that the harm is done, and asks that the test Dice of
`delivered/` is at least the base's minus 0.005; it says too whether the gate would have refused the
judge. On the phantom at 32 x 32, 8 labelled, 16 validation and 32 test images. A row is printed as
soon as it is known, and the table at the end. Cells in DIR that are done are not run again. Exit
code 1 if any cell fails.
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

import jax

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.mining import judge_gate
from rndpo_jax.runtime import files

TOLERANCE = 0.005  # Dice
# Name -> keys of the config; the numbers are the share of images that are ranked the right way.
JUDGES = {
  "oracle": {"judge.name": "oracle"},
  **{
    f"oracle_{right:g}": {"judge.name": "noisy_oracle", "judge.flip_rate": 1 - right}
    for right in (0.8, 0.6, 0.5, 0.4, 0.2)
  },
  "reversed": {"judge.name": "noisy_oracle", "judge.flip_rate": 1.0},
  **{
    name: {"judge.name": f"never_worse_judges:{name}"}
    for name in ("large", "small", "constant", "at_random")
  },
  "agreement": {"judge.name": "agreement"},
}
SETTINGS = {
  "data.size": (32, 32),
  "data.phantom.num_cases": 104,
  "data.phantom.size": (36, 40),
  "data.num_labelled": 8,
  "data.num_val": 16,
  "data.num_test": 32,
  "model.depth": 3,
  "base.warmup_steps": 2,
  "base.augment": False,
  "mine.num_shards": 1,
  "judge.compare": (),
  "judge.gate.action": "off",
}
HEAD = (
  "base", "seed", "judge", "pairs right", "gate", "base", "last", "delivered", "step", "",
)  # fmt: skip


class Cell(NamedTuple):
  """What a cell came to; Dice on test, None where nothing was trained."""

  base_steps: int
  seed: int
  judge: str
  right: str
  gate: str
  base: float | None
  last: float | None
  delivered: float | None
  step: int | None

  def failed(self) -> bool:
    return self.delivered is not None and self.delivered < self.base - TOLERANCE

  def row(self) -> tuple[str, ...]:
    dice = ["-" if x is None else f"{x:.4f}" for x in (self.base, self.last, self.delivered)]
    step = "-" if self.step is None else "base" if self.step == 0 else str(self.step)
    verdict = "FAILED" if self.failed() else "ok"
    head = (str(self.base_steps), str(self.seed), self.judge, self.right, self.gate)
    return (*head, *dice, step, verdict)


def make_config(base_steps: int, seed: int, **changes):
  """The config of a base; `changes` are keys with '__' for the dots."""
  config = config_lib.base_config()
  keys = {key.replace("__", "."): value for key, value in changes.items()}
  every = max(1, base_steps // 2)
  of_base = {"base.num_steps": base_steps, "base.eval_every_steps": every, "seed": seed}
  config.update_from_flattened_dict({**SETTINGS, **of_base, **keys})
  return config.lock()


def run_cell(base, workdir: pathlib.Path, judge: str, **changes) -> Cell:
  """Mines and fine-tunes on a base that is there.

  Args:
    base: (config, work directory) of the base, its stages done or not.
    workdir: of the cell.
    judge: of JUDGES.
    changes: keys of fine-tuning, '__' for the dots.
  """
  config, base_workdir = base
  keys = {key.replace("__", "."): value for key, value in changes.items()}
  pipeline.run(config, base_workdir, ["prepare", "base"])
  with config.unlocked():
    config = config.copy_and_resolve_references()
    where = {"base.workdir": str(base_workdir)}
    config.update_from_flattened_dict({**where, **JUDGES[judge], **keys})
  known = config.base.num_steps, config.seed, judge
  try:
    pipeline.run(config.lock(), workdir, ["base", "mine", "finetune", "evaluate"])
  except errors.MiningError as error:  # nothing was trained: the user still has the base
    return Cell(*known, "-", str(error).split(":")[0][:40], None, None, None, None)
  found = files.read_json(workdir / "results.json")
  name = found["judge"]
  options = {"min_accuracy": 0.5, "action": "warn"}
  refused = judge_gate.finding(found["judges"], name, **options)
  return Cell(
    *known,
    judge_gate.shown(found["judges"][name]["mined"]),
    "refuses" if refused else "passes",
    found["base"]["test"]["dice"],
    found["finetuned"]["test"]["dice"],
    found["delivered"]["test"]["dice"],
    found["delivered"]["step"],
  )


def show(rows) -> None:
  """Prints rows of cells under each other."""
  widths = (4, 4, 11, 22, 40, 7, 7, 9, 5, 6)
  for row in rows:
    print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)), flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--bases", default="5,40,400")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--judges", default=",".join(JUDGES))
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--beta", type=float, default=10.0)
  options = parser.parse_args()
  workdir = options.workdir.resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  changes = {"finetune__num_steps": options.steps, "finetune__beta": options.beta}
  cells = []
  show([HEAD])
  for seed in map(int, options.seeds.split(",")):
    for steps in map(int, options.bases.split(",")):
      base = make_config(steps, seed), workdir / f"base-{steps}-{seed}"
      for judge in options.judges.split(","):
        cells.append(run_cell(base, workdir / f"cell-{steps}-{seed}-{judge}", judge, **changes))
        show([cells[-1].row()])
  print()
  show([HEAD, *(cell.row() for cell in cells)])
  trained = [cell for cell in cells if cell.delivered is not None]
  harmed = sum(cell.last < cell.base - TOLERANCE for cell in trained)
  failed = sum(cell.failed() for cell in cells)
  print(
    f"\n{len(cells)} cells, {len(trained)} trained: the last checkpoint is worse than the base by "
    f"more than {TOLERANCE} in {harmed}, the delivered model in {failed}"
  )
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  from absl import flags

  flags.FLAGS(["never_worse_campaign"])  # Grain reads flags, which a program has parsed
  main()
