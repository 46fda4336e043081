"""Faults of folders while they are used: deleted, or an image changed in the source."""

import os
import re
import shutil
import time

import numpy as np
from fault_runs import remove, replace, wait_for_stage, wait_until
from PIL import Image

# (stage, what is deleted, the file after which it is, further settings): what a stage has open, or
# reads again, or reads in worker processes, or what a later stage needs.
DELETED = (
  ("base", "data", None, ()),
  ("base", "data", "base/state/20", ()),
  ("mine", "data", "pairs/judges.json", ()),
  ("mine", "data", "pairs/judges.json", ("--config.data.num_workers=1",)),
  ("mine", "base", "pairs/judges.json", ()),
  ("finetune", "data", "finetune/state/20", ("--config.data.num_workers=1",)),
  ("finetune", "pairs", "finetune/state/20", ()),
  ("finetune", "finetune", "finetune/state/20", ()),
  ("evaluate", "data", None, ()),
)


def deleted(campaign):
  """Removes a folder while a stage runs."""
  for stage, folder, after, settings in DELETED:
    workdir = campaign.before(stage, "deleted")
    processes = campaign.start(workdir, *settings)
    if after:
      wait_until(processes, (workdir / after).exists)
    else:
      wait_for_stage(processes, stage)
    shutil.rmtree(workdir / folder, ignore_errors=True)
    ended = campaign.end(processes)
    moment = f"{stage}, {after or 'start'}" + (", workers" if settings else "")
    # What Orbax says where the checkpoint being written goes is not always one line.
    ok = ended.in_one_line() or (folder == stage and ended.in_time)
    fault = f"{folder}/ deleted"
    campaign.finish(fault, moment, ended.shown(), workdir, *settings, ok=ok)


def source_changed(campaign):
  """Deletes, adds or replaces an image while a folder is prepared.

  What was deleted is back at the rerun. One that was added or replaced may or may not belong to
  what is prepared: the results are those of the folder before or after that.
  """
  folder, others = campaign.folder / "source", campaign.folder / "others"
  write_images(folder, 3000)
  write_images(others, 1, seed=1)
  (there,) = os.listdir(others / "images")
  last = max(os.listdir(folder / "images"))
  settings = (
    "--config.data.source=folder", f"--config.data.root={folder}",
    "--config.data.num_unlabelled=20", "--config.data.phantom.num_cases=152",
    "--config.data.phantom.size=(72,80)",
  )  # fmt: skip
  kept = {part: (folder / part / last).read_bytes() for part in ("images", "masks")}
  other = {part: (others / part / there).read_bytes() for part in ("images", "masks")}
  faults = {"deleted": (last, None), "added": (f"a{last}", other), "replaced": (last, other)}

  def put(name, content):
    for part in ("images", "masks"):
      remove(folder / part / name)
      if content is not None:
        replace(folder / part / name, content[part])

  def restore():
    put(f"a{last}", None)
    put(last, kept)

  undisturbed = {}
  for state in ("added", "replaced", "deleted"):
    put(*(faults[state] if state != "deleted" else (last, kept)))
    undisturbed[state] = campaign.folder / f"source-{state}"
    ended = campaign.run(undisturbed[state], *settings)
    assert not any(ended.codes), ended.output()
    restore()
  seconds = float(re.search(r"\[prepare\] ([\d.]+) s", ended.outputs[0]).group(1))
  for state in 3 * tuple(faults):
    workdir = campaign.folder / "source-run"
    processes = campaign.start(workdir, *settings)
    wait_for_stage(processes, "prepare")
    delay = campaign.random.uniform(0, seconds)
    time.sleep(delay)
    put(*faults[state])
    ended = campaign.end(processes)
    if state == "deleted":
      restore()
    campaign.finish(
      f"image {state} in the source", f"prepare + {delay:.1f} s", ended.shown(), workdir, *settings,
      ok=ended.in_one_line(), undisturbed=[undisturbed["deleted"], undisturbed[state]],
    )  # fmt: skip
    restore()


def write_images(folder, count, seed=0):
  """Noise with a brighter rectangle, which the mask shows."""
  shutil.rmtree(folder, ignore_errors=True)
  for part in ("images", "masks"):
    (folder / part).mkdir(parents=True)
  draw = np.random.default_rng(seed)
  for number in range(count):
    image = draw.integers(0, 100, (40, 48), dtype=np.uint8)
    top, left = draw.integers(0, 20, 2)
    mask = np.zeros_like(image)
    mask[top : top + 16, left : left + 20] = 1
    for part, pixels in (("images", image + 90 * mask), ("masks", mask)):
      Image.fromarray(pixels).save(folder / part / f"{number:05d}.png")
