"""The errors that a user can fix: launch programs print their message as one line, no traceback.

Each message names the file or key, what was found, what was expected and what to do.
"""

from __future__ import annotations


class RndpoError(Exception):
  """What all of them are."""


class ConfigError(RndpoError, ValueError):
  """A config that cannot work; the message names the key, what was found and the remedy."""


class FileError(RndpoError, ValueError):
  """A file that does not hold what it should; the message names it and the remedy."""


class TrainingError(RndpoError, RuntimeError):
  """Training that cannot go on; the message names the step and the last good checkpoint."""


class CheckpointError(RndpoError, RuntimeError):
  """A checkpoint that cannot be read; the message names it and how to rebuild it."""


class PairsError(RndpoError, RuntimeError):
  """Pair files that cannot be used; the message names the file and how to rebuild it."""


class MiningError(RndpoError, RuntimeError):
  """Mining that cannot give pairs; the message says which filter took them."""


class BenchmarkError(RndpoError, ValueError):
  """A benchmark that cannot be run as asked; the message names the flag or the variant."""


class JudgeError(RndpoError, ValueError):
  """A judge that cannot work as it is set up."""


class DataError(RndpoError, ValueError):
  """Data that cannot be used; the message names the file, what was found and the remedy."""


class ProvenanceError(RndpoError, RuntimeError):
  """A file that was made of other data or parameters than are here; the message names both."""
