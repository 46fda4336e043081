"""The checks on the terms of fine-tuning's loss: each has what it reads, and they go together."""

from __future__ import annotations

from collections.abc import Iterator

from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.training import image_terms


def check(config) -> None:
  """Checks that there is a loss, and that each of its terms has what it reads.

  Args:
    config: of a phase.

  Raises:
    ConfigError: naming the key, what was found and what is expected.
  """
  terms, options = config_lib.active_terms(config), config.finetune
  if not terms:
    raise ConfigError(
      "config.finetune.terms: every weight is 0; set one above 0, such as "
      "config.finetune.terms.preference.weight=1"
    )
  for name in terms:
    _check_networks(config, name, image_terms.reads({name: terms[name]}))
  _check_reliable(config)
  if "online" in terms:
    _check_online(terms["online"], options)
  if "chosen" in terms:
    _check_chosen(config)
  _check_boxes(options, terms)
  _check_batches(config, terms)
  changed = [name for name in ("augment", "strong") if options[name]]
  if "preference" in terms and changed and options.reference == "cached":
    raise ConfigError(
      "config.finetune.reference: changed images need an 'online' reference (cached margins belong "
      "to the image as it was mined); set it, or set "
      f"{' and '.join(f'config.finetune.{name}=False' for name in changed)}"
    )


def _check_networks(config, name: str, reads: set[str]) -> None:
  """Checks that there is an average, or a second network, if a term learns from it."""
  if "teacher" in reads and not config.finetune.ema_decay:
    raise ConfigError(
      f"config.finetune.ema_decay: found 0.0, but config.finetune.terms.{name} learns from the "
      "moving average; set it, such as 0.99"
    )
  if "partner" in reads and config.base.num_members < 2:
    raise ConfigError(
      f"config.base.num_members: found {config.base.num_members}, but "
      f"config.finetune.terms.{name} trains a second network, that of the second member; set it "
      "to 2 or more"
    )
  if "partner" in reads and config_lib.num_phases(config) > 1:
    raise ConfigError(
      f"config.finetune.terms.{name}: the second network that it trains is not kept for the phases "
      "and rounds after it, and in one of those it would be the base's untouched member; use it in "
      "the first phase alone"
    )


def _check_batches(config, terms) -> None:
  """Checks that batches of the terms fit each other, and parts of them add up."""
  options = config.finetune
  if "copy_paste" in terms and options.labelled_batch_size != options.unlabelled_batch_size:
    raise ConfigError(
      f"config.finetune.labelled_batch_size: found {options.labelled_batch_size}, but "
      "config.finetune.terms.copy_paste pastes each into one of unlabelled_batch_size="
      f"{options.unlabelled_batch_size}; set them equal"
    )
  on_pairs = [name for name in terms if "pairs" in image_terms.TERMS[name].reads]
  others = [name for name in terms if name not in on_pairs]
  # Parts of a batch are added up by the weight of their pairs, or equally; it cannot be both.
  apart = on_pairs and others or "consensus" in on_pairs or config_lib.weighs_images(config)
  if options.accumulate_steps > 1 and apart:
    raise ConfigError(
      f"config.finetune.accumulate_steps: found {options.accumulate_steps}, but the terms "
      f"{', '.join(terms)} do not add up over parts of a batch; set it to 1"
    )


def _check_reliable(config) -> None:
  """Checks that there are checkpoints and images to tell the reliable ones by."""
  share = config.finetune.reliable_share
  if share == 1:
    return
  if config.data.spacing:
    raise ConfigError(
      f"config.finetune.reliable_share: found {share}, but with config.data.spacing a step is "
      "shown patches, and whole images on one grid are what it is measured on; leave it at 1.0"
    )
  before = list(_before(config))
  if not before or any(one.num_steps <= one.eval_every_steps for one in before):
    raise ConfigError(
      f"config.finetune.reliable_share: found {share}, but it is told by two or more checkpoints "
      "of the phase before; set it in a phase after one with num_steps above eval_every_steps (and "
      "so in those before that one, as far as the judge's gate may leave it out)"
    )


def _before(config) -> Iterator:
  """`finetune` of the phases from whose result this one may start; empty if that is the base."""
  for number in range(config_lib.num_phases(config) - 1, 0, -1):
    own = config_lib.of_phase(config, number)
    yield own.finetune
    is_judged = "pairs" in image_terms.reads_of(own) and not own.data.preferences
    if not is_judged or own.judge.gate.action != "refuse":
      return


def _check_boxes(options, terms) -> None:
  """Checks that there is another image to paste a box of, in each part of a batch."""
  count = options.unlabelled_batch_size // options.accumulate_steps
  if count < 2 and terms.get("weak_to_strong", {}).get("cutmix"):
    raise ConfigError(
      "config.finetune.terms.weak_to_strong.cutmix: a box comes from another image, but with "
      f"unlabelled_batch_size={options.unlabelled_batch_size} and accumulate_steps="
      f"{options.accumulate_steps} a step sees one at a time; set cutmix to 0, or another of them"
    )


def _check_chosen(config) -> None:
  """Checks that chosen masks are the judge's best, where they are taken for labels."""
  if not config.data.preferences and not config.mine.rule.startswith("top_"):
    raise ConfigError(
      f"config.mine.rule: found {config.mine.rule!r}, by which a chosen mask need not be the best, "
      "and config.finetune.terms.chosen takes it for a label; take a rule top_..."
    )


def _check_online(made_here, options) -> None:
  """Checks that pairs of the policy's own proposals can differ, and be smoothed."""
  if made_here["threshold_shift"] and made_here["num_proposals"] == 2:
    raise ConfigError(
      "config.finetune.terms.online.num_proposals: found 2, but beside the policy's own mask the "
      "shifts of threshold_shift are of both signs; with one alone it would always be the smaller "
      "mask: take 3 or more, or set threshold_shift to 0"
    )
  if not made_here["noise_scale"] + made_here["threshold_shift"]:
    raise ConfigError(
      "config.finetune.terms.online: noise_scale and threshold_shift are 0, so that all proposals "
      "would be the same; set one above 0"
    )
  if options.pair_smoothing != "none":
    raise ConfigError(
      f"config.finetune.pair_smoothing: found {options.pair_smoothing!r}, but the pairs of "
      "config.finetune.terms.online have no judge that was measured; set it to 'none'"
    )
