"""launch/gke_jobset.yaml: that the APIs take it, and what it runs and restarts."""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from jobset_api import JOBSET, disagreements, misfits
from launchers import LAUNCH, fake

EXPORTED = {
  "NAME": "ph2", "IMAGE": "registry/image", "CONFIG": "configs/ph2.py", "WORKDIR": "/runs/ph2",
  "CLAIM": "runs",
  "FLAGS": "--config.data.size='(64,64,32)' --config.data.case_pattern='(case\\d+)_z\\d+'",
}  # fmt: skip


def jobset(**exported):
  """As envsubst makes it, which takes $NAME and ${NAME} alone and leaves ${NAME:-DEFAULT}."""
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  exported = {**EXPORTED, **exported}
  made = re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda found: exported.get(found[1] or found[2], ""), text)
  if shutil.which("envsubst"):
    done = subprocess.run(["envsubst"], input=text, env=exported, capture_output=True, text=True)
    assert done.stdout == made
  return yaml.safe_load(made)


def test_jobset_fits_the_published_api():
  found = jobset()
  assert misfits(found, JOBSET, "jobset") == []
  assert list(disagreements(found)) == []


RULES = "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules"
POD_AT = "spec.replicatedJobs.0.template.spec.template.spec"
GONE_FIELD = object()


@pytest.mark.parametrize(
  "place,value,problem",
  [
    ("apiVersion", "jobset.x-k8s.io/v1", "does not fit"),
    ("spec.backoffLimit", 0, "unknown"),
    ("spec.failurePolicy.maxRestarts", "10", "does not fit"),
    ("spec.failurePolicy.maxRestarts", True, "does not fit"),
    ("spec.failurePolicy.rules.0.action", "Restart", "does not fit"),
    ("spec.failurePolicy.rules.0.name", "re-queue", "does not fit"),
    ("spec.failurePolicy.rules.0.onJobFailureReasons", ["Preempted"], "does not fit"),
    ("spec.replicatedJobs.0.template.spec.completionMode", "indexed", "does not fit"),
    ("spec.replicatedJobs.0.template.spec.template", GONE_FIELD, "missing"),
    ("spec.replicatedJobs.0.template.spec.completions", GONE_FIELD, "Indexed without completions"),
    (f"{RULES}.0.action", "FailJobSet", "does not fit"),
    (f"{RULES}.0.action", "FailIndex", "FailIndex without backoffLimitPerIndex"),
    (f"{RULES}.0.onExitCodes.operator", "Equals", "does not fit"),
    (f"{RULES}.0.onExitCodes.values", [137, 75], "exit codes not in order"),
    (f"{RULES}.0.onExitCodes.values", [0, 75], "exit code 0 is no failure"),
    (f"{RULES}.0.onExitCodes.containerName", "other", "exit codes of an unknown container"),
    (f"{RULES}.1.onPodConditions.0.type", "Preempted", "does not fit"),
    (f"{RULES}.1.onPodConditions.0.status", True, "does not fit"),
    (f"{RULES}.0.onPodConditions", [{"type": "DisruptionTarget"}], "a rule needs one of"),
    (f"{RULES}.1.onPodConditions", GONE_FIELD, "a rule needs one of"),
    (f"{POD_AT}.restartPolicy", "OnFailure", "podFailurePolicy without restartPolicy Never"),
    (f"{POD_AT}.gracePeriodSeconds", 180, "unknown"),
    (f"{POD_AT}.nodeSelector", ["x"], "no object"),
    (f"{POD_AT}.containers.0.args", "python", "no list"),
    (f"{POD_AT}.containers.0.env.0.value", 600, "does not fit"),
    (f"{POD_AT}.containers.0.resources.limits", {"google.com/tpu": "four"}, "does not fit"),
    (f"{POD_AT}.containers.0.volumeMounts.1.name", "memory", "mount of an unknown volume"),
    (f"{POD_AT}.containers.0.volumeMounts.1.mountPath", "/runs", "two mounts at one path"),
    (f"{POD_AT}.volumes.1.emptyDir.medium", "RAM", "does not fit"),
    (f"{POD_AT}.volumes.1.emptyDir", GONE_FIELD, "a volume needs one source"),
    (f"{POD_AT}.volumes.1.name", "runs", "two volumes of one name"),
  ],
)
def test_checker_finds_each_mistake(place, value, problem):
  found = jobset()
  *path, field = [int(part) if part.isdigit() else part for part in place.split(".")]
  inner = found
  for part in path:
    inner = inner[part]
  if value is GONE_FIELD:
    del inner[field]
  else:
    inner[field] = value
  problems = misfits(found, JOBSET, "jobset") or list(disagreements(found))
  assert any(problem in one for one in problems), problems


def test_jobset_restarts_after_exit_code_75_and_preemption():
  policy = jobset()["spec"]["failurePolicy"]
  job = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert policy["maxRestarts"] > 0  # for failures of the machines
  (rule,) = policy["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  saved, killed = job["podFailurePolicy"]["rules"]
  assert saved["action"] == killed["action"] == "FailJob" and job["backoffLimit"] == 0
  assert saved["onExitCodes"]["values"] == [75] and saved["onExitCodes"]["operator"] == "In"
  assert killed["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_jobset_runs_a_process_on_each_host_of_one_slice():
  found = jobset()
  replicated = found["spec"]["replicatedJobs"][0]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert found["metadata"]["annotations"] == {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
  }
  assert replicated["replicas"] == 1 and job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"]
  rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
  chips = int(container["resources"]["limits"]["google.com/tpu"])
  assert rows * columns == chips * job["parallelism"]
  assert pod["terminationGracePeriodSeconds"] >= 60
  mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
  volumes = {volume["name"]: volume for volume in pod["volumes"]}
  assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
  assert volumes[mounted["/runs"]]["persistentVolumeClaim"] == {"claimName": "runs"}


@pytest.mark.parametrize("exported,seconds", [({}, "600"), ({"CONNECT_SECONDS": "7"}, "7")])
def test_jobset_passes_on_flags_and_exported_variables(tmp_path, exported, seconds):
  job = jobset(**exported)["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  fake(tmp_path, "python", """printf '%s\\n' "$@" """)
  env = {one["name"]: one["value"] for one in container["env"]}
  path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
  ran = subprocess.run(container["args"], env=path, capture_output=True, text=True).stdout
  assert ran.splitlines() == [
    "-m", "launch.run", "--distributed", f"--connect_seconds={seconds}",
    "--config=configs/ph2.py", "--workdir=/runs/ph2", "--config.data.size=(64,64,32)",
    r"--config.data.case_pattern=(case\d+)_z\d+",
  ]  # fmt: skip
