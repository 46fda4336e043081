"""Where the randomness of a run comes from: one key and one data order for each use of its seed.

The numbers that tell the uses apart are fixed here, so that no two of them meet.
"""

from __future__ import annotations

import jax

_MINING, _FINETUNING, _JUDGE = 1, 2, 3
_MEMBER_STRIDE = 1000  # between the members of the base


def base_key(seed: int, member: int) -> jax.Array:
  """The key of a member's training: its parameters, dropout, augmentation."""
  return jax.random.fold_in(jax.random.key(seed), _MEMBER_STRIDE * member)


def mining_key(seed: int) -> jax.Array:
  """The key of mining; each image folds its index into it."""
  return jax.random.fold_in(jax.random.key(seed), _MINING)


def finetuning_key(seed: int, phase: int = 1) -> jax.Array:
  """The key of a fine-tuning, the phase of it counted from 1."""
  key = jax.random.fold_in(jax.random.key(seed), _FINETUNING)
  return key if phase == 1 else jax.random.fold_in(key, phase)


def judge_key(seed: int) -> jax.Array:
  """The key of the learned judge's training."""
  return jax.random.fold_in(jax.random.key(seed), _JUDGE)


def base_order(seed: int, member: int) -> int:
  """The seed of the order in which a member of the base sees the labelled images."""
  return seed + _MEMBER_STRIDE * member


def judge_order(seed: int) -> int:
  """The seed of the order in which the learned judge sees the labelled images."""
  return seed + 1


def pairs_order(seed: int) -> int:
  """The seed of the order in which fine-tuning sees the images with pairs."""
  return seed


def labelled_order(seed: int) -> int:
  """The seed of the order in which fine-tuning sees the labelled images."""
  return seed + 2


def unlabelled_order(seed: int) -> int:
  """The seed of the order in which fine-tuning sees the unlabelled images without pairs."""
  return seed + 3
