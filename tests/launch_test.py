"""The launchers: what they run, that shellcheck finds nothing, that the APIs take the JobSet."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = (
  "multi_gpu.sh", "slurm.sbatch", "tpu_vm.sh", "tpu_slice.sh", "quickstart.sh", "setup.sh"
)  # fmt: skip


def dry_run(script, *arguments, **variables):
  environment = {
    **os.environ, "DRY_RUN": "1", "CONFIG": "configs/ph2.py", "WORKDIR": "/runs/a", **variables
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / script, *arguments], env=environment, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def fake(folder, name, body):
  """A program of that name, for a PATH that begins with `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
  (folder / name).chmod(0o755)


def test_arguments_are_the_programs_and_not_those_of_setup(tmp_path):
  (tmp_path / "launch").mkdir()
  for name in ("quickstart.sh", "setup.sh"):
    shutil.copy(LAUNCH / name, tmp_path / "launch")
  (tmp_path / "setup.cfg").touch()
  fake(tmp_path / ".venv" / "bin", "python", 'echo "$*"')  # runs pip and the program
  (tmp_path / ".venv" / "bin" / "activate").write_text("PATH=$PWD/.venv/bin:$PATH\n")
  for extra, editable in (("", "."), ("cuda12", ".[cuda12]")):
    done = subprocess.run(
      ["bash", tmp_path / "launch" / "quickstart.sh", "--config.seed=1"],
      env={**os.environ, "PYTHON": "true", "WORKDIR": "w", "EXTRA": extra},
      capture_output=True,
      text=True,
    )
    installed, ran = done.stdout.splitlines()
    assert installed.endswith(f" --editable {editable}"), done
    assert ran == "-m launch.run --config=configs/quickstart.py --workdir=w --config.seed=1"


def test_a_failed_install_is_tried_again(tmp_path):
  (tmp_path / "setup.cfg").touch()
  fake(tmp_path / ".venv" / "bin", "python", "exit 3")
  (tmp_path / ".venv" / "bin" / "activate").touch()
  for _ in range(2):  # as in an interactive shell, which goes on after an error and must not end
    done = subprocess.run(
      ["bash", "-c", f"source {LAUNCH / 'setup.sh'} cuda12; echo $?"],
      cwd=tmp_path,
      env={**os.environ, "PYTHON": "true"},
      capture_output=True,
      text=True,
    )
    assert done.stdout == "3\n"


def test_multi_gpu_is_one_process_or_shares_the_gpus():
  visible = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,9,GPU-7"}
  code, output, _ = dry_run("multi_gpu.sh", "--config.seed=1", **visible)
  head = ["# on 8 GPUs", "source launch/setup.sh cuda12"]
  run = "python -m launch.run --config=configs/ph2.py --workdir=/runs/a --config.seed=1"
  assert code == 0 and output.splitlines() == [*head, f"{run} "]
  code, output, _ = dry_run("multi_gpu.sh", PROCESSES="4", PORT="777", **visible)
  *said, first, _, _, last, wait = output.splitlines()
  assert code == 0 and said == head and wait == "wait"
  first, last = shlex.split(first), shlex.split(last)
  assert first[:4] == ["CUDA_VISIBLE_DEVICES=0,1", "python", "-m", "launch.run"]
  assert last[0] == "CUDA_VISIBLE_DEVICES=9,GPU-7" and first[-1] == last[-1] == "&"
  assert last[-4:-1] == [
    "--coordinator_address=127.0.0.1:777", "--num_processes=4", "--process_id=3"
  ]  # fmt: skip
  code, _, error = dry_run("multi_gpu.sh", PROCESSES="3", **visible)
  assert code != 0 and "PROCESSES=3 does not divide 8 GPUs" in error


@pytest.mark.parametrize(
  "script,variables,processes",
  [
    ("quickstart.sh", {}, 1),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "2"}, 2),
    ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "."}, 2),  # one of them loads JAX on every node
  ],
)
def test_a_dry_run_can_be_pasted(tmp_path, script, variables, processes):
  flags = ["--config.data.root=a b", "--config.data.case_pattern=(case\\d+)_z\\d+$"]
  variables = {"EXTRA": "tpu gcs", "WORKDIR": "/my runs/a", **variables}
  _, output, _ = dry_run(script, *flags, **variables)
  fake(tmp_path, "python", """printf '%s\\n' "$@" >$$.call""")
  fake(tmp_path, "srun", 'until [ "$1" = python ]; do shift || exit; done; exec "$@"')
  fake(tmp_path / "launch", "setup.sh", 'echo "$1" >installed; PATH=$PWD:$PATH')
  subprocess.run(["bash"], input=output, cwd=tmp_path, text=True, check=True)
  assert (tmp_path / "installed").read_text() == "tpu gcs\n"
  calls = [path.read_text().splitlines() for path in tmp_path.glob("*.call")]
  assert len(calls) == processes
  runs = [call for call in calls if "launch.run" in call]
  assert len(runs) == processes - (script == "slurm.sbatch")
  assert all({"--workdir=/my runs/a", *flags} <= set(call) for call in runs), calls


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("visible", ["", "-1"])
def test_multi_gpu_without_a_gpu_is_refused(processes, visible):
  code, output, error = dry_run("multi_gpu.sh", PROCESSES=processes, CUDA_VISIBLE_DEVICES=visible)
  assert code == 2 and not output and f"PROCESSES={processes} does not divide 0 GPUs" in error


def test_multi_gpu_counts_gpus_and_not_their_parts(tmp_path, monkeypatch):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  fake(tmp_path, "nvidia-smi", "printf 'GPU 0: H100\\n  MIG 1g.10gb Device 0:\\nGPU 1: H100\\n'")
  path = f"{tmp_path}:{os.environ['PATH']}"
  _, output, _ = dry_run("multi_gpu.sh", PROCESSES="2", PATH=path)
  assert re.findall(r"^CUDA\S+", output, re.M) == [
    "CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"
  ]  # fmt: skip
  fake(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
  assert dry_run("multi_gpu.sh", PATH=path)[0] == 2


def multi_gpu(tmp_path, program, processes):
  """multi_gpu.sh on two GPUs, in processes that `program` stands for."""
  (tmp_path / "launch").mkdir()
  shutil.copy(LAUNCH / "multi_gpu.sh", tmp_path / "launch")
  (tmp_path / "launch" / "setup.sh").write_text(f"PATH={tmp_path}:$PATH\n")
  fake(tmp_path, "python", program)
  variables = {
    "CONFIG": "c", "WORKDIR": "w", "PROCESSES": str(processes), "CUDA_VISIBLE_DEVICES": "0,1"
  }  # fmt: skip
  return subprocess.Popen(
    ["bash", tmp_path / "launch" / "multi_gpu.sh"],
    env={**os.environ, **variables},
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("processes", [1, 2])
def test_multi_gpu_hands_signals_and_exit_codes_on(tmp_path, processes):
  # Stands for the program: on SIGTERM it takes a moment to save, then asks to be run again.
  program = """trap 'sleep 0.3; exit 75' TERM; echo $$; for i in {1..200}; do sleep 0.1; done"""
  with multi_gpu(tmp_path, program, processes) as process:
    pids = [int(process.stdout.readline()) for _ in range(processes)]
    assert (pids == [process.pid]) == (processes == 1)  # one alone takes the script's place
    process.terminate()
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("codes,expected", [("3 0", 3), ("0 4", 4), ("3 4", 3), ("0 0", 0)])
def test_multi_gpu_fails_where_any_process_does(tmp_path, codes, expected):
  program = f"codes=({codes}); last=${{!#}}; exit ${{codes[${{last#--process_id=}}]}}"
  with multi_gpu(tmp_path, program, 2) as process:
    assert process.wait(timeout=60) == expected


def test_slurm_runs_a_task_a_gpu_and_gives_them_time_to_end():
  code, output, _ = dry_run("slurm.sbatch", "--config.seed=1", SLURM_SUBMIT_DIR=".")
  setup, load, run, after = output.splitlines()
  assert code == 0 and setup == "source launch/setup.sh cuda12"
  assert shlex.split(load) == [
    "srun", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0",
    "python", "-c", "import jax, rndpo_jax.pipeline; jax.devices()",
  ]  # fmt: skip
  assert run == (
    "srun --cpus-per-task=8 --kill-on-bad-exit=0 --wait=120 python -m launch.run --distributed "
    "--connect_seconds=60 --config=configs/ph2.py --workdir=/runs/a --config.seed=1 "
  )
  assert after.startswith("# after exit code 75") and "scontrol requeue" in after
  text = (LAUNCH / "slurm.sbatch").read_text()
  assert re.search(r"^#SBATCH --cpus-per-task=8$", text, re.M)
  assert re.search(r"^#SBATCH --nodes=2$", text, re.M)
  given = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_NUM_NODES": "5", "CONNECT_SECONDS": "7"}
  _, load, run, _ = dry_run("slurm.sbatch", SLURM_SUBMIT_DIR=".", **given)[1].splitlines()
  assert load.startswith("srun --ntasks=5 --ntasks-per-node=1 ")
  assert run.startswith("srun --cpus-per-task=3 ") and "--connect_seconds=7 " in run
  assert re.search(r"^#SBATCH --requeue$", text, re.M)
  assert re.search(r"^#SBATCH --open-mode=append$", text, re.M)  # a requeued job keeps its log
  assert re.search(r"^#SBATCH --signal=TERM@\d+$", text, re.M)
  tasks, gpus = (
    re.search(rf"^#SBATCH --{name}-per-node=(\d+)$", text, re.M)[1] for name in ("ntasks", "gpus")
  )
  assert tasks == gpus


@pytest.mark.parametrize(
  "script,variables",
  [
    ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "."}),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ("multi_gpu.sh", {"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "2"}),
    ("tpu_vm.sh", {"NAME": "slice", "ZONE": "zone"}),
  ],
)
def test_launchers_run_a_sweep_where_it_is_named(script, variables):
  code, output, error = dry_run(script, "--betas=3,10", PROGRAM="launch.sweep", **variables)
  assert code == 0 and "error" not in error  # of tpu_vm.sh perhaps the warning about this checkout
  assert "launch.run" not in output and "--betas" in output
  found = output.replace("\\", "").count("-m launch.sweep --")
  assert found == int(variables.get("PROCESSES", 1))
  if script == "tpu_vm.sh":
    assert "slice:/runs/a/sweep/sweep.json" in output and "results.json" not in output


@pytest.mark.parametrize(
  "load,program,code,requeued",
  [
    (0, 0, 0, False), (0, 75, 75, True), (0, 1, 1, False), (0, 137, 137, False),
    (0, 143, 143, True),  # SIGTERM, before a process could take it
    (143, 0, 143, True), (1, 0, 1, False),
    (75, 0, 75, False),  # the loading saves nothing
  ],
)  # fmt: skip
def test_slurm_requeues_what_sigterm_ended(tmp_path, load, program, code, requeued):
  fake(tmp_path, "srun", f'case "$*" in *" -c "*) exit {load} ;; *) exit {program} ;; esac')
  fake(tmp_path, "scontrol", 'echo "scontrol $*"')
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "setup.sh").write_text("")
  environment = {
    **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "c", "WORKDIR": "w",
    "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12",
  }  # fmt: skip
  done = subprocess.run(
    ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True
  )
  assert done.returncode == code and ("scontrol requeue 12" in done.stdout) == requeued, done


def test_tpu_vm_creates_installs_runs_and_fetches_in_order():
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


def test_tpu_vm_installs_what_is_committed_by_a_released_python(tmp_path):
  done = tpu_vm(tmp_path, "", WORKDIR="gs://bucket/w")
  assert done.returncode == 0 and "warning" not in done.stderr, done
  for worker in ("0", "1"):
    folder = tmp_path / worker / "rndpo_jax"
    assert (folder / "installed").read_text() == "tpu,gcs by .venv/bin/python\n"
    assert (folder / "python3.log").read_text().splitlines() == [
      "-m pip install --quiet --user uv", "-m uv venv --quiet --seed --python=3.12 .venv"
    ]  # fmt: skip
    assert (tmp_path / worker / "sudo.log").read_text() == "loginctl enable-linger me\n"


def test_tpu_vm_warns_of_what_is_not_committed(tmp_path):
  (tmp_path / "uncommitted").write_text("?? configs/mine.py\n")
  done = tpu_vm(tmp_path, "")
  assert done.returncode == 0 and "warning: what is not committed stays here" in done.stderr


def test_tpu_vm_watches_through_a_broken_connection_and_starts_again_after_75(tmp_path):
  (tmp_path / "drop").write_text("READY")
  done = tpu_vm(tmp_path, "echo log; [ $(wc -l <calls) -gt 1 ] || exit 75")
  assert done.returncode == 0 and not (tmp_path / "drop").exists(), done
  run = "-m launch.run --distributed --connect_seconds=60 --config=c --workdir=/w"
  for worker in ("0", "1"):
    calls = (tmp_path / worker / "rndpo_jax" / "calls").read_text().splitlines()
    job = (tmp_path / worker / "rndpo_jax" / "job.pid").read_text().strip()
    assert calls == [f"{job} {run} --config.data.root=a b"] * 2  # both of the one job
  assert (tmp_path / "here" / "runs" / "slice" / "report.html").read_text() == "result\n"


def test_tpu_vm_hands_the_jobs_exit_code_on(tmp_path):
  done = tpu_vm(tmp_path, "exit 3")
  assert done.returncode == 3 and not (tmp_path / "here" / "runs").exists(), done


GONE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'slice' was not found"


@pytest.mark.parametrize("state", ["PREEMPTED", "STOPPED", GONE])
def test_tpu_vm_tells_a_slice_that_was_taken_away(tmp_path, state):
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
def test_tpu_vm_brings_back_what_was_taken_away(tmp_path, state, expected):
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
def test_tpu_vm_makes_a_slice_again_as_it_was_unless_told(tmp_path, state, was, variables, flags):
  done = have_slice(tmp_path, state, was, **variables)
  *before, create = (tmp_path / "did").read_text().splitlines()
  assert done.returncode == 0 and create == f"create slice --zone=zone {flags}", done
  assert before == ([] if state == GONE else ["delete slice --zone=zone --quiet"])


def test_tpu_vm_deletes_no_slice_of_unknown_type(tmp_path):
  done = have_slice(tmp_path, "PREEMPTED", ",base,True,")
  assert done.returncode == 2 and not (tmp_path / "did").exists(), done
  assert re.fullmatch(r"error: slice has no accelerator type .*: set TYPE\n", done.stderr)


@pytest.mark.parametrize("state", ["CREATING", "ERROR: no credentials"])
def test_tpu_vm_waits_for_no_slice_in_another_state(tmp_path, state):
  (tmp_path / "state").write_text(state)
  done = tpu_vm(tmp_path, "")
  assert done.returncode == 1 and f"slice: found '{state}', expected READY" in done.stderr, done
  assert not (tmp_path / "did").exists() and not (tmp_path / "0").exists()


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


# What the published APIs of JobSet v1alpha2, Job and Pod take, of the fields that a launcher could
# use, with the checks of their servers; anything else is refused. A shape is a type, a set of
# constants, a range, a pattern, alternatives in a tuple, [the shape of all items], {str: the shape
# of all values} or {field: shape}, with "!" after a field that must be there.
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
COUNT = range(2**31)
TEXTS = {str: str}
QUANTITY = (COUNT, re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?"))
META = {"name": LABEL, "namespace": LABEL, "labels": TEXTS, "annotations": TEXTS}
ENV = {
  "name!": re.compile(r"[A-Za-z_]\w*"),
  "value": str,
  "valueFrom": {
    "fieldRef": {"fieldPath!": str, "apiVersion": str},
    "secretKeyRef": {"name!": str, "key!": str, "optional": bool},
    "configMapKeyRef": {"name!": str, "key!": str, "optional": bool},
  },
}
MOUNT = {"name!": LABEL, "mountPath!": str, "subPath": str, "readOnly": bool}
CONTAINER = {
  "name!": LABEL, "image": str, "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
  "command": [str], "args": [str], "workingDir": str, "env": [ENV], "volumeMounts": [MOUNT],
  "resources": {"limits": {str: QUANTITY}, "requests": {str: QUANTITY}},
  "ports": [{"containerPort!": range(1, 65536), "name": LABEL, "protocol": {"TCP", "UDP", "SCTP"}}],
  "securityContext": {"privileged": bool, "runAsUser": COUNT, "runAsGroup": COUNT},
}  # fmt: skip
VOLUME = {
  "name!": LABEL,
  "persistentVolumeClaim": {"claimName!": LABEL, "readOnly": bool},
  "emptyDir": {"medium": {"", "Memory", "HugePages"}, "sizeLimit": QUANTITY},
  "nfs": {"server!": str, "path!": str, "readOnly": bool},
  "hostPath": {"path!": str, "type": {"", "Directory", "DirectoryOrCreate", "File", "Socket"}},
  "secret": {"secretName": str, "optional": bool},
  "configMap": {"name": str, "optional": bool},
}
TOLERATION = {
  "key": str, "operator": {"Exists", "Equal"}, "value": str, "tolerationSeconds": int,
  "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
}  # fmt: skip
POD = {
  "restartPolicy": {"Never", "OnFailure"},  # of a Job's pods
  "terminationGracePeriodSeconds": COUNT, "activeDeadlineSeconds": range(1, 2**31),
  "nodeSelector": TEXTS, "tolerations": [TOLERATION], "containers!": [CONTAINER],
  "initContainers": [CONTAINER], "volumes": [VOLUME], "serviceAccountName": str,
  "priorityClassName": str, "hostNetwork": bool, "subdomain": LABEL,
  "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
}  # fmt: skip
POD_RULE = {
  "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
  "onExitCodes": {"containerName": LABEL, "operator!": {"In", "NotIn"}, "values!": [COUNT]},
  "onPodConditions": [
    {
      "type!": {
        "PodScheduled", "PodReadyToStartContainers", "ContainersReady", "Initialized", "Ready",
        "DisruptionTarget",
      },
      "status": {"True", "False", "Unknown"},
    }
  ],
}  # fmt: skip
JOB = {
  "parallelism": COUNT, "completions": COUNT, "completionMode": {"NonIndexed", "Indexed"},
  "backoffLimit": COUNT, "backoffLimitPerIndex": COUNT, "maxFailedIndexes": COUNT,
  "activeDeadlineSeconds": range(1, 2**31), "ttlSecondsAfterFinished": COUNT, "suspend": bool,
  "podReplacementPolicy": {"TerminatingOrFailed", "Failed"},
  "podFailurePolicy": {"rules!": [POD_RULE]}, "template!": {"metadata": META, "spec!": POD},
}  # fmt: skip
JOBSET_RULE = {
  "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
  "action!": {
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
  },
  "onJobFailureReasons": [
    {
      "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
      "PodFailurePolicy",
    }
  ],
  "onJobFailureMessagePatterns": [str],
  "targetReplicatedJobs": [LABEL],
}  # fmt: skip
REPLICATED_JOB = {
  "name!": LABEL, "groupName": LABEL, "replicas": COUNT,
  "dependsOn": [{"name!": LABEL, "status!": {"Ready", "Complete"}}],
  "template!": {"metadata": META, "spec!": JOB},
}  # fmt: skip
JOBSET = {
  "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
  "kind!": {"JobSet"},
  "metadata!": {**META, "name!": LABEL},
  "spec!": {
    "replicatedJobs!": [REPLICATED_JOB],
    "failurePolicy": {
      "maxRestarts": COUNT,
      "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
      "rules": [JOBSET_RULE],
    },
    "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [LABEL]},
    "startupPolicy": {"startupPolicyOrder!": {"AnyOrder", "InOrder"}},
    "network": {"enableDNSHostnames": bool, "subdomain": LABEL, "publishNotReadyAddresses": bool},
    "coordinator": {"replicatedJob!": LABEL, "jobIndex": COUNT, "podIndex": COUNT},
    "suspend": bool,
    "managedBy": str,
    "ttlSecondsAfterFinished": COUNT,
  },
}


def misfits(value, shape, where):
  """What in nested values does not fit the shape, each with its place."""
  if isinstance(shape, tuple):
    found = [misfits(value, one, where) for one in shape]
    return [] if [] in found else found[0]
  if isinstance(shape, list):
    if not isinstance(value, list):
      return [f"{where}: no list"]
    return [x for i, one in enumerate(value) for x in misfits(one, shape[0], f"{where}.{i}")]
  if isinstance(shape, dict):
    if not isinstance(value, dict):
      return [f"{where}: no object"]
    shapes = {field.rstrip("!"): one for field, one in shape.items() if field is not str}
    needed = {field[:-1] for field in shape if field is not str and field.endswith("!")}
    found = [f"{where}.{field}: missing" for field in needed - set(value)]
    for field, one in value.items():
      if field not in shapes and str not in shape:
        found.append(f"{where}.{field}: unknown")
      else:
        found += misfits(one, shapes.get(field, shape.get(str)), f"{where}.{field}")
    return found
  if isinstance(shape, type):
    fits = type(value) is shape
  elif isinstance(shape, re.Pattern):
    fits = isinstance(value, str) and shape.fullmatch(value)
  else:  # a set of strings or a range, in which True would be too
    fits = type(value) is (int if isinstance(shape, range) else str) and value in shape
  return [] if fits else [f"{where}: {value!r} does not fit"]


def disagreements(jobset):
  """Fields that the servers refuse together, of a JobSet in which each alone is right."""
  for replicated in jobset["spec"]["replicatedJobs"]:
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    containers = {container["name"] for container in pod["containers"]}
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if job.get("completionMode") == "Indexed" and "completions" not in job:
      yield "Indexed without completions"
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
      if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy without restartPolicy Never"
      if ("onExitCodes" in rule) == ("onPodConditions" in rule):
        yield "a rule needs one of onExitCodes and onPodConditions"
      if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in job:
        yield "FailIndex without backoffLimitPerIndex"
      codes = rule.get("onExitCodes", {"values": [1], "operator": "In"})
      if not codes["values"] or codes["values"] != sorted(set(codes["values"])):
        yield "exit codes not in order"
      if codes["operator"] == "In" and 0 in codes["values"]:
        yield "exit code 0 is no failure"
      if codes.get("containerName", "main") not in containers:
        yield "exit codes of an unknown container"
    if len(set(volumes)) < len(volumes):
      yield "two volumes of one name"
    for volume in pod.get("volumes", []):
      if len(volume) != 2:
        yield "a volume needs one source"
    for container in pod["containers"]:
      mounts = container.get("volumeMounts", [])
      if not {mount["name"] for mount in mounts} <= set(volumes):
        yield "mount of an unknown volume"
      if len({mount["mountPath"] for mount in mounts}) < len(mounts):
        yield "two mounts at one path"


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
def test_what_jobset_lacks_is_detected(place, value, problem):
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


def test_jobset_restarts_what_was_saved_or_preempted():
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
def test_jobset_hands_flags_and_what_is_exported_on(tmp_path, exported, seconds):
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
