"""Terms of fine-tuning's loss on labelled and on unlabelled images.

Each is a pure function (Inputs, options) -> (f32[], metrics of f32[]), a mean over the images of
its batch. `options` are the term's keys of `config.finetune.terms`. The weak view of an unlabelled
image is `config.augment` of it, the strong view `config.strong` of the weak one: intensities alone,
so that pixels correspond. The teacher, a moving average of the policy, sees the weak view without
dropout; the policy sees the strong view with dropout on, as the base was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rndpo_jax import config as config_lib
from rndpo_jax import losses, types
from rndpo_jax.data import augment, components, mixing
from rndpo_jax.losses import consistency as losses_without_labels
from rndpo_jax.training import online_terms
from rndpo_jax.training.term_inputs import Inputs, Settings, strong_view

# Shares of an image that a pasted box has. CutMix: those of UniMatch (Yang et al., CVPR 2023). BCP:
# Bai et al. (CVPR 2023), two thirds of each axis.
_CUTMIX_SHARES = (0.02, 0.4)
_BCP_SHARE_OF_AXIS = 2 / 3


def labelled(inputs: Inputs, options):
  """Cross-entropy + dice_weight * soft Dice loss on augmented labelled images.

  What trained the base; with a partner, the sum over both networks.
  """
  del options
  augment_key, *keys = jax.random.split(inputs.key, 3)
  images, labels = inputs.labelled["image"], inputs.labelled["label"]
  if inputs.settings.augment is not None:
    images, labels = augment.augment(
      augment_key, images, labels[:, None], **inputs.settings.augment
    )
    labels = labels[:, 0]

  def loss_of(params, key):
    return losses.supervised_loss(
      inputs.settings.apply(params, images, key),
      labels,
      dice_weight=inputs.settings.dice_weight,
      has_ignored=inputs.settings.has_ignored,
    )[0]

  loss = loss_of(inputs.params, keys[0])
  return (loss if inputs.partner is None else loss + loss_of(inputs.partner, keys[1])), {}


def pseudo(inputs: Inputs, options):
  """The policy on the strong view against the class that the base, or the teacher, gives the weak.

  Cross-entropy + dice_weight * soft Dice loss, on pixels whose class has `threshold` or more.
  Sources: Lee, "Pseudo-Label", ICML workshop 2013; with strong views Yang et al., "ST++", CVPR
  2022.
  """
  source = inputs.base if options["teacher"] == "base" else inputs.teacher
  teacher = inputs.settings.teach(source, inputs.weak)
  return _against_classes(inputs, inputs.student_logits, teacher, options["threshold"])


def weak_to_strong(inputs: Inputs, options):
  """The teacher's sure classes of the weak view, learned on strong views with pasted boxes.

  As `pseudo` with the moving average as the teacher; in a share `cutmix` of the images a box comes
  from another image, in the view and in the teacher's logits alike. `second_view` adds another
  strong view with boxes of its own, `dropout_view` the weak view with dropout on; the loss is the
  mean over the views.
  Sources: Sohn et al., "FixMatch", NeurIPS 2020; French et al., BMVC 2020; Yang et al., "UniMatch",
  CVPR 2023.
  """
  settings, threshold = inputs.settings, options["threshold"]
  teacher = settings.teach(inputs.teacher, inputs.weak)
  keys = jax.random.split(inputs.key, 4)

  def of_view(images, key):
    box_key, dropout_key = jax.random.split(key)
    images, goal = _cutmix(box_key, images, teacher, options["cutmix"])
    return _against_classes(
      inputs, settings.apply(inputs.params, images, dropout_key), goal, threshold
    )

  found = [of_view(inputs.strong, keys[0])]
  if options["second_view"]:
    found.append(of_view(strong_view(keys[1], inputs.weak, settings.strong), keys[2]))
  if options["dropout_view"]:
    logits = settings.apply(inputs.params, inputs.weak, keys[3])
    found.append(_against_classes(inputs, logits, teacher, threshold))
  return sum(loss for loss, _ in found) / len(found), found[0][1]


def consistency(inputs: Inputs, options):
  """Mean square between the policy's and the teacher's probabilities.

  With `max_entropy` above 0 only pixels count of which the mean of `passes` teachers under dropout
  has an entropy below that share of log C.
  Sources: Tarvainen and Valpola, "Mean teachers", NeurIPS 2017; Yu et al., "UA-MT", MICCAI 2019.
  """
  settings, share = inputs.settings, options["max_entropy"]
  if share == 0:
    teacher = settings.teach(inputs.teacher, inputs.weak)
    loss = losses_without_labels.consistency_loss(inputs.student_logits, teacher)
    return jnp.mean(loss), {}
  keys = jax.random.split(inputs.key, options["passes"])
  passes = [jax.nn.softmax(settings.apply(inputs.teacher, inputs.weak, key)) for key in keys]
  mean = jnp.log(jnp.maximum(sum(passes) / len(passes), 1e-12))
  loss = losses_without_labels.consistency_loss(
    inputs.student_logits, mean, max_entropy=share * math.log(settings.num_classes)
  )
  return jnp.mean(loss), {}


def cross_pseudo(inputs: Inputs, options):
  """Two networks, each against the other's classes, on the strong view.

  Source: Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR
  2021.
  """
  del options
  partner = inputs.settings.apply(inputs.partner, inputs.strong, inputs.key)
  one, metrics = _against_classes(inputs, inputs.student_logits, partner, 0.0)
  other, _ = _against_classes(inputs, partner, inputs.student_logits, 0.0)
  return one + other, metrics


def copy_paste(inputs: Inputs, options):
  """Boxes of labelled images in unlabelled ones, and the other way round.

  Labels of unlabelled pixels are the largest component of each class that the teacher finds; they
  weigh `unlabelled_weight`, labelled pixels 1. Cross-entropy + dice_weight * soft Dice loss of each
  part, as in the source. Needs as many labelled as unlabelled images.
  Source: Bai et al., "Bidirectional Copy-Paste", CVPR 2023 (without its own pretraining).
  """
  settings, known = inputs.settings, inputs.labelled
  teacher = jnp.argmax(settings.teach(inputs.teacher, inputs.weak), axis=-1).astype(jnp.uint8)
  guess = components.largest(teacher, settings.num_classes)
  box_key, *keys = jax.random.split(inputs.key, 4)
  images, labels = known["image"], known["label"]
  if settings.augment is not None:
    images, labels = augment.augment(keys[0], images, labels[:, None], **settings.augment)
    labels = labels[:, 0]
  size = labels.shape[1:]
  share = _BCP_SHARE_OF_AXIS ** len(size)
  inside = mixing.boxes(box_key, len(labels), size, low=share, high=share)

  def of_mix(is_labelled, key):
    mixed = mixing.paste(is_labelled, images, inputs.weak)
    logits = settings.apply(inputs.params, mixed, key)
    own = _on_pixels(settings, logits, labels, is_labelled)
    return own + options["unlabelled_weight"] * _on_pixels(settings, logits, guess, ~is_labelled)

  return of_mix(inside, keys[1]) + of_mix(~inside, keys[2]), {}


def entropy(inputs: Inputs, options):
  """The policy's own entropy on the strong view, in nats.

  Source: Grandvalet and Bengio, "Semi-supervised learning by entropy minimization", NIPS 2004.
  """
  del options
  return jnp.mean(losses_without_labels.entropy_loss(inputs.student_logits)), {}


def _cutmix(key, images, logits, probability) -> tuple[jax.Array, Any]:
  """In a share of the images a box of their neighbour in the batch, and of its logits."""
  if probability == 0:
    return images, logits
  happens_key, box_key = jax.random.split(key)
  count, size = images.shape[0], images.shape[1:-1]
  low, high = _CUTMIX_SHARES
  inside = mixing.boxes(box_key, count, size, low=low, high=high)
  happens = jax.random.bernoulli(happens_key, probability, (count,))
  inside &= happens.reshape(-1, *(1,) * len(size))
  pair = (images, logits)
  return mixing.paste(inside, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), pair), pair)


def _against_classes(inputs: Inputs, logits, teacher_logits, threshold: float):
  """Cross-entropy + dice_weight * soft Dice against sure classes of a teacher, without gradient."""
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  entropy, sure = losses_without_labels.pseudo_label_loss(
    logits, teacher_logits, threshold=threshold
  )
  classes = jnp.argmax(teacher_logits, axis=-1).astype(jnp.uint8)
  if threshold > 0:
    is_sure = jnp.max(jax.nn.softmax(teacher_logits), axis=-1) >= threshold
    classes = jnp.where(is_sure, classes, types.IGNORED).astype(jnp.uint8)
  dice = losses.soft_dice_loss(logits, classes)
  return jnp.mean(entropy + inputs.settings.dice_weight * dice), {"sure": jnp.mean(sure)}


def _on_pixels(settings: Settings, logits, labels, inside):
  """f32[], cross-entropy + dice_weight * soft Dice loss on the pixels inside alone."""
  labels = jnp.where(inside, labels, types.IGNORED).astype(jnp.uint8)
  return losses.supervised_loss(logits, labels, dice_weight=settings.dice_weight, has_ignored=True)[
    0
  ]


class Term(NamedTuple):
  """A row of the table.

  Attributes:
    loss: (Inputs, options) -> (f32[], metrics); None for a term on pairs, see `pair_terms`.
    reads: of "pairs", "labelled", "unlabelled", "strong" (the strong view of unlabelled images),
      "student" (the policy's logits of it), "teacher", "base", "partner".
    rises: whether its weight rises over `config.finetune.ramp_steps`, since it is on the model's
      own predictions.
  """

  loss: Callable[[Inputs, Mapping[str, Any]], tuple[jax.Array, dict[str, jax.Array]]] | None
  reads: tuple[str, ...]
  rises: bool = True


TERMS = {
  "preference": Term(None, ("pairs",), rises=False),
  "chosen": Term(None, ("pairs",), rises=False),
  "consensus": Term(None, ("pairs",), rises=False),
  "labelled": Term(labelled, ("labelled",), rises=False),
  "pseudo": Term(pseudo, ("unlabelled", "strong", "student")),
  "weak_to_strong": Term(weak_to_strong, ("unlabelled", "strong", "teacher")),
  "consistency": Term(consistency, ("unlabelled", "strong", "student", "teacher")),
  "cross_pseudo": Term(cross_pseudo, ("unlabelled", "strong", "student", "partner")),
  "copy_paste": Term(copy_paste, ("labelled", "unlabelled", "teacher")),
  "entropy": Term(entropy, ("unlabelled", "strong", "student")),
  "online": Term(online_terms.online, ("unlabelled", "teacher", "base")),
}


def reads_of(config) -> set[str]:
  """What the terms of a config read; see `reads`."""
  return reads(config_lib.active_terms(config))


def reads(terms: Mapping[str, Mapping[str, Any]]) -> set[str]:
  """What the terms with a weight above 0 read, of the names in `Term`.

  Args:
    terms: name -> options, "weight" among them.
  """
  found = set()
  for name, options in terms.items():
    if options["weight"] > 0:
      found.update(TERMS[name].reads)
      if name == "pseudo":
        found.add("base" if options["teacher"] == "base" else "teacher")
  return found
