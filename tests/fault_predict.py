"""Prediction killed, or told to end: the same command goes on and gives the same masks."""

import shutil
import signal
import sys
import time

import nibabel
import nnunet_folder_test
import numpy as np
from fault_runs import wait_until

PREDICT = (sys.executable, "-m", "launch.predict")
CASES = 150  # so that most are left when the first mask is there


def predictions(campaign):
  """With the network of the undisturbed run, and with an nnU-Net folder."""
  images, model = campaign.folder / "images", campaign.folder / "model"
  _write_volumes(images)
  shutil.rmtree(model, ignore_errors=True)
  nnunet_folder_test.write(model)
  networks = {
    "work directory": f"--workdir={campaign.undisturbed}",
    "nnU-Net folder": f"--nnunet_folder={model}",
  }
  for name, network in networks.items():
    given = [network, f"--input={images}"]
    shutil.rmtree(campaign.folder / "predict-whole", ignore_errors=True)
    ended, want = _predict(campaign, "predict-whole", given)
    assert not any(ended.codes), ended.output()
    for number in (signal.SIGKILL, signal.SIGTERM):
      _ended_by(campaign, name, given, number, want)


def _ended_by(campaign, name, given, number, want):
  output = campaign.folder / "predict"
  shutil.rmtree(output, ignore_errors=True)
  ended, _ = _predict(campaign, "predict", given, number)
  there = {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
  done = {path.stem for path in output.glob("scores/*.json")}
  ok = ended.in_time and set(ended.codes) <= {0, 75, -number}
  again, found = _predict(campaign, "predict", given)
  kept = [output / f"{case_id}.nii.gz" for case_id in done]
  ok &= all(path.stat().st_mtime_ns == there[path.name] for path in kept)  # not predicted again
  ok &= not any(again.codes) and found == want
  shown = "same masks" if found == want else again.shown()
  moment = f"{name}, {len(done)} of {CASES} masks"
  campaign.add(f"predict, {number.name}", moment, ended.shown(), shown, ok)
  if not ok:
    print(ended.output(), again.output(), flush=True)


def _predict(campaign, name, given, number=None):
  """How it ended, and its files; `number` is sent once there is a mask."""
  output = campaign.folder / name
  programs = [PREDICT] * campaign.processes
  processes = campaign.start_programs(name, [*given, f"--output={output}"], programs)
  if number is not None:
    wait_until(processes, lambda: any(output.glob("scores/*.json")))
    time.sleep(campaign.random.uniform(0, 0.1))
    for process in processes:
      process.send_signal(number)
  ended = campaign.end(processes)
  paths = [*output.glob("*.nii.gz"), *output.glob("*.csv")]
  return ended, {path.name: path.read_bytes() for path in paths}


def _write_volumes(folder):
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  for n in range(CASES):
    volume = rng.integers(0, 255, (60, 60, 6)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([2.0, 1.5, 5, 1])), folder / f"c{n}.nii.gz")
