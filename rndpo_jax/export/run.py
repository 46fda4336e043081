"""Writes a trained network as a folder of files for another program."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable

from rndpo_jax import errors
from rndpo_jax.export import nnunet_folder, safetensors, stablehlo
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.predict.trained import Trained
from rndpo_jax.runtime import files, progress

# --format -> (trained, work directory) -> path in the output -> bytes of the file.
FORMATS: dict[str, Callable[[Trained, pathlib.Path], dict[str, bytes]]] = {
  "nnunet": nnunet_folder.make,
  "safetensors": safetensors.make,
  "stablehlo": stablehlo.make,
}


def run(workdir: os.PathLike | str, which: str, name: str, output: os.PathLike | str) -> None:
  """Writes the folder `output`, which appears by rename when all of it is on the disk.

  Args:
    workdir: of a run.
    which: of its checkpoints, as `trained.load` takes it.
    name: of FORMATS.
    output: a folder that is not there yet.

  Raises:
    errors.ConfigError: if it is there, or the format cannot hold this network, saying why.
    errors.FileError, errors.DataError, errors.CheckpointError, errors.ProvenanceError: if a file of
      the run cannot be used.
  """
  check(output)
  trained = trained_lib.load(workdir, which)
  made = FORMATS[name](trained, pathlib.Path(workdir))
  target = pathlib.Path(output).expanduser()
  temporary = target.parent / f".{target.name}.tmp"
  shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
  for path, content in made.items():
    files.write_bytes(temporary / path, content)
  check(output)  # another program may have made it meanwhile
  temporary.rename(target)
  model = f"the checkpoint of step {trained.step}" if trained.step else "the base"
  progress.say(f"{target}: {model} as {', '.join(made)}")


def check(output: os.PathLike | str) -> None:
  """Refuses an output that is there, or that is not on this host.

  Raises:
    errors.ConfigError: naming the flag and the remedy.
  """
  text = os.fspath(output)
  if "://" in text:
    raise errors.ConfigError(
      f"--output: found {text!r}, expected a folder of this host; export there and copy it"
    )
  if os.path.lexists(pathlib.Path(output).expanduser()):
    raise errors.ConfigError(
      f"--output: {text} is there already, and an export replaces nothing; name a new folder"
    )
