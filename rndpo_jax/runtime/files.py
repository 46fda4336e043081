"""Whole files that appear by rename: a reader never meets half of one.

A path may be local or remote (`gs://BUCKET/...`, with the package gcsfs beside this one).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import resource
import tempfile
from typing import Any

from etils import epath

from rndpo_jax import errors

# What else a process may have open: libraries, checkpoints, connections.
_OTHER_FILES = 512


def write_bytes(path: os.PathLike, content: bytes, *, flushed: bool = True) -> None:
  """Writes `content` beside `path`, then renames; makes the folder if it is missing.

  Without `flushed` a crash of the host may leave an empty file: for what can be done again.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.tmp"
  temporary.write_bytes(content)
  if flushed:
    flush(temporary)
  temporary.replace(path)


def flush(path: os.PathLike) -> None:
  """Waits until a local file's bytes are on the disk: a rename must not outlive them in a crash."""
  if is_remote(path):
    return  # an object store has them once it says so
  with epath.Path(path).open("rb") as file:
    os.fsync(file.fileno())


def write_text(path: os.PathLike, content: str, *, flushed: bool = True) -> None:
  """`write_bytes` of UTF-8 text."""
  write_bytes(path, content.encode(), flushed=flushed)


def write_json(path: os.PathLike, content: Any, *, flushed: bool = True) -> None:
  """`write_text` of indented JSON; raises ValueError for NaN and infinity."""
  write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", flushed=flushed)


def read_json(path: os.PathLike, **expected: type | tuple[type, ...]) -> dict[str, Any]:
  """Reads a JSON object that the program wrote.

  Args:
    path: of the file.
    **expected: keys that it must have, and the type of each one's value.

  Raises:
    FileError: if it is no JSON, no object, holds NaN or an infinity, or lacks a key.
  """
  remedy = "it is not what the program wrote; delete it and run the same command again"
  try:
    content = json.loads(epath.Path(path).read_text(), parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError among them
    raise errors.FileError(f"{path}: no valid JSON ({error}); {remedy}") from error
  if not isinstance(content, dict):
    raise errors.FileError(f"{path}: found {_kind(content)}, expected an object; {remedy}")
  for key, kind in expected.items():
    found = content.get(key)
    # True is an int to Python, and no number here.
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
      raise errors.FileError(
        f"{path}: {key!r} is {_kind(found) if key in content else 'missing'}; {remedy}"
      )
  return content


def _refuse_constant(name: str) -> None:
  raise ValueError(f"found {name}, expected finite numbers")


def _kind(value: Any) -> str:
  """A value as a message shows it."""
  if isinstance(value, (dict, list)):
    return "an object" if isinstance(value, dict) else "a list"
  return json.dumps(value)[:40]


def sha256(path: os.PathLike) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with epath.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def allow_open(count: int, what: os.PathLike) -> None:
  """Lets this process, and workers started after, hold `count` files open and more.

  A reader of ArrayRecord keeps every file open that it has read from; the usual limit is 1,024.

  Raises:
    FileError: if the host does not allow so many.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + _OTHER_FILES
  if soft == resource.RLIM_INFINITY or needed <= soft:
    return
  if hard != resource.RLIM_INFINITY and needed > hard:
    raise errors.FileError(
      f"{what}: {count} files are read at once, with which this process needs {needed}, and this "
      f"host allows it {hard} (ulimit -Hn); raise that limit"
    )
  enough = max(needed, 1 << 16) if hard == resource.RLIM_INFINITY else hard
  resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def is_full_disk(error: BaseException) -> bool:
  """Whether an error says that a disk, a user's quota or the limit on a file's size is reached."""
  return is_too_large(error) or _says(error, errno.ENOSPC, errno.EDQUOT)


def is_too_large(error: BaseException) -> bool:
  """Whether an error says that a file would be larger than this process may write."""
  return _says(error, errno.EFBIG)


def _says(error: BaseException, *numbers: int) -> bool:
  """TensorStore and ArrayRecord say it in words alone."""
  found = getattr(error, "errno", None)
  return found in numbers or any(os.strerror(number) in str(error) for number in numbers)


def refresh(folder: os.PathLike) -> None:
  """Lists a folder, so that a file which another process has written since is found.

  A network file system remembers for a while that a file was missing.
  """
  list(epath.Path(folder).glob("*"))  # of a missing folder nothing


def is_remote(path: os.PathLike) -> bool:
  """Whether a path is in an object store, where a name is a URI."""
  return "://" in os.fspath(path)


def local_copy(path: os.PathLike) -> epath.Path:
  """A file or folder on this host: `path` itself, or a copy of a remote one, made once a process.

  ArrayRecord, and so TFDS, reads and writes local files alone.
  """
  return _fetch(os.fspath(path))[1] if is_remote(path) else epath.Path(path)


@functools.cache
def _fetch(path: str) -> tuple[tempfile.TemporaryDirectory, epath.Path]:
  """The copy, and what deletes it at the end of the process."""
  keeper = tempfile.TemporaryDirectory(prefix="rndpo_jax_")
  target = epath.Path(keeper.name) / epath.Path(path).name
  copy(path, target)
  return keeper, target


def copy(source: os.PathLike, target: os.PathLike) -> None:
  """Copies a file or a folder with all in it, between any two places."""
  source, target = epath.Path(source), epath.Path(target)
  if not source.is_dir():
    target.parent.mkdir(parents=True, exist_ok=True)
    source.copy(target, overwrite=True)
    return
  for child in source.iterdir():
    copy(child, target / child.name)
