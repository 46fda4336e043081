"""Compiled programs are kept on disk: a second run, a resume or a sweep starts at once.

JAX's own persistent cache, whose keys hold the program, the versions of JAX and of the device's
compiler, the flags of XLA and the devices. Only process 0 writes.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import secrets
import warnings
from collections.abc import Iterator

import jax
from etils import epath

from rndpo_jax.runtime import files, multihost, progress

# At the start of a run what was used last stays, up to so many bytes in all.
LIMIT_BYTES = 1 << 30
# Small programs too: a run has dozens of them. JAX's own default is 1 s.
_MIN_COMPILE_SECONDS = 0.05
_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")
# What of /proc/cpuinfo says which instructions a processor has.
_CPU_FIELDS = (
  "vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer",
  "CPU architecture", "CPU variant", "CPU part",
)  # fmt: skip


def use(choice: str | None) -> None:
  """Turns JAX's compilation cache on, and says in one line where it is; before any compilation.

  A folder that cannot be written, or that not all processes of a run see, is said, and the run
  goes on without a cache. All processes call this with the same choice.

  Args:
    choice: a folder, "off", or None: the folder of JAX_COMPILATION_CACHE_DIR where the user has
      set it (whose size is theirs to limit), else `default_folder`.
  """
  if choice == "off" or not jax.config.jax_enable_compilation_cache:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  users_own = None if choice else jax.config.jax_compilation_cache_dir
  folder = epath.Path(choice or users_own or default_folder())
  problem = _why_not(folder)
  if problem:
    jax.config.update("jax_enable_compilation_cache", False)
    if multihost.is_first():
      progress.say(f"no compilation cache: {problem}")
    return
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
  bounded = not (users_own or files.is_remote(folder))
  if multihost.is_first():
    if bounded:
      trim(pathlib.Path(folder), LIMIT_BYTES)
    size = f"at most {LIMIT_BYTES >> 30} GiB; " if bounded else ""
    progress.say(
      f"compiled programs are kept in {folder} ({size}--compilation_cache=off switches this off)"
    )
  _replace_damaged(folder)


def default_folder() -> pathlib.Path:
  """The folder in the user's cache directory, one for each type of CPU.

  XLA's machine code for one CPU may end the process on another, and JAX's keys do not hold the
  type: home directories are often shared by machines of several types.
  """
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # as the XDG base directory specification has it
    cache = os.path.expanduser("~/.cache")
  return pathlib.Path(cache) / "rndpo_jax" / "xla" / _cpu()


def _cpu() -> str:
  """The machine's architecture and a fingerprint of its CPU's type."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = platform.processor()
  lines = text.split("\n\n")[0].splitlines()
  kept = [line for line in lines if line.split(":")[0].strip() in _CPU_FIELDS] or lines
  return f"{platform.machine()}-{hashlib.sha256(chr(10).join(kept).encode()).hexdigest()[:12]}"


def _why_not(folder: epath.Path) -> str | None:
  """Why the processes cannot use the folder; the same answer on each of them.

  Without one folder for all, those that find a program would not take part in what the others do
  together as they compile it (XLA shares out autotuning on GPUs).
  """
  probe = folder / f".probe-{multihost.broadcast(lambda: secrets.randbits(31))}"
  problem = _write(probe) if multihost.is_first() else None
  multihost.barrier("compilation cache")
  unable = multihost.processes_where(bool(problem) or not _sees(probe))
  if multihost.is_first() and not problem:
    probe.unlink(missing_ok=True)
  if not unable:
    return None
  return problem or (
    f"process {unable[0]} does not see {folder} of process 0; --compilation_cache=DIR names a "
    "folder that all processes see"
  )


def _write(probe: epath.Path) -> str | None:
  """Makes the folder, private if it is new (who may write it may run code), and writes."""
  if os.fspath(probe).startswith("~"):
    return "no home directory; --compilation_cache=DIR names a folder"
  try:
    if not files.is_remote(probe):
      os.makedirs(probe.parent, mode=0o700, exist_ok=True)
    probe.write_bytes(b"")
  except OSError as error:
    return (
      f"{probe.parent} cannot be written ({error.strerror or error}); --compilation_cache=DIR "
      "names another folder"
    )
  return None


def _sees(probe: epath.Path) -> bool:
  try:
    return probe.exists()
  except OSError:
    return False


def trim(folder: pathlib.Path, limit_bytes: int) -> None:
  """Deletes what was used longest ago until the rest is no larger than `limit_bytes`.

  In a folder of the default place, of all the CPU types beside it. Another run may delete, or
  read, at the same time: what is gone is compiled again.
  """
  if folder == default_folder():
    folder = folder.parent
  found = sorted(_entries(folder), reverse=True)
  total = 0
  for _, size, path in found:
    total += size
    if total > limit_bytes:
      path.unlink(missing_ok=True)


def _entries(folder: pathlib.Path) -> Iterator[tuple[float, int, pathlib.Path]]:
  """When each entry was last used, its size and path; autotuning results of XLA among them."""
  for pattern in ("*-cache", "xla_gpu_per_fusion_autotune_cache_dir/*"):
    for path in folder.rglob(pattern):
      try:
        stat = path.stat()
      except OSError:  # deleted by another run
        continue
      if path.is_file():
        yield max(stat.st_atime, stat.st_mtime), stat.st_size, path


def _replace_damaged(folder: epath.Path) -> None:
  """Deletes an entry that cannot be read, or was not written whole, so that it is made again.

  JAX writes entries in place, so that a process that is killed leaves half of one; JAX then warns
  at every run. Its warning comes before it compiles and writes.
  """
  others = warnings.showwarning
  said = []

  def show(message, *arguments, **named):
    failed = _FAILED.match(str(message))
    if not failed:
      return others(message, *arguments, **named)
    for path in folder.glob(f"{failed[2]}-*-cache"):
      try:
        path.unlink(missing_ok=True)
      except OSError:
        pass  # it is compiled at each run
    if not said:
      said.append(failed)
      progress.say(f"compilation cache: {str(message)[:200]}; compiled again")

  warnings.showwarning = show
