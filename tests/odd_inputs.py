"""Odd inputs against the stage 'prepare'; prints a table.

  python tests/odd_inputs.py [--only=png,nifti] [--short]

Each row makes a tiny data set with one oddity and prepares it, as launch.run does, in a process of
its own with 30 s and 2 GB. It passes if the data are taken and what was prepared is right, or if
they are refused by one line and exit code 1. It fails by a traceback, by wrong pixels, by more time
or memory, or if what must be refused is taken. Exit code 1 if any fails.
"""

import argparse
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np  # noqa: E402

SECONDS, MAX_BYTES = 30, 2 << 30
CASE = "odd"  # id of the case with the oddity


class Row(NamedTuple):
  """One odd input.

  Attributes:
    kind: of input.
    name: of the oddity.
    make: (empty folder) -> changes of the config's flattened keys, and what the case's record must
      hold, {"image", "mask", "spacing"}; None where it must be refused.
    says: what must be in what is printed.
  """

  kind: str
  name: str
  make: Callable[[pathlib.Path], tuple[dict[str, Any], dict[str, Any] | None]]
  says: str = ""


def prepare(row: Row, folder: pathlib.Path) -> int:
  """Makes and prepares one data set in this process; its exit code."""
  from tiny_config import get_config

  from launch import common
  from rndpo_jax.checks import config_checks
  from rndpo_jax.data import dataset
  from rndpo_jax.stages import prepare as stage

  (folder / "source").mkdir()
  changes, right = row.make(folder / "source")
  config = get_config()
  with common.one_line_errors(), config.unlocked():
    common_changes = {"data.num_labelled": 1, "data.num_val": 1, "data.num_test": 1}
    try:
      config.update_from_flattened_dict({**common_changes, **changes})
    except (TypeError, ValueError) as error:  # as ml_collections refuses a flag
      print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
      return 1
    config_checks.validate(config)
    stage.run(config, folder / "work")
  if right is None:
    print("taken, but it must be refused")
    return 2
  opened = dataset.open_dataset(config, folder / "work")
  found = [n for n, entry in enumerate(opened.records) if entry["case_id"] == CASE]
  example = opened.source[found[0]]
  for name, expected in right.items():
    got = opened.records[found[0]]["spacing"] if name == "spacing" else np.asarray(example[name])
    if np.shape(got) != np.shape(expected) or not (
      got is expected or np.allclose(got, np.array(expected, float))
    ):
      print(f"WRONG {name}: {np.shape(got)}, expected {np.shape(expected)}\n{got}\n{expected}")
      return 2
  return 0


def _child(row: Row, folder: pathlib.Path) -> None:
  output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  os.dup2(output, 1)
  os.dup2(output, 2)
  resource.setrlimit(resource.RLIMIT_DATA, (2 * MAX_BYTES, 2 * MAX_BYTES))
  try:
    code = prepare(row, folder)
  except SystemExit as error:
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    code = error.code if isinstance(error.code, int) else 1
  except BaseException:  # what a user would see
    traceback.print_exc()
    code = 3
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def run(row: Row, folder: pathlib.Path) -> tuple[str, str]:
  """Runs a row in a process of its own; (verdict, what it printed or why it failed)."""
  folder.mkdir(parents=True)
  start = time.monotonic()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX warns of fork, but has started nothing here
    child = os.fork()
  if not child:
    _child(row, folder)
  ended = status = 0
  while not ended and time.monotonic() - start < SECONDS:
    ended, status, usage = os.wait4(child, os.WNOHANG)
    time.sleep(0.01)
  if not ended:
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
  text = (folder / "output").read_text(errors="replace") if ended else "no end"
  return judge(row, os.waitstatus_to_exitcode(status), text, usage.ru_maxrss << 10, bool(ended))


