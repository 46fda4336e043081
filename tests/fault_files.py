"""Faults of disks and files: full, damaged, deleted, changed while they are read."""

import json
import os
import re
import shutil
import subprocess

from fault_runs import PROGRAM, STAGES, remove


def flip_a_byte(campaign, path):
  content = bytearray(path.read_bytes())
  written = [place for place, value in enumerate(content) if value]  # ArrayRecord pads with zeros
  content[campaign.random.choice(written)] ^= 1 << campaign.random.randrange(8)
  path.write_bytes(bytes(content))


def flip_checkpoint(campaign, step):
  """In the largest of its files of arrays."""
  files = (step / "ocdbt.process_0" / "d").iterdir()
  flip_a_byte(campaign, max(files, key=lambda path: path.stat().st_size))


def full_disk(campaign):
  """A tmpfs of a few sizes, so that it fills in other stages; then the same, made larger."""
  for kilobytes in (100, 400, 1200, 2500):
    workdir = campaign.folder / f"disk-{kilobytes}"
    workdir.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode:
      return campaign.skip("full disk", "mounting is not allowed here")
    try:
      ended = campaign.run(workdir / "run")
      stages = [name for name in STAGES if f"[{name}]" in ended.outputs[0]] or ["start"]
      subprocess.run(["mount", "-o", "remount,size=1g", str(workdir)], check=True)
      first, ok = of_full_disk(ended)
      campaign.finish(f"disk of {kilobytes} kB", stages[-1], first, workdir / "run", ok=ok)
    finally:
      subprocess.run(["umount", str(workdir)], check=True)


def of_full_disk(ended):
  """The row's entry, and whether a process said that the disk is full and the others stopped."""
  said = re.search(r"^error: (process \d+: )?the disk is full", ended.output(), re.MULTILINE)
  clear = ended.in_one_line() and said is not None
  return f"{ended.shown()}: the disk is full" if clear else ended.shown(), clear


def last_sees(campaign, mount):
  """The programs of the processes, the last of which sees a mount of its own."""
  alone = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *PROGRAM)
  return [PROGRAM] * (campaign.processes - 1) + [alone]


def disk_of_one(campaign):
  """Only the last process meets a full disk: it sees a small tmpfs where the shards are."""
  workdir = campaign.before("mine", "disk-of-one")
  (workdir / "pairs").mkdir()
  programs = last_sees(campaign, f"mount -t tmpfs -o size=8k none {workdir}/pairs")
  first, ok = of_full_disk(campaign.run(workdir, programs=programs))
  campaign.finish("disk full for one process", "mine", first, workdir, ok=ok)


def checkpoint_of_one(campaign):
  """Only the last process sees flipped bytes: in the latest state, in all, in the parameters."""
  last = campaign.processes - 1
  for folder, count in (("base/state", 1), ("base/state", None), ("base/params", None)):
    workdir = campaign.before("mine", "checkpoint-of-one")
    if folder == "base/state":
      (workdir / "base" / "selected.json").unlink()  # so that the base goes on
    damaged = campaign.folder / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(workdir / folder, damaged)
    there = sorted((path.name for path in damaged.iterdir()), key=int)
    harmed = there[-count:] if count else there
    for step in harmed:
      flip_checkpoint(campaign, damaged / step)
    mounts = [f"mount --bind {damaged}/{step} {workdir}/{folder}/{step}" for step in harmed]
    ended = campaign.run(workdir, programs=last_sees(campaign, " && ".join(mounts)))
    if count:
      said = f"cannot be read by process {last}; going back to that of step {there[-2]}"
      ok = not any(ended.codes) and campaign.same(workdir)
      ok = ok and all(said in text for text in ended.outputs)
    else:
      ok = all(ended.codes) and ended.in_one_line() and "cannot be read" in ended.outputs[last]
    moment = f"{folder}/{', '.join(harmed)}"
    campaign.finish("checkpoint unreadable for one process", moment, ended.shown(), workdir, ok=ok)


