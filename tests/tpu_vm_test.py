"""launch/tpu_vm.sh on slices that are folders of this host."""

import os
import re
import shutil
import subprocess

import pytest
from launchers import LAUNCH, dry_run, fake


def test_creates_installs_runs_and_fetches_in_order():
  code, output, _ = dry_run("tpu_vm.sh", "--config.seed=1", NAME="slice", ZONE="zone", DELETE="1")
  steps = [
    "tpu-vm create slice", "git archive", "scp", "setup.sh tpu", "launch.run --distributed",
    "slice:/runs/a/results.json", "tpu-vm delete slice",
  ]  # fmt: skip
  places = [output.replace("\\", "").find(step) for step in steps]
  assert code == 0 and -1 not in places and places == sorted(places), (output, places)
  assert output.count("--worker=all") == 3
  more = {"WORKDIR": "gs://bucket/a", "CONNECT_SECONDS": "7"}
  _, output, _ = dry_run("tpu_vm.sh", NAME="slice", ZONE="zone", **more)
  assert "--connect_seconds=7 " in output.replace("\\", "")
  assert "storage cp gs://bucket/a/results.json runs/slice/results.json" in output
  assert "source launch/setup.sh tpu,gcs" in output.replace("\\", "")
  code, output, error = dry_run("tpu_vm.sh", NAME="slice", ZONE="zone", WORKDIR="runs/a")
  assert code == 2 and not output and "expected an absolute path or gs://BUCKET/FOLDER" in error


# A slice of two workers, each a folder, that sends what starts the job twice, as gcloud does after
# a broken connection; that of the first watcher breaks where there is a file `drop`, which says the
# state from then on. The jobs last until they are watched, and results are there when both have
# ended.
GCLOUD = """
set -e
for x; do case $x in --worker=*) worker=${x#*=} ;; --command=*) command=${x#*=} ;; esac; done
case $4 in
  describe) case $* in *csv*) cat $HOME/was ;; *) cat $HOME/state ;; esac ;;
  create | start | delete) echo "${@:4}" >>$HOME/did; echo READY >$HOME/state ;;
  scp)
    if [ "$worker" = all ]; then
      for i in 0 1; do mkdir -p $HOME/$i; cp "$5" $HOME/$i/${6#*:}; done
      exit
    fi
    tail -f /dev/null --pid=$(cat $HOME/1/rndpo_jax/job.pid)
    echo result >"$8" ;;
  ssh)
    if [ "$worker" = all ]; then workers="0 1"; else workers=$worker; fi
    for i in $workers; do
      cd $HOME/$i
      case $command in
        *nohup*) for i in 1 2; do bash -c "$command" </dev/null; done ;;
        *tail*)
          touch $HOME/watched
          if [ -e $HOME/drop ]; then mv $HOME/drop $HOME/state; exit 255; fi
          bash -c "$command" ;;
        *) bash -c "$command" ;;
      esac
    done ;;
esac
"""
GIT = """
case $1 in
  status) cat $HOME/uncommitted ;;
  archive) tar -czf ${2#--output=} -C $HOME/tree launch ;;
esac
"""
# That of a worker: installs uv, by which it makes the folder in which the job's Python is.
PYTHON3 = """
echo "$*" >>python3.log
case $* in
  "-m uv venv "*) mkdir -p ${!#}/bin; cp $HOME/program ${!#}/bin/python ;;
esac
"""


