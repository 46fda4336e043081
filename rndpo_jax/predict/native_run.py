"""Masks by a network that takes images at a spacing of its own: tile after tile, part by part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from scipy import ndimage

from rndpo_jax import errors
from rndpo_jax.evaluation import sliding_window
from rndpo_jax.predict import case_files, native_cases, restore
from rndpo_jax.predict.job import KEPT, Job, Options, read_ahead
from rndpo_jax.predict.native_cases import NativeCase
from rndpo_jax.predict.native_network import NativeNetwork
from rndpo_jax.runtime import preemption, sharding, threads

BORDER = 3  # pixels around a mask's foreground whose entropy counts, too, as in `config.judge`


def job(network: NativeNetwork, options: Options) -> Job:
  """The network as `run.run` takes it; compiles nothing yet.

  Raises:
    errors.ConfigError: if mirroring is asked of a network that was trained without.
  """
  if options.mirror and not network.mirror_axes:
    raise errors.ConfigError(
      f"--mirror: {network.title} was trained without flips, so those of its input would harm; "
      "leave the flag out"
    )
  window = sliding_window.make(
    network.apply,
    network.patch_size,
    batch_size=sliding_window.batch_size(network.patch_size),
    mirror_axes=network.mirror_axes if options.mirror else (),
  )
  window = window._replace(apply_tiles=of_ensemble(window.apply_tiles))
  params = [sharding.put_on_local_devices(tree) for tree in network.params]

  def predicted(sources, on_broken):
    read = functools.partial(native_cases.read, network=network)
    cases = read_ahead(read, sources, options.workers, on_broken)
    return predict_cases(window, params, network, cases, options)

  return Job(
    num_channels=network.num_channels,
    class_names=network.class_names,
    title=network.title,
    settings=network.settings,
    params=network.params,
    predicted=predicted,
  )


def of_ensemble(apply_tiles: Callable) -> Callable:
  """(list of params, rows) -> the members' logits side by side, f32[B, *patch, members * C].

  One after another by the same program: in a loop on the device convolutions are slow on CPU.
  """

  def apply(members, rows):
    logits = [apply_tiles(params, rows) for params in members]
    return logits[0] if len(logits) == 1 else jax.numpy.concatenate(logits, axis=-1)

  return apply


def predict_cases(
  window: sliding_window.Window,
  params: Any,
  network: NativeNetwork,
  cases: Iterable[NativeCase],
  options: Options,
) -> Iterator[case_files.Predicted]:
  """Each case as soon as all of its parts are done."""

  def images():
    for case in cases:
      preemption.check(KEPT)
      image, case = case.image, case._replace(image=None)
      yield case, image
      del image  # before the next one is waited for

  slabs = sliding_window.slabs(window, params, images())
  work = functools.partial(
    restore.restore, with_scores=options.scores, with_probabilities=options.probabilities
  )
  parts = threads.in_order(work, restore.pieces(slabs, network.num_classes), options.workers)
  return _joined(parts, network, options)


def _joined(
  parts: Iterable[restore.Part], network: NativeNetwork, options: Options
) -> Iterator[case_files.Predicted]:
  mask = None
  for part in parts:
    preemption.check(KEPT)
    case = part.case
    if mask is None:
      mask, sums = np.zeros(case.shape, np.uint8), {}
      entropy = np.zeros(case.shape, np.float16) if options.scores else None
      probabilities = _certain_background(case, network) if options.probabilities else None
    place = tuple(
      slice(box.start + own.start, box.start + own.stop)
      for box, own in zip(case.box, part.place, strict=True)
    )
    mask[place] = part.labels
    if entropy is not None:
      entropy[place] = part.entropy
      sums = {name: sums.get(name, 0) + values for name, values in part.sums.items()}
    if probabilities is not None:
      probabilities[place] = part.probabilities
    if part.is_last:
      scores = {}
      if entropy is not None:
        scores = restore.scores(sums, mean_entropy(mask, entropy, network.spatial_dims))
      yield case_files.Predicted(case.source, case.stamp, mask, probabilities, scores)
      mask = None


def mean_entropy(mask: np.ndarray, entropy: np.ndarray, spatial_dims: int) -> float:
  """The mean of f16[*S] over the foreground of u8[*S] and `BORDER` pixels around it, along the
  network's axes; of an empty mask that over the whole image."""
  near = mask > 0
  for axis in range(spatial_dims):
    near = ndimage.maximum_filter1d(near, 2 * BORDER + 1, axis=axis, mode="constant")
  chosen = near if near.any() else np.ones_like(near)
  return float(entropy.mean(dtype=np.float64, where=chosen))


def _certain_background(case: NativeCase, network: NativeNetwork) -> np.ndarray:
  probabilities = np.zeros((*case.shape, network.num_classes), np.float16)
  probabilities[..., 0] = 1
  return probabilities