def damage(campaign, fault, stage, harm, says=""):
  """`harm` changes files of a run that stands before `stage`."""
  workdir = campaign.before(stage, "damage")
  what = harm(workdir)
  campaign.finish(fault, f"before {stage}", what, workdir, says=says)


def flip_latest(campaign, folder, unfinished=()):
  """A harm: flips a byte of the latest checkpoint, after the files `unfinished` are gone."""

  def harm(workdir):
    for name in unfinished:
      remove(workdir / name)
    latest = max((workdir / folder).iterdir(), key=lambda path: int(path.name))
    flip_checkpoint(campaign, latest)
    return f"{folder}/{latest.name}"

  return harm


# Of a latest state that is not read the one before serves; without that, training is refused.
_BACK, _NO = "going back to that of step", "cannot be read"
STATES = (
  ("flipped byte, base state", "mine", "base/state", ("base/selected.json",), _BACK),
  ("flipped byte, state", "evaluate", "finetune/state", ("finetune/done.json",), _BACK),
  (
    "flipped byte, only base state", "mine", "base/state",
    ("base/selected.json", "base/state/40", "base/params/40"), _NO,
  ),
)  # fmt: skip


def damaged_states(campaign):
  for fault, stage, folder, unfinished, says in STATES:
    damage(campaign, fault, stage, flip_latest(campaign, folder, unfinished), says)


def damages(campaign):
  def shard(workdir):
    return sorted((workdir / "pairs").glob("*.array_record"))[0]

  def truncate(workdir):
    os.truncate(shard(workdir), shard(workdir).stat().st_size // 2)
    return shard(workdir).name

  def flip_shard(workdir):
    flip_a_byte(campaign, shard(workdir))
    return shard(workdir).name

  def lose_manifest(workdir):
    (workdir / "pairs" / "manifest.json").unlink()
    return "pairs/manifest.json"

  def age(workdir):
    for number, path in enumerate(sorted(workdir.rglob("*"))):
      os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    return "times of 1970 and 2096"

  def flip_data(workdir):
    files = (workdir / "data").rglob("*array_record*")
    flip_a_byte(campaign, max(files, key=lambda path: path.stat().st_size))
    return "the records"

  def exchange(workdir):
    """A case that was trained on is now one that is tested."""
    parts = json.loads((workdir / "splits.json").read_text())
    parts["labelled"][0], parts["test"][0] = parts["test"][0], parts["labelled"][0]
    (workdir / "splits.json").write_text(json.dumps(parts))
    return "splits.json"

  def lose_rows(workdir):
    """Of a base whose training goes on: they say which step was the best."""
    for name in ("selected.json", "metrics.jsonl", "state/40", "params/40"):
      remove(workdir / "base" / name)
    return "base/metrics.jsonl"

  def lose_judges(workdir):
    (workdir / "pairs" / "judges.json").write_text('{"agreement": {')
    return "pairs/judges.json"

  unread, corrupt = "cannot be read", "is corrupt"
  damage(campaign, "flipped byte in data/", "base", flip_data, "error: ")
  damage(campaign, "splits exchanged", "mine", exchange, "is not what the stage 'prepare' wrote")
  damage(campaign, "metrics lost", "mine", lose_rows, "holds the validations of steps []")
  damage(campaign, "truncated shard", "finetune", truncate, corrupt)
  damage(campaign, "flipped byte in a shard", "finetune", flip_shard, corrupt)
  damage(
    campaign, "flipped byte, base params", "mine", flip_latest(campaign, "base/params"), unread
  )
  damaged_states(campaign)
  flip = flip_latest(campaign, "finetune/params")
  damage(campaign, "flipped byte, params", "evaluate", flip, unread)
  damage(campaign, "half of judges.json", "evaluate", lose_judges, "no valid JSON")
  damage(campaign, "manifest lost", "finetune", lose_manifest)
  damage(campaign, "clock jump: file times", "finetune", age)