def tpu_vm(tmp_path, program, **variables):
  """Runs tpu_vm.sh on a slice of folders, where `program` stands for the job."""
  (tmp_path / "here" / "launch").mkdir(parents=True, exist_ok=True)
  for name in ("tpu_vm.sh", "tpu_slice.sh"):
    shutil.copy(LAUNCH / name, tmp_path / "here" / "launch")
  fake(tmp_path / "tree" / "launch", "setup.sh", 'echo "$1" by "$PYTHON" >installed')
  wait = "until [ -e $HOME/watched ]; do command -p sleep 0.05; done"
  fake(tmp_path, "program", f'echo $PPID "$*" >>calls\n{wait}\n{program}')
  fakes = {"gcloud": GCLOUD, "git": GIT, "python3": PYTHON3, "sudo": 'echo "$*" >>../sudo.log'}
  for name, body in {**fakes, "sleep": ""}.items():
    fake(tmp_path, name, body)
  for name, content in (("state", "READY"), ("was", "v5litepod-16,v2,,\n"), ("uncommitted", "")):
    if not (tmp_path / name).exists():
      (tmp_path / name).write_text(content)
  environment = {
    **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "USER": "me",
    "NAME": "slice", "ZONE": "zone", "CONFIG": "c", "WORKDIR": "/w", **variables,
  }  # fmt: skip
  return subprocess.run(
    ["bash", tmp_path / "here" / "launch" / "tpu_vm.sh", "--config.data.root=a b"],
    env=environment, capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_installs_the_commit_with_a_released_python(tmp_path):
  done = tpu_vm(tmp_path, "", WORKDIR="gs://bucket/w")
  assert done.returncode == 0 and "warning" not in done.stderr, done
  for worker in ("0", "1"):
    folder = tmp_path / worker / "rndpo_jax"
    assert (folder / "installed").read_text() == "tpu,gcs by .venv/bin/python\n"
    assert (folder / "python3.log").read_text().splitlines() == [
      "-m pip install --quiet --user uv", "-m uv venv --quiet --seed --python=3.12 .venv"
    ]  # fmt: skip
    assert (tmp_path / worker / "sudo.log").read_text() == "loginctl enable-linger me\n"


def test_uncommitted_changes_are_a_warning(tmp_path):
  (tmp_path / "uncommitted").write_text("?? configs/mine.py\n")
  done = tpu_vm(tmp_path, "")
  assert done.returncode == 0 and "warning: what is not committed stays here" in done.stderr


def test_broken_connection_is_watched_again_and_exit_code_75_starts_again(tmp_path):
  (tmp_path / "drop").write_text("READY")
  done = tpu_vm(tmp_path, "echo log; [ $(wc -l <calls) -gt 1 ] || exit 75")
  assert done.returncode == 0 and not (tmp_path / "drop").exists(), done
  run = "-m launch.run --distributed --connect_seconds=60 --config=c --workdir=/w"
  for worker in ("0", "1"):
    calls = (tmp_path / worker / "rndpo_jax" / "calls").read_text().splitlines()
    job = (tmp_path / worker / "rndpo_jax" / "job.pid").read_text().strip()
    assert calls == [f"{job} {run} --config.data.root=a b"] * 2  # both of the one job
  assert (tmp_path / "here" / "runs" / "slice" / "report.html").read_text() == "result\n"


def test_exit_code_of_the_job_is_passed_on(tmp_path):
  done = tpu_vm(tmp_path, "exit 3")
  assert done.returncode == 3 and not (tmp_path / "here" / "runs").exists(), done


GONE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'slice' was not found"


@pytest.mark.parametrize("state", ["PREEMPTED", "STOPPED", GONE])
def test_exit_code_75_if_the_slice_is_gone(tmp_path, state):
  (tmp_path / "drop").write_text(state)
  done = tpu_vm(tmp_path, "")
  assert done.returncode == 75 and "slice or its job went away" in done.stderr, done


@pytest.mark.parametrize(
  "state,expected",
  [
    ("PREEMPTED", ["delete", "create"]),
    ("TERMINATED", ["delete", "create"]),
    ("STOPPED", ["start"]),
    (GONE, ["create"]),
  ],
)
def test_preempted_or_missing_slice_is_created_again(tmp_path, state, expected):
  (tmp_path / "state").write_text(state)
  done = tpu_vm(tmp_path, "")
  did = (tmp_path / "did").read_text().splitlines()
  assert done.returncode == 0 and [line.split()[0] for line in did] == expected, done
  assert all(line.split()[1:3] == ["slice", "--zone=zone"] for line in did)


def have_slice(tmp_path, state, was, **variables):
  """What tpu_vm.sh does first, on a slice in that state, of that type, runtime and provisioning."""
  fake(tmp_path, "gcloud", GCLOUD)
  (tmp_path / "state").write_text(state)
  (tmp_path / "was").write_text(f"{was}\n")
  environment = {
    **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path),
    "NAME": "slice", "ZONE": "zone", **variables,
  }  # fmt: skip
  return subprocess.run(
    ["bash", "-euo", "pipefail", "-c", f"source {LAUNCH}/tpu_slice.sh; have_slice"],
    env=environment, cwd=tmp_path, capture_output=True, text=True,
  )  # fmt: skip


NEW = {"TYPE": "v6e-8", "VERSION": "v2-alpha-tpuv6e"}


@pytest.mark.parametrize(
  "state,was,variables,flags",
  [
    (GONE, "", {}, "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
    (
      GONE, "", {**NEW, "CREATE": "--spot  --metadata-from-file=startup-script=*.sh"},
      "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot "
      "--metadata-from-file=startup-script=*.sh",
    ),
    ("PREEMPTED", "v4-32,base,True,", {}, "--accelerator-type=v4-32 --version=base --spot"),
    ("PREEMPTED", "v4-32,base,True,True", {}, "--accelerator-type=v4-32 --version=base --spot"),
    ("TERMINATED", "v4-32,base,,True", {}, "--accelerator-type=v4-32 --version=base --preemptible"),
    ("PREEMPTED", "v4-32,base,False,", {}, "--accelerator-type=v4-32 --version=base"),
    (
      "PREEMPTED", "projects/p/locations/z/acceleratorTypes/v3-32,base,,", {},
      "--accelerator-type=v3-32 --version=base",
    ),
    (
      "PREEMPTED", "v4-32,base,True,", {"CREATE": "--network=net"},
      "--accelerator-type=v4-32 --version=base --network=net --spot",
    ),
    (
      "PREEMPTED", "v4-32,base,True,", {**NEW, "CREATE": "--reserved"},
      "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --reserved",
    ),
    (  # made by --topology
      "PREEMPTED", ",base,,True", {"TYPE": "v4-32"},
      "--accelerator-type=v4-32 --version=base --preemptible",
    ),
  ],
)  # fmt: skip
def test_slice_is_created_again_with_the_same_type_unless_told(
  tmp_path, state, was, variables, flags
):
  done = have_slice(tmp_path, state, was, **variables)
  *before, create = (tmp_path / "did").read_text().splitlines()
  assert done.returncode == 0 and create == f"create slice --zone=zone {flags}", done
  assert before == ([] if state == GONE else ["delete slice --zone=zone --quiet"])


def test_slice_of_unknown_type_is_not_deleted(tmp_path):
  done = have_slice(tmp_path, "PREEMPTED", ",base,True,")
  assert done.returncode == 2 and not (tmp_path / "did").exists(), done
  assert re.fullmatch(r"error: slice has no accelerator type .*: set TYPE\n", done.stderr)


@pytest.mark.parametrize("state", ["CREATING", "ERROR: no credentials"])
def test_slice_in_another_state_is_an_error(tmp_path, state):
  (tmp_path / "state").write_text(state)
  done = tpu_vm(tmp_path, "")
  assert done.returncode == 1 and f"slice: found '{state}', expected READY" in done.stderr, done
  assert not (tmp_path / "did").exists() and not (tmp_path / "0").exists()