def judge(row: Row, code: int, text: str, num_bytes: int, ended: bool) -> tuple[str, str]:
  """The verdict on how a process ended."""
  lines = text.splitlines()
  errors = [line for line in lines if line.startswith("error: ")]
  if not ended or num_bytes > MAX_BYTES:
    return "FAILED", f"{'' if ended else f'over {SECONDS} s, '}{num_bytes >> 20} MB"
  if code == 0 and "Traceback" not in text and row.says in text:
    return "taken", next((line for line in lines if line.startswith("[prepare]")), "")
  # What follows the error's line would be a second line of it.
  if code == 1 and len(errors) == 1 and lines[-1] == errors[0] and row.says in text:
    return "refused", errors[0].removeprefix("error: ")
  return "FAILED", f"exit {code}: {text[-1500:]}"


def rows(short: bool) -> list[Row]:
  """The table; its short form has one row of each kind of remedy."""
  import odd_configs
  import odd_dicom
  import odd_files
  import odd_formats
  import odd_images
  import odd_volumes

  every = [
    *odd_images.rows(), *odd_volumes.rows(), *odd_formats.rows(), *odd_dicom.rows(),
    *odd_configs.rows(), *odd_files.rows(),
  ]  # fmt: skip
  return [row for row in every if (row.kind, row.name) in SHORT] if short else every


# One row of each kind of reader, of hang, of growth, and of what was once found.
SHORT = {
  ("png", "16 bits, as image"), ("png", "EXIF turn, as image"),
  ("png", "bomb of 10^10 pixels, as image"), ("png", "bomb of 1.7 x 10^8 pixels, as mask"),
  ("png", "GIF inside, as mask"), ("png", "grey and alpha of 16 bits, as image"),
  ("tiff", "three pages, as image"), ("tiff", "big-endian 16 bits, as image"),
  ("file", "FIFO as image"), ("file", "folder as mask"), ("file", "line break in a name"),
  ("file", "a name that is no UTF-8"), ("file", "image and mask, twins in Unicode"),
  ("nifti", "big-endian, as image"), ("nifti", "truncated, as image"),
  ("nifti", "unit that is none, as image"), ("nifti", "pixdim of 0, no sform, as image"),
  ("nifti", "header of 2000^3 voxels, unlabelled"), ("json", "symlink to /dev/zero"),
  ("json", "nested 10^5 deep"), ("json", "ignore label"), ("json", "channels a number"),
  ("json", "labels with digits of no number"), ("json", "one file in two cases"),
  ("config", "pattern without end"), ("itk", ".mha compressed, damaged, as image"),
  ("itk", ".mhd voxels in a device, as label"), ("nnunet", ".tif 16 bits, as image"),
  ("itk", ".gipl truncated, as image"),
  ("dicom", "a slice without an ending"), ("dicom", "a slice missing"),
  ("dicom", "FIFO as a slice"), ("dicom", "a segmentation cut"),
  ("scores", "symlink to /dev/zero"), ("masks", "bomb of 10^10 pixels"),
  ("lines", "as it should be"),
}  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", help="kinds, comma-separated")
  parser.add_argument("--short", action="store_true")
  options = parser.parse_args()
  import rndpo_jax.stages.prepare  # noqa: F401, once for all that are forked

  chosen = rows(options.short)
  if options.only:
    chosen = [row for row in chosen if row.kind in options.only.split(",")]
  count = dict.fromkeys(("taken", "refused", "FAILED"), 0)
  for row in chosen:
    with tempfile.TemporaryDirectory(prefix="odd_inputs_") as folder:
      verdict, text = run(row, pathlib.Path(folder) / "row")
      text = text.replace(f"{folder}/row/source/", "")
    count[verdict] += 1
    shown = text if verdict == "FAILED" else re.sub(r"\s+", " ", text)[:150]
    print(f"{row.kind:7} {row.name:45} {verdict:8} {shown}", flush=True)
  print(f"\n{len(chosen)} odd inputs: " + ", ".join(f"{n} {name}" for name, n in count.items()))
  sys.exit(1 if count["FAILED"] else 0)


if __name__ == "__main__":
  main()
