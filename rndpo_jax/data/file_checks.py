"""What a source checks of a file before it is read, and of the names that ids are made of."""

from __future__ import annotations

import os
import unicodedata

from rndpo_jax import errors
from rndpo_jax.runtime import files


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
