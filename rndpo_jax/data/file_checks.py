"""What a source checks of a file before it is read, and of the names that ids are made of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import unicodedata
from collections.abc import Iterator

from rndpo_jax import errors
from rndpo_jax.runtime import files

_MATCH_SECONDS = 2.0  # for one name


def check_text(text: str, where: str) -> str:
  """A name for ids and tables, in Unicode's composed form, so that equal names are equal.

  Args:
    text: the name of a file, or of a case or class in a JSON file.
    where: the file or key, for the message.

  Raises:
    DataError: if it holds line breaks, control characters or bytes that are no UTF-8.
  """
  if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
    raise errors.DataError(
      f"{ascii(where)[1:-1]}: the name {ascii(text)} holds line breaks, control characters or "
      "bytes that are no UTF-8; rename it"
    )
  return unicodedata.normalize("NFC", text)


def one_line(error: Exception) -> str:
  """What a library says of an error, without its line breaks."""
  return " ".join(str(error).split())


def check_regular(path: os.PathLike) -> None:
  """Refuses what is there and is no file: reading a pipe or a device would never end.

  Raises:
    DataError: naming it.
  """
  if not files.is_remote(path) and os.path.lexists(path) and not os.path.isfile(path):
    raise errors.DataError(
      f"{path}: no regular file, but a folder, a pipe, a device or a link to nowhere; replace or "
      "remove it"
    )


def extract(pattern: str, text: str, key: str) -> str:
  """Group 1 of `pattern` found in `text`, or the whole text if the pattern is empty.

  Raises:
    DataError: if the pattern is not found; `key` is the config key that it came from.
  """
  if not pattern:
    return text
  try:
    with _time_limit():
      match = re.search(pattern, text)
  except TimeoutError as error:
    raise errors.DataError(
      f"config.data.{key}: {pattern!r} takes more than {_MATCH_SECONDS} s on {text!r}; write it "
      "without a repetition inside a repetition, as in (a+)+"
    ) from error
  if match is None or not match.group(1):
    raise errors.DataError(
      f"config.data.{key}: {pattern!r} finds nothing in {text!r}; fix the pattern, or remove "
      "the file"
    )
  return match.group(1)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
  """Raises TimeoutError in the main thread after `_MATCH_SECONDS`; `re` looks at signals itself."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(*_):
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, _MATCH_SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
