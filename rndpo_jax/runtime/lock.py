"""One run at a time in a work directory.

Every run puts a file of its own there, `.lock-NAME`, and holds the directory if no other such file
is of a run that is alive. The second run sees the file of the first, on any file system or object
store whose listings show what was written before. A run that died leaves its file: on the same host
its process number tells that it is gone, elsewhere its heartbeat, a number in the file that a
thread counts up.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import pathlib
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import files, multihost, processes, progress

_BEAT_SECONDS = 10.0
# A run on another host whose heartbeat stands still for so long is dead. The run that
# looks measures this by its own clock: clocks of hosts differ.
_SILENT_SECONDS = 60.0
_LOOK_SECONDS = 2.0


@contextlib.contextmanager
def hold(workdir: os.PathLike, flag: str = "--workdir") -> Iterator[None]:
  """Holds a work directory, made if it is missing; of several processes the first does it for all.

  A directory that cannot be written is not held: what goes on to write there says why it cannot.
  `flag` is the one that names it, for messages.

  Raises:
    FileError: naming the run that is at work there.
  """
  workdir = epath.Path(workdir)
  if not multihost.is_first():
    yield
    return
  made = not workdir.exists()
  path = _take(workdir, flag)
  if path is None:
    yield
    return
  over = threading.Event()
  beats = threading.Thread(target=_beat, args=(path, over), daemon=True)
  beats.start()
  try:
    yield
  finally:
    over.set()
    beats.join()
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)
      if made and not files.is_remote(workdir):
        _remove_if_empty(workdir)  # a run that could not start leaves nothing


def _remove_if_empty(folder: epath.Path) -> None:
  if not any(folder.iterdir()):
    folder.rmdir()


def _take(workdir: epath.Path, flag: str) -> epath.Path | None:
  """This run's file in a directory that it now holds; None if nothing can be written there."""
  path = workdir / f".lock-{secrets.token_hex(8)}"
  for attempt in itertools.count():
    _refuse_if_held(workdir, flag)
    try:
      files.write_text(path, _content(0))
    except OSError as error:
      if isinstance(error, FileNotFoundError) and attempt < 10:
        continue  # a run that ends may just have removed the empty directory
      return None
    # Of two that came at once each may see the other: both step back and one will be first.
    if len(_locks(workdir)) <= 1:
      return path
    path.unlink(missing_ok=True)
    time.sleep(random.uniform(0.0, 1.0))


def _refuse_if_held(workdir: epath.Path, flag: str) -> None:
  """Deletes the files of runs that are dead; raises FileError if one is alive."""
  for path in _locks(workdir):
    text = _read(path)
    if text is None:
      continue
    owner = _owner(text)
    if _is_alive(path, text, owner, workdir):
      raise errors.FileError(
        f"{flag}: process {owner.get('pid')} on host {owner.get('host')} has been at work in "
        f"{workdir} since {owner.get('since')}; wait until it ends, or name another {flag}"
      )
    path.unlink(missing_ok=True)


def _is_alive(path: epath.Path, text: str, owner: dict, workdir: epath.Path) -> bool:
  """Whether the run that wrote `path` is alive; waits to see its heart beat on another host."""
  if _place() and owner.get("place") == _place():
    return owner.get("started") is not None and owner["started"] == _started(owner["pid"])
  progress.say(
    f"{workdir} was in use by process {owner.get('pid')} on host {owner.get('host')}: looking for "
    f"up to {_SILENT_SECONDS:.0f} s whether that is alive"
  )
  end = time.monotonic() + _SILENT_SECONDS
  while time.monotonic() < end:
    time.sleep(_LOOK_SECONDS)
    now = _read(path)
    if now is None:  # it has ended meanwhile
      return False
    if now != text:
      return True
  return False


def _locks(workdir: epath.Path) -> list[epath.Path]:
  return sorted(workdir.glob(".lock-*"))


def _read(path: epath.Path) -> str | None:
  """What is in the file; None if it is gone."""
  try:
    return path.read_text()
  except FileNotFoundError:
    return None


def _owner(text: str) -> dict:
  """Who wrote a lock; nothing is known if it was killed while it did."""
  try:
    content = json.loads(text.partition("\n")[2])
  except json.JSONDecodeError:
    return {}
  return content if isinstance(content, dict) else {}


def _content(beats: int) -> str:
  """The heartbeat, always as long, in the first line; who this is in the second."""
  since = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
  who = {
    "host": socket.gethostname(), "pid": os.getpid(), "since": since, "place": _place(),
    "started": _started(os.getpid()),
  }  # fmt: skip
  return f"{beats:012d}\n{json.dumps(who)}\n"


def _place() -> list[str]:
  """Where a process number means the same process: a host since its start, and its container.

  Empty on a system that does not say; there the heartbeat alone tells who is alive.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")]
  except OSError:
    return []


def _started(pid: int) -> str | None:
  """When a process of this host started, in clock ticks since that of the host; None if it is gone.

  A number is used again for another process, which started at another time.
  """
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else fields[19]  # one that is dead and not yet waited for


def _beat(path: epath.Path, over: threading.Event) -> None:
  """Counts up in the file until `over`; ends this process if another has taken the directory."""
  beats = 0
  while not over.wait(_BEAT_SECONDS):
    beats += 1
    try:
      _write_beat(path, beats)
    except FileNotFoundError:
      if not over.is_set():
        _end(path)
    except OSError:
      pass  # a disk that is full, a network that is away: the next may come through


def _write_beat(path: epath.Path, beats: int) -> None:
  """In place, so that a file which another run has deleted stays so."""
  if files.is_remote(path):
    path.write_text(re.sub(r"^\d+", f"{beats:012d}", path.read_text()))
    return
  with open(path, "r+b") as file:
    file.write(f"{beats:012d}".encode())


def _end(path: epath.Path) -> None:
  message = (
    f"error: {path} is gone: this run stood still for over {_SILENT_SECONDS:.0f} s and another has "
    "taken the work directory, or somebody deleted it; the same command goes on from what is "
    "finished"
  )
  if jax.process_count() > 1:
    processes.stop(message)
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  os._exit(1)
