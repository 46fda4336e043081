"""The launchers: what they would run, that shellcheck finds nothing, and the JobSet's structure."""

import os
import pathlib
import re
import shutil
import string
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = ("multi_gpu.sh", "slurm.sbatch", "tpu_vm.sh", "quickstart.sh", "setup.sh")


def dry_run(script, *arguments, **variables):
  environment = {
    **os.environ, "DRY_RUN": "1", "CONFIG": "configs/ph2.py", "WORKDIR": "/runs/a", **variables
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments], env=environment, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def test_multi_gpu_is_one_process_or_shares_the_gpus():
  code, output, _ = dry_run("multi_gpu.sh", "--config.seed=1", GPUS="8")
  run = "python -m launch.run --config=configs/ph2.py --workdir=/runs/a --config.seed=1"
  assert code == 0 and output == f"on 8 GPUs: {run}\n"
  code, output, _ = dry_run("multi_gpu.sh", GPUS="8", PROCESSES="4", PORT="777")
  lines = output.splitlines()
  assert code == 0 and len(lines) == 4
  assert lines[3].startswith("CUDA_VISIBLE_DEVICES=6,7 python -m launch.run")
  assert lines[3].endswith("--coordinator_address=127.0.0.1:777 --num_processes=4 --process_id=3")
  code, _, error = dry_run("multi_gpu.sh", GPUS="8", PROCESSES="3")
  assert code != 0 and "PROCESSES=3 does not divide 8 GPUs" in error


def test_multi_gpu_hands_signals_and_exit_codes_on(tmp_path):
  (tmp_path / "launch").mkdir()
  shutil.copy(LAUNCH / "multi_gpu.sh", tmp_path / "launch")
  (tmp_path / "launch" / "setup.sh").write_text(f"PATH={tmp_path}:$PATH\n")
  # Stands for the program: on SIGTERM it takes a moment to save, then asks to be run again.
  (tmp_path / "python").write_text(
    "#!/usr/bin/env bash\ntrap 'sleep 0.3; exit 75' TERM\necho up\n"
    "for i in {1..200}; do sleep 0.1; done\n"
  )
  (tmp_path / "python").chmod(0o755)
  with subprocess.Popen(
    ["bash", tmp_path / "launch" / "multi_gpu.sh"],
    env={**os.environ, "CONFIG": "c", "WORKDIR": "w", "PROCESSES": "2", "GPUS": "2"},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.terminate()
    assert process.wait(timeout=60) == 75


def test_slurm_runs_a_task_a_gpu_and_gives_them_time_to_end():
  code, output, _ = dry_run("slurm.sbatch", "--config.seed=1", SLURM_SUBMIT_DIR=".")
  assert code == 0 and output == (
    "srun --kill-on-bad-exit=0 --wait=120 python -m launch.run --distributed "
    "--config=configs/ph2.py --workdir=/runs/a --config.seed=1\n"
  )
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert re.search(r"^#SBATCH --requeue$", text, re.M)
  assert re.search(r"^#SBATCH --signal=TERM@\d+$", text, re.M)
  tasks, gpus = (
    re.search(rf"^#SBATCH --{name}-per-node=(\d+)$", text, re.M)[1] for name in ("ntasks", "gpus")
  )
  assert tasks == gpus


def test_slurm_requeues_what_was_saved(tmp_path):
  for name, body in (("srun", "exit 75"), ("scontrol", 'echo "scontrol $*"')):
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tmp_path / name).chmod(0o755)
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "setup.sh").write_text("")
  environment = {
    **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "c", "WORKDIR": "w",
    "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12",
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 75 and "scontrol requeue 12" in done.stdout, done


def test_tpu_vm_creates_installs_runs_and_fetches_in_order():
  code, output, _ = dry_run("tpu_vm.sh", "--config.seed=1", NAME="slice", ZONE="zone", DELETE="1")
  steps = [
    "tpu-vm create slice", "git archive", "scp", "setup.sh\\ tpu", "launch.run\\ --distributed",
    "slice:/runs/a/results.json", "tpu-vm delete slice",
  ]  # fmt: skip
  places = [output.find(step) for step in steps]
  assert code == 0 and -1 not in places and places == sorted(places), (output, places)
  assert output.count("--worker=all") == 3


@pytest.mark.parametrize("script", ["multi_gpu.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_what_is_missing_is_named(script):
  code, _, error = dry_run(script, CONFIG="")
  assert code != 0 and ("CONFIG" in error or "NAME" in error)


@pytest.mark.parametrize("name", [*SCRIPTS, "gke_jobset.yaml"])
def test_launchers_are_short_and_clean(name):
  text = (LAUNCH / name).read_text()
  assert len(text.splitlines()) <= 60
  if name in SCRIPTS and shutil.which("shellcheck"):
    done = subprocess.run(
      ["shellcheck", "-x", f"launch/{name}"], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def expect(value, shape, where="jobset"):
  """Checks nested values against {key: shape, "key?": shape}, [shape], a type or a constant."""
  if isinstance(shape, dict):
    assert isinstance(value, dict), where
    known = {key.rstrip("?"): key for key in shape}
    assert set(value) <= set(known), f"{where}: unknown {set(value) - set(known)}"
    for key, name in known.items():
      assert key in value or name.endswith("?"), f"{where}.{key} is missing"
      if key in value:
        expect(value[key], shape[name], f"{where}.{key}")
  elif isinstance(shape, list):
    assert isinstance(value, list) and value, where
    for i, item in enumerate(value):
      expect(item, shape[0], f"{where}[{i}]")
  elif isinstance(shape, type):
    assert type(value) is shape, f"{where}: {value!r} is no {shape.__name__}"
  else:
    assert value == shape, f"{where}: {value!r}, expected {shape!r}"


CONTAINER = {
  "name": "main", "image": str, "args": [str], "resources": {"limits": {"google.com/tpu": str}},
  "volumeMounts": [{"name": str, "mountPath": str}],
}  # fmt: skip
POD = {
  "restartPolicy": "Never",  # a podFailurePolicy needs it
  "terminationGracePeriodSeconds": int,
  "nodeSelector": {
    "cloud.google.com/gke-tpu-accelerator": str,
    "cloud.google.com/gke-tpu-topology": str,
  },
  "containers": [CONTAINER],
  "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
EXIT_CODES = {"containerName": "main", "operator": "In", "values": [int]}
JOB = {
  "parallelism": int, "completions": int, "completionMode": "Indexed", "backoffLimit": 0,
  "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": EXIT_CODES}]},
  "template": {"spec": POD},
}  # fmt: skip
RULE = {
  "name": str, "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": [str]
}  # fmt: skip
JOBSET = {
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {"name": str},
  "spec": {
    "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
  },
}


def test_jobset_has_the_structure_of_v1alpha2():
  text = string.Template((LAUNCH / "gke_jobset.yaml").read_text()).substitute(
    NAME="ph2", IMAGE="registry/image", CONFIG="configs/ph2.py", WORKDIR="/runs/ph2", CLAIM="runs"
  )
  jobset = yaml.safe_load(text)
  expect(jobset, JOBSET)
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert "PodFailurePolicy" in jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"]
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
  (container,) = pod["containers"]
  rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  chips = int(container["resources"]["limits"]["google.com/tpu"])
  assert rows * columns == chips * job["parallelism"]
  assert container["args"][-2:] == ["--config=configs/ph2.py", "--workdir=/runs/ph2"]
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}
