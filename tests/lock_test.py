"""One run at a time in a work directory: real processes, and files as other hosts leave them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

from rndpo_jax import errors
from rndpo_jax.runtime import lock, multihost

ROOT = pathlib.Path(__file__).parent.parent
# Holds the directory until a line comes; says so, or why it cannot.
HOLDER = """
import sys
from rndpo_jax import errors
from rndpo_jax.runtime import lock
try:
  with lock.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
except errors.FileError as error:
  print(error, flush=True)
"""


def start(workdir):
  return subprocess.Popen(
    [sys.executable, "-c", HOLDER, workdir], cwd=ROOT, stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip


def locks(workdir):
  return list(workdir.glob(".lock-*"))


def of_another_host(workdir, **changes):
  """A lock file as another host leaves it."""
  first, second = lock._content(5).splitlines()
  who = {**json.loads(second), "host": "far", "pid": 7, "place": ["far", "x", "y"], **changes}
  workdir.mkdir(exist_ok=True)
  path = workdir / ".lock-far"
  path.write_text(f"{first}\n{json.dumps(who)}\n")
  return path


def test_of_many_at_once_one_holds_and_the_others_name_it(tmp_path):
  workdir = tmp_path / "run"
  started = [start(workdir) for _ in range(4)]
  said = [process.stdout.readline().strip() for process in started]
  assert said.count("held") == 1, said
  holder = started[said.index("held")]
  refused = re.compile(
    rf"--workdir: process {holder.pid} on host \S+ has been at work in {re.escape(str(workdir))} "
    r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00; wait until it ends, or name another --workdir"
  )
  assert all(refused.fullmatch(text) for text in said if text != "held"), said
  for process in started:
    process.communicate("\n", timeout=60)
  assert not workdir.exists() or not list(workdir.iterdir())


def test_after_kill_9_the_next_holds_at_once(tmp_path):
  with start(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number still taken
    assert len(locks(tmp_path)) == 1
    with lock.hold(tmp_path):
      assert len(locks(tmp_path)) == 1
  assert not locks(tmp_path)


def test_a_number_that_another_process_has_by_now_is_not_that_run(tmp_path):
  place, me = lock._place(), os.getpid()
  of_another_host(tmp_path, place=place, pid=me, started="1")
  with lock.hold(tmp_path):
    pass
  of_another_host(tmp_path, place=place, pid=me, started=lock._started(me))
  with pytest.raises(errors.FileError, match=f"process {me} on host far"), lock.hold(tmp_path):
    pass


def test_on_another_host_the_heartbeat_tells(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.3)
  monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.1)
  path = of_another_host(tmp_path)
  monkeypatch.setattr(lock.time, "sleep", lambda _: lock._write_beat(path, 6))
  with pytest.raises(errors.FileError, match="process 7 on host far"), lock.hold(tmp_path):
    pass
  assert path.exists() and path.read_text().startswith("000000000006\n")
  monkeypatch.undo()
  monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.3)
  monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.1)
  with lock.hold(tmp_path):
    assert not path.exists() and len(locks(tmp_path)) == 1
  assert "host far: looking for up to 0 s whether that is alive" in capsys.readouterr().out


def test_a_run_whose_lock_was_taken_ends(tmp_path, monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.02)
  monkeypatch.setattr(lock, "_end", lambda path: ended.set())
  with lock.hold(tmp_path):
    (path,) = locks(tmp_path)
    before = path.read_text()
    while path.read_text() == before:
      pass
    path.unlink()
    assert ended.wait(60)
  assert not locks(tmp_path)


def test_only_the_first_of_several_processes_takes_it(tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, "is_first", lambda: False)
  with lock.hold(tmp_path / "run"):
    assert not (tmp_path / "run").exists()


def test_where_nothing_can_be_written_nothing_is_held(tmp_path):
  (tmp_path / "file").touch()
  with lock.hold(tmp_path / "file" / "run"):
    pass


def test_a_refused_run_leaves_no_folder_and_a_run_leaves_its_files(tmp_path):
  with lock.hold(tmp_path / "empty"):
    pass
  with lock.hold(tmp_path / "run"):
    (tmp_path / "run" / "config.json").touch()
  assert [path.name for path in tmp_path.iterdir()] == ["run"]
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
