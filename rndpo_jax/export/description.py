"""What a program without this package must know of a network: `model.json`."""

from __future__ import annotations

import json
from typing import Any

from rndpo_jax import models, provenance
from rndpo_jax.predict.trained import Trained


def text(trained: Trained) -> bytes:
  """The JSON: network, how images go in, what comes out, and which checkpoint it is."""
  made = {
    "network": _network(trained),
    "input": _input(trained),
    "output": {
      "logits": f"float32 [B, {_axes(trained)}, {trained.num_classes}]; argmax over the last axis",
      "classes": list(trained.class_names),
    },
    "checkpoint": {
      "step": trained.step,
      "params_sha256": provenance.fingerprint(trained.params),
      "data": trained.fingerprint,
    },
    "parameters": "Flax: convolutions [*kernel, in, out], channels last",
  }
  return (json.dumps(made, indent=2) + "\n").encode()


def _network(trained: Trained) -> dict[str, Any]:
  model = trained.config.model
  if not models.reads(model.name, "architecture") or model.name not in models.ARCHITECTURES:
    return model.to_dict()
  network = models.architecture(model, spatial_dims=trained.spatial_dims)
  return {"name": model.name, "dtype": model.dtype, **network._asdict()}


def _input(trained: Trained) -> dict[str, Any]:
  return {
    "images": f"float32 [B, {_axes(trained)}, {trained.num_channels}], channels last",
    "axes": "as nibabel gives them (x, y, z), or rows and columns of a picture",
    **(_on_grid if trained.native is None else _at_spacing)(trained),
    "divisors": list(models.divisors(trained.config.model, spatial_dims=trained.spatial_dims)),
  }


def _on_grid(trained: Trained) -> dict[str, Any]:
  return {
    "steps": "centre crop, linear resizing to size, normalisation of each image",
    "crop": list(trained.crop),
    "size": list(trained.size),
    "normalization": trained.normalization,
  }


def _at_spacing(trained: Trained) -> dict[str, Any]:
  """By nnU-Net's rules."""
  native = trained.native
  return {
    "steps": "crop to nonzero, normalisation of each case and channel, cubic resampling to "
    "spacing_mm, patches with steps of half a patch",
    "spacing_mm": list(native.spacing),
    "patch_size": list(trained.size),
    "schemes": list(native.schemes),
    "statistics": list(native.statistics),
  }


def _axes(trained: Trained) -> str:
  return ", ".join("HWZ"[: trained.spatial_dims])
