"""The folder of the masks: what it may hold before, and by what all in it was made."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from rndpo_jax import errors, provenance
from rndpo_jax.predict import inputs
from rndpo_jax.predict.job import Job
from rndpo_jax.runtime import files

SETTINGS = inputs.SETTINGS


def check(source: str, output: str) -> None:
  """Refuses an output that is where the input is, or where other files are.

  Raises:
    errors.ConfigError: naming the flag and the remedy.
  """
  if "://" in output:
    raise errors.ConfigError(
      f"--output: found {output!r}, expected a folder of this host; mount the bucket and give that"
    )
  place, images = (pathlib.Path(path).expanduser().resolve() for path in (output, source))
  if place == images or (images.is_file() and place == images.parent):
    raise errors.ConfigError(
      f"--output: {output} is where the images of --input are, and masks would take their names; "
      "name another folder"
    )
  if place.exists() and not place.is_dir():
    raise errors.ConfigError(f"--output: {output} is no folder; name one")
  if place.is_dir() and not (place / SETTINGS).exists():
    others = [path.name for path in place.iterdir() if not path.name.startswith(".")]
    if others:
      raise errors.ConfigError(
        f"--output: {output} holds other files ({others[0]}), which might be lost; name a new "
        "folder, or an empty one"
      )


def claim(output: epath.Path, source: str, job: Job, options: Mapping[str, Any]) -> None:
  """Writes what the masks have in common, or checks that those there were made with the same.

  Args:
    output: folder.
    source: `--input`. Masks of the images of another folder would take the place of those there.
    job: the network.
    options: of `run.Options`.

  Raises:
    errors.ConfigError: naming all that differs, or that the folder cannot be written.
  """
  path, settings = output / SETTINGS, _settings(source, job, options)
  if path.exists():
    try:
      there = files.read_json(path)
    except errors.FileError as error:
      raise errors.ConfigError(
        f"--output: {path} is damaged, so that nothing says how the masks there were made; name "
        "another folder"
      ) from error
    changes = [
      f"{name} was {there.get(name)!r}, is {value!r}"
      for name, value in settings.items()
      if there.get(name, value if name == "input" else None) != value  # older ones do not say it
    ]
    if changes:
      raise errors.ConfigError(
        f"--output: {output} holds masks that were made otherwise ({'; '.join(changes)}); name "
        "another folder, or give the flags of before"
      )
    return
  try:
    files.write_json(path, settings)
  except OSError as error:
    if files.is_full_disk(error):
      raise
    raise errors.ConfigError(
      f"--output: {output} cannot be written ({error.strerror}); name a folder that can"
    ) from error


def _settings(source: str, job: Job, options: Mapping[str, Any]) -> dict[str, Any]:
  """What the masks of an output folder have in common."""
  images = pathlib.Path(source).expanduser().resolve()
  return {
    "input": str(images.parent if images.is_file() else images),
    **job.settings,
    "params": provenance.fingerprint(job.params),
    **{name: options[name] for name in ("mirror", "probabilities", "scores")},
    "classes": list(job.class_names),
  }
