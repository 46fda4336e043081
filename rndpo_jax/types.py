"""The legend of dimensions, and the containers that stages hand to each other.

Dimensions, everywhere in the program:

    B   images in a global batch          b   images on one device
    D   local devices                     K   proposals per image
    P   pairs per image                   C   classes, background (0) among them
    I   input channels                    J   judges
    S   spatial dimensions: (H, W) or (H, W, Z)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

# Class id in a label for pixels whose class is unknown: they are in no loss and no metric.
IGNORED = 255

Array = jax.Array | np.ndarray
Params = Any


class FileProposals(NamedTuple):
  """F proposals an image that come from files, see `data.proposal_files`.

  Attributes:
    masks: u8[B, F, *S]; in place of a missing one stands another of the image, or background.
    present: bool[B, F], False where an image lacks the mask.
    scores: f32[B, F], NaN where there is none.
  """

  masks: Array
  present: Array
  scores: Array


class NetworkLogits(NamedTuple):
  """What the network says of images, of which proposals are made.

  Attributes:
    base: f32[B, *S, C], without dropout.
    entries: f32[B, n, *S, C] of each entry of the mix that has views or dropout, of n proposals;
      None for the others.
    members: f32[B, M, *S, C] of the other base models; None if there are none.
  """

  base: Array
  entries: tuple[Array | None, ...]
  members: Array | None = None


class Batch(NamedTuple):
  """A batch of images on the model's grid.

  Attributes:
    images: f32[B, *S, I], normalised.
    labels: u8[B, *S] class ids, or IGNORED; all zero when read without labels.
    index: i32[B], position of the record in the prepared data set. Random keys are folded
      from it, so that no result depends on how images are batched.
    valid: bool[B], False if the entry only pads the batch.
    files: proposals from files, if mining takes some.
    network: of whole images that were put together of tiles, so that no network is run on them.
    inside: bool[B, *S], likewise, False where an image ends and padding begins.
  """

  images: Array
  labels: Array
  index: Array
  valid: Array
  files: FileProposals | None = None
  network: NetworkLogits | None = None
  inside: Array | None = None


class Proposals(NamedTuple):
  """K proposals an image.

  Attributes:
    masks: u8[B, K, *S] class ids, the argmax of the logits.
    logits: f32[B, K, *S, C] each proposal's own logits.
    base_logits: f32[B, *S, C] the base segmenter's, without dropout or noise.
    present: bool[B, K], False where an image lacks a proposal of a file; None if none can lack.
    file_scores: f32[B, K], scores that came with the files, NaN for all others; None without files.
  """

  masks: Array
  logits: Array
  base_logits: Array
  present: Array | None = None
  file_scores: Array | None = None


class Pairs(NamedTuple):
  """P preference pairs an image; slots without a pair have `valid` False.

  Attributes:
    chosen: i32[B, P], index of the chosen proposal among the K.
    rejected: i32[B, P], likewise.
    score_gap: f32[B, P], score of chosen minus score of rejected, > 0 if valid.
    region_size: i32[B, P], |D|, > 0 if valid; see `margins.region`.
    valid: bool[B, P].
    dropped: i32[B, filters], candidate pairs of the rule that a filter took, in the order of
      `pair_rules.FILTERS`.
  """

  chosen: Array
  rejected: Array
  score_gap: Array
  region_size: Array
  valid: Array
  dropped: Array


class StepInputs(NamedTuple):
  """What a training loss is handed beside parameters and batch.

  Attributes:
    key: of this step.
    reference: parameters of the frozen base, or None.
    beta: f32[] in place of the config's, or None.
    is_logged: whether this step's metrics are looked at; what only they need is left out where
      this is False, a bool or bool[].
    teacher: the moving average of the parameters, or None if none is kept.
    step: steps taken before this one, i32[]; weights that rise read it.
  """

  key: jax.Array
  reference: Params | None = None
  beta: Array | None = None
  is_logged: Array | bool = True
  teacher: Params | None = None
  step: Array | int = 0


class PairBatch(NamedTuple):
  """A batch of images with their mined pairs.

  Attributes:
    images: f32[B, *S, I], normalised.
    chosen: u8[B, P, bits, bytes], masks packed by `bit_planes.pack`.
    rejected: likewise.
    reference_margin: f32[B, P], the base segmenter's on the image as it was mined.
    reference_log_prob: f32[B, P], likewise, of the chosen mask on D.
    weight: f32[B, P], 0 if a slot has no pair.
    voxel_volume: f32[B], what a pixel of the model's grid stands for.
    smoothing: f32[B, P], the probability that a pair is the wrong way round; None if the config
      says one for all.
    consensus: u8[B, *S, C], the mean of the proposals' probabilities in 255ths; None if no term
      reads it, as top_score.
    top_score: f32[B], the highest that the judge gave a proposal of the image.
  """

  images: Array
  chosen: Array
  rejected: Array
  reference_margin: Array
  reference_log_prob: Array
  weight: Array
  voxel_volume: Array
  smoothing: Array | None = None
  consensus: Array | None = None
  top_score: Array | None = None


class FinetuneBatch(NamedTuple):
  """What a step of fine-tuning reads; a part that none of its terms reads is None.

  Attributes:
    pairs: images with pairs.
    labelled: {"image": f32[B, *S, I], "label": u8[B, *S], "index": i32[B]}, of the labelled split.
    unlabelled: {"image", "index"}, likewise, of the unlabelled split.
  """

  pairs: PairBatch | None = None
  labelled: dict[str, Array] | None = None
  unlabelled: dict[str, Array] | None = None


class Partners(NamedTuple):
  """The parameters of two networks that teach each other; `policy` is the one that is kept."""

  policy: Params
  partner: Params


def policy_of(params: Params | Partners) -> Params:
  """The parameters of the policy, alone or beside a partner."""
  return params.policy if isinstance(params, Partners) else params


class Segmenter(NamedTuple):
  """A segmenter as pure functions of its parameters.

  `key` is None for the deterministic network, or a key that switches dropout on. One key
  serves the whole batch; a caller that needs one key an image maps over images with vmap.

  Attributes:
    init: (key, images f32[B, *S, I]) -> params.
    apply: (params, images, key=None) -> logits f32[B, *S, C].
    encode: (params, images) -> features, a pytree of arrays with leading axis B; no dropout.
    decode: (params, features, key=None) -> logits f32[B, *S, C].
  """

  init: Callable[..., Params]
  apply: Callable[..., jax.Array]
  encode: Callable[..., Any]
  decode: Callable[..., jax.Array]
