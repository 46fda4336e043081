"""The real nnU-Net runs on what launch.export wrote, and its masks are those of launch.predict.

RNDPO_NNUNET_PYTHON is the interpreter of an environment with nnunetv2, RNDPO_NNUNET_MODEL a folder
with model/DATASET/CONFIGURATION, raw/DATASET and expected/imagesTs/no_mirroring. Takes minutes.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NEEDED = ("RNDPO_NNUNET_PYTHON", "RNDPO_NNUNET_MODEL")
pytestmark = pytest.mark.skipif(
  not all(name in os.environ for name in NEEDED), reason="no nnU-Net and model of it here"
)
STAGES = "prepare,base,mine,finetune"
TINY = {
  "data.num_labelled": 1, "data.num_val": 1, "data.num_test": 1, "data.num_unlabelled": 1,
  "data.group_pattern": r"(patient\d+)", "proposals.mix": "base:1,threshold:2",
  "mine.pairs_per_image": 1, "mine.num_shards": 1, "judge.gate.action": "off",
  "judge.num_bootstrap": 10, "finetune.num_steps": 4, "finetune.eval_every_steps": 4,
  "finetune.batch_size": 4, "finetune.learning_rate": 1e-3, "evaluate.batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def given():
  return pathlib.Path(os.environ["RNDPO_NNUNET_MODEL"])


def program(name, *flags):
  """A program of this package, in one process with one device as it is in use."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", f"launch.{name}", *flags]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def run(given, folder, fold, *flags, stages=STAGES):
  (raw,), (model,) = (list((given / part).glob(level)) for part, level in PLACES)
  config = [f"--config.{key}={value}" for key, value in TINY.items()]
  program(
    "run", "--config=configs/nnunet_model.py", f"--workdir={folder}", f"--stages={stages}",
    f"--config.base.nnunet_folder={model}", f"--config.data.root={raw}",
    f"--config.base.fold={fold}", *config, *flags,
  )  # fmt: skip


PLACES = (("raw", "*"), ("model", "*/*"))


def nnunet(model, fold, images, output):
  """Masks of the real program."""
  code = "from nnunetv2.inference.predict_from_raw_data import *; predict_entry_point_modelfolder()"
  flags = ["-i", images, "-o", output, "-m", model, "-f", fold, "-device", "cpu"]
  flags += ["--disable_tta", "-npp", "1", "-nps", "1"]
  places = {f"nnUNet_{name}": str(output) for name in ("raw", "preprocessed", "results")}
  command = [os.environ["RNDPO_NNUNET_PYTHON"], "-c", code, *map(str, flags)]
  environment = {**os.environ, **places, "nnUNet_def_n_proc": "2"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output.parent)
  assert done.returncode == 0, done.stdout + done.stderr


def share_equal(found, wanted, name):
  """Voxels that are equal, of all; printed."""
  equal = total = 0
  paths = sorted(found.glob("*.nii.gz"))
  assert paths
  for path in paths:
    a, b = (np.asarray(nibabel.load(place / path.name).dataobj) for place in (found, wanted))
    equal, total = equal + np.count_nonzero(a == b), total + a.size
    assert (a > 0).any()
  print(f"{name}: {equal} of {total} voxels equal ({equal / total:.5%})")
  return equal / total


@pytest.fixture(scope="module")
def images(given, tmp_path_factory):
  """Two of the test cases."""
  folder = tmp_path_factory.mktemp("images")
  for path in sorted(next((given / "raw").glob("*")).glob("imagesTs/*.nii.gz"))[::2]:
    shutil.copy(path, folder)
  return folder


def test_masks_of_both_programs_are_equal_after_export(given, images, tmp_path):
  """The base goes out as it came; after fine-tuning its masks are others, and equal again."""
  work = tmp_path / "work"
  run(given, work, 0)
  for which in ("base", "last"):
    flags = (f"--workdir={work}", f"--checkpoint={which}")
    program("export", *flags, "--format=nnunet", f"--output={tmp_path / which / 'model'}")
    program("predict", *flags, f"--input={images}", f"--output={tmp_path / which / 'ours'}")
    nnunet(tmp_path / which / "model", 0, images, tmp_path / which / "theirs")
  base, last = tmp_path / "base", tmp_path / "last"
  stored = given / "expected" / "imagesTs" / "no_mirroring"
  assert share_equal(base / "theirs", stored, "nnU-Net on the base, and on the original") == 1
  for folder in (base, last):
    shown = f"nnU-Net and launch.predict, {folder.name}"
    assert share_equal(folder / "theirs", folder / "ours", shown) >= 0.999
  changed = share_equal(last / "theirs", base / "theirs", "nnU-Net before and after fine-tuning")
  assert changed < 1


def test_a_network_of_ours_from_nothing_runs_in_nnunet(given, images, tmp_path):
  """Residual, with a norm in the mask and patches that are longer than wide."""
  (raw,) = (given / "raw").glob("*")
  config = {
    **TINY, "data.root": raw, "data.spacing": (2.0, 1.5), "data.patch_size": (96, 128),
    "data.schemes": ("zscore_in_mask",), "model.name": "nnunet_residual", "model.width": 4,
    "model.norm": "group", "augment.turn": 0.0, "base.num_steps": 30, "base.warmup_steps": 2,
    "base.batch_size": 4, "base.eval_every_steps": 30,
  }  # fmt: skip
  work = tmp_path / "work"
  flags = [f"--config.{key}={value}" for key, value in config.items()]
  program("run", "--config=configs/nnunet.py", f"--workdir={work}", "--stages=prepare,base", *flags)
  flags = (f"--workdir={work}", "--checkpoint=base")
  program("export", *flags, "--format=nnunet", f"--output={tmp_path / 'model'}")
  program("predict", *flags, f"--input={images}", f"--output={tmp_path / 'ours'}")
  nnunet(tmp_path / "model", 0, images, tmp_path / "theirs")
  shown = "nnU-Net and launch.predict, a network from nothing"
  assert share_equal(tmp_path / "theirs", tmp_path / "ours", shown) >= 0.999
