"""Every default of the program, with its unit and meaning.

A file in `configs/` starts from `base_config()` and overrides a few keys; the command line
overrides more (`--config.finetune.beta=10`). ml_collections raises an error on an unknown key or a
wrong type, `config_checks.validate` on a value that cannot work and on a key that nothing reads.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from rndpo_jax.errors import ConfigError

# What a phase may change.
PHASE_SECTIONS = ("augment", "strong", "proposals", "judge", "mine", "finetune")
STAGES = ("prepare", "base", "mine", "finetune", "evaluate", "report")


def base_config() -> ml_collections.ConfigDict:
  """Returns the config with every default."""
  # fmt: off
  config = ml_collections.ConfigDict()
  config.seed = 0  # everything random is folded from it

  config.data = data = ml_collections.ConfigDict()
  data.source = "phantom"  # of data.sources.SOURCES: phantom | folder | nnunet | dicom
  data.name = "phantom"  # name of the data set in results and report
  data.root = ""  # folder of the source's files; phantom needs none
  data.spatial_dims = 2  # 2: each slice is a record; 3: each volume is one
  data.size = (64, 64)  # the model's grid in pixels, one entry a spatial dimension
  data.crop = ()  # centre crop before resizing, in source pixels; () keeps the whole image
  data.num_classes = 2  # background is one of them; 0 takes it from an nnU-Net dataset.json
  data.normalization = "zscore"  # zscore | minmax, an image and channel at a time
  # mm a pixel of the model's grid, one entry a spatial dimension; an entry of 0 takes the median of
  # the labelled cases. () is the simple mode: whole images at data.size.
  data.spacing = ()
  data.patch_size = ()  # pixels of the network's input, with data.spacing
  data.schemes = ()  # of data.intensity.SCHEMES, one a channel; () as nnU-Net chooses
  # Of the scheme 'ct': JSON of {"mean", "std", "percentile_00_5", "percentile_99_5"} or null, one a
  # channel; "" measures them under the masks of the labelled split.
  data.statistics = ""
  data.case_pattern = ""  # regex whose group 1 is the case id of an image id; "" the whole id
  data.group_pattern = ""  # regex whose group 1 is the patient of a case id; "" the whole id
  data.split_file = ""  # JSON {"labelled": [case ids], "unlabelled": ..., "val": ..., "test": ...}
  data.split_fold = -1  # of an nnU-Net splits_final.json in split_file; -1: it is no such file
  data.proposals = ""  # folder of masks NAME/ID.png that proposals.mix takes as file:COUNT
  data.preferences = ""  # CSV image,chosen,rejected: pairs as they are, in place of mined ones
  data.num_labelled = 8  # groups to train the base on (patients, or cases without group_pattern)
  data.num_val = 16  # groups that choose checkpoints and measure judges; 0: label_free chooses
  data.num_test = 32  # groups that are only tested; 0 for none
  data.num_unlabelled = -1  # groups to mine pairs from; -1 takes all that are left
  data.split_seed = 0  # which groups go where; apart from `seed` so that seeds share a split
  data.num_workers = 0  # Grain worker processes; 0 reads in this process
  data.prefetch = 2  # batches on their way to the device
  data.phantom = phantom = ml_collections.ConfigDict()
  phantom.num_cases = 152  # images, or volumes
  phantom.size = (72, 80)  # pixels of a generated image, or (H, W, Z) voxels
  phantom.contrast = 0.5  # organ against surround; lower is harder
  phantom.noise = 0.12  # standard deviation, of an intensity range of about 1
  phantom.seed = 0  # of the generator

  # Augmentation, on the device; probabilities in 0..1, each image drawn alone.
  config.augment = augment = ml_collections.ConfigDict()
  augment.flip = 0.5  # along each axis
  augment.turn = 0.5  # by a multiple of 90 degrees; needs equal H and W
  augment.intensity = 0.5  # x * (1 + u s) + v s, u and v uniform in -1..1
  augment.intensity_scale = 0.2  # s of intensity, in normalised units
  augment.gamma = 0.3  # intensity to the power of an exponent
  augment.gamma_scale = 0.3  # s: the exponent is in exp(-s)..exp(s)
  augment.noise = 0.3  # white noise
  augment.noise_scale = 0.1  # standard deviation in normalised units
  augment.elastic = 0.0  # a smooth random displacement
  augment.elastic_scale = 4.0  # pixels, standard deviation of the displacement
  augment.elastic_smoothing = 8.0  # pixels, width of its Gaussian
  augment.affine = 0.0  # rotation in the (H, W) plane with a zoom
  augment.affine_degrees = 30.0  # largest angle
  augment.affine_zoom = 0.2  # s: the zoom is in exp(-s)..exp(s)

  # What makes the strong view of an unlabelled image from its weak one, which is `augment` of it.
  config.strong = strong = ml_collections.ConfigDict()
  strong.intensity = 0.8  # probabilities and scales as in `augment`
  strong.intensity_scale = 0.4
  strong.gamma = 0.5
  strong.gamma_scale = 0.5
  strong.noise = 0.5
  strong.noise_scale = 0.2

  config.model = model = ml_collections.ConfigDict()
  model.name = "unet"  # of models.ARCHITECTURES, or package.module:function
  model.width = 8  # channels of the first level, doubled at each deeper one
  model.depth = 4  # levels; data.size must divide by 2**(depth - 1)
  model.max_width = 256  # channels a level never exceeds
  # JSON of an nnU-Net network with kernels and strides of its own, as base.nnunet_folder sets it;
  # "" makes one of width, depth and max_width.
  model.architecture = ""
  model.norm = "group"  # group | instance
  model.dropout = 0.2  # rate, in bottleneck and decoder
  model.dtype = "float32"  # float32 | bfloat16 compute; parameters and logits are float32
  model.lanes = 0  # channels that fill a tile of memory, with neighbours; 0: 128 on TPU, else 1
  model.remat = False  # computes activations again in the backward pass: less memory, slower

  # How training and validation share the devices; mining and evaluation give each whole images.
  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.fsdp = 1  # devices that share large parameters and their optimiser state
  mesh.space = 1  # devices that share each image, along H; the rest of the devices is `data`
  mesh.fsdp_min_size = 2**17  # elements from which on an array of parameters is shared

  config.base = base = ml_collections.ConfigDict()
  base.workdir = ""  # take data, splits and base from this work directory; "" trains here
  base.nnunet_folder = ""  # .../nnUNetTrainer__nnUNetPlans__2d: the base is that trained nnU-Net
  base.fold = "0"  # of it: a number, "all", or several for the judge agreement: "0,1,2"
  base.num_members = 1  # base models trained; the first is the policy, all judge by agreement
  base.member_labels = 1.0  # share of the labelled groups that each member but the first sees
  base.num_steps = 400  # optimiser steps of each member
  base.batch_size = 16  # labelled images a step
  base.accumulate_steps = 1  # parts that a batch is gone through in, for less memory
  base.learning_rate = 3e-3  # peak, AdamW with warm-up and cosine decay
  base.warmup_steps = 40  # of rising learning rate
  base.weight_decay = 1e-4  # of AdamW
  base.clip_norm = 1.0  # of the whole gradient; 0 does not clip
  base.dice_weight = 1.0  # loss = cross-entropy + dice_weight * (1 - soft Dice)
  base.augment = True  # as `augment` says
  base.select = "best"  # best | last checkpoint is the base; without validation cases the last
  base.log_every_steps = 20  # a row of metrics.jsonl
  base.eval_every_steps = 100  # validation and checkpoint
  base.keep_checkpoints = 2  # states to go on from; an older one if the latest is corrupt
  base.checkpoint_minutes = 0.0  # between further states, also of the learned judge; 0 makes none

  config.proposals = proposals = ml_collections.ConfigDict()
  # Comma-separated NAME[+NAME...]:COUNT; K is the sum of the counts. '+' composes samplers.
  proposals.mix = "base:1,tta+threshold:7"
  proposals.noise_scale = 1.0  # standard deviation of the logit field
  proposals.noise_smoothing = 8.0  # pixels, width of the field's Gaussian
  proposals.temperature_low = 0.5  # geometric sweep low..high
  proposals.temperature_high = 2.0  # divisors of the logits
  proposals.zoom = 1.5  # things are seen 1 / zoom to zoom times as large
  proposals.threshold_shift = 4.0  # background logit shifted by -s..s

  config.judge = judge = ml_collections.ConfigDict()
  # Of mining.judges.JUDGES, package.module:function, auto (one of compare) or fused (all of them).
  judge.name = "agreement"
  judge.compare = ("agreement", "confidence", "entropy")  # judges also measured on validation
  judge.flip_rate = 0.0  # noisy_oracle: share of images whose ranking is reversed
  judge.noise_level = 0.0  # noisy_oracle: standard deviation added to the true score
  judge.border = 3  # entropy: pixels around the mask that count too
  judge.num_bootstrap = 1000  # resamples of cases for intervals
  judge.gate = gate = ml_collections.ConfigDict()
  gate.min_accuracy = 0.5  # share of the mined pairs right, lower bound of 95%; 0.5 breaks even
  # refuse (a phase after the first is left out) | warn | off, for a judge below it; one that no
  # validation case measures is not refused
  gate.action = "refuse"
  judge.learned = learned = ml_collections.ConfigDict()
  learned.width = 8  # channels of the first level; depth and dropout are the model's
  learned.num_steps = 300  # optimiser steps
  learned.batch_size = 16  # labelled images a step
  learned.masks_per_image = 8  # synthetic bad masks of each
  learned.learning_rate = 3e-3  # peak of Adam, cosine decay to zero

  config.mine = mine = ml_collections.ConfigDict()
  mine.rule = "top_vs_random"  # a name of mining.pair_rules.RULES
  mine.pairs_per_image = 4  # P, at most
  mine.min_score_gap = 0.0  # a pair needs a gap of the judge's scores above it
  mine.min_region_size = 1  # pixels in which the masks of a pair differ, at least
  mine.max_region_size = 0  # pixels, at most; 0 sets no limit
  mine.whole_images = False  # native mode: proposals, scores and |D| of whole images, not of tiles
  mine.batch_size = 16  # images that a device takes at once; the pairs do not depend on devices
  mine.num_shards = 4  # files of pairs; the processes share them

  # Fine-tunings one after another: what each changes, as in ({"finetune.num_steps": 800}, {}).
  config.phases = ()
  config.finetune = finetune = ml_collections.ConfigDict()
  finetune.rounds = 1  # times that the last phase runs, with pairs mined again each time
  finetune.objective = "rn_dpo"  # a name of losses.objectives.OBJECTIVES, or several: "rn_dpo,ipo"
  finetune.objective_weights = ()  # of several objectives, as in (1.0, 0.2); () ones
  finetune.beta = 10.0  # see losses.preference_loss for its conversion between objectives
  finetune.normalization = ""  # none | region | power; "" is the objective's own
  finetune.power_exponent = 0.5  # power divides sums over D by max(|D|, floor)**exponent
  finetune.power_floor = 1.0  # in region_unit
  finetune.region_unit = "pixel"  # pixel of the model's grid | mm (mm^2 or mm^3)
  finetune.region_classes = ()  # D counts pixels of these class ids alone; () all
  finetune.label_smoothing = 0.0  # probability that a pair is the wrong way round
  finetune.pair_smoothing = "none"  # none | reliability: of each pair, by the judge at its gap
  finetune.discopop_temperature = 0.05  # of discopop's blend; no unit
  finetune.pair_weight = "none"  # none | score_gap | reliability (of the judge at that gap)
  finetune.min_pair_probability = 0.0  # a pair weighs 0 if the judge is right less often at its gap
  finetune.reference = "cached"  # cached margins | online (needed with augment) | none
  finetune.augment = False  # images with pairs, as `augment` says, image and masks alike
  finetune.strong = False  # the policy sees the strong view of them; needs an online reference
  finetune.dropout = False  # dropout on in the policy's forward of images with pairs
  finetune.num_steps = 300  # optimiser steps
  finetune.batch_size = 16  # images with their pairs a step
  finetune.labelled_batch_size = 8  # labelled images a step
  finetune.unlabelled_batch_size = 8  # unlabelled images a step, without pairs
  finetune.teacher_views = "one"  # one | flips | flips_turns of an image, averaged by a teacher
  # Of the unlabelled images, those on which the checkpoints of the phase before agree most.
  finetune.reliable_share = 1.0
  finetune.ramp_steps = 0  # of rising weights of terms on the model's own predictions
  finetune.accumulate_steps = 1  # parts that a batch is gone through in, for less memory
  finetune.learning_rate = 1e-3  # peak of Adam
  finetune.schedule = "cosine"  # cosine decay to zero | constant
  finetune.weight_decay = 0.0  # above 0 Adam is AdamW
  finetune.clip_norm = 0.0  # of the whole gradient; 0 does not clip
  finetune.ema_decay = 0.0  # above 0, the moving average of the parameters is what is evaluated
  finetune.log_every_steps = 10  # a row of metrics.jsonl
  finetune.eval_every_steps = 50  # validation and checkpoint
  finetune.keep_checkpoints = 2  # states to go on from; an older one if the latest is corrupt
  finetune.checkpoint_minutes = 0.0  # between further states; 0 makes none

  # The loss is the sum of these, by weight; a weight of 0 leaves a term out and costs nothing.
  finetune.terms = terms = ml_collections.ConfigDict()
  for name in ("preference", "chosen", "consensus", "labelled", "cross_pseudo", "entropy"):
    terms[name] = ml_collections.ConfigDict({"weight": 0.0})
  terms.preference.weight = 1.0  # `objective` on the mined pairs
  # Of a softmax over scores that weighs the proposals of an image; 0 weighs them equally.
  terms.consensus.temperature = 0.0
  # Of one over the top scores of a batch, that weighs its images; 0 weighs them equally.
  terms.chosen.image_temperature = terms.consensus.image_temperature = 0.0
  terms.pseudo = ml_collections.ConfigDict({"weight": 0.0})
  terms.pseudo.teacher = "base"  # base | average: whose classes are learned
  terms.pseudo.threshold = 0.0  # least probability of a class that is learned
  terms.weak_to_strong = ml_collections.ConfigDict({"weight": 0.0})
  terms.weak_to_strong.threshold = 0.9  # least probability of a class that is learned
  terms.weak_to_strong.cutmix = 0.5  # share of the images with a box of another one
  terms.weak_to_strong.second_view = False  # another strong view
  terms.weak_to_strong.dropout_view = False  # the weak view with dropout on
  terms.consistency = ml_collections.ConfigDict({"weight": 0.0})
  terms.consistency.max_entropy = 0.0  # share of log C above which a pixel is left out; 0 none is
  terms.consistency.passes = 4  # of the teacher under dropout, with max_entropy
  terms.online = ml_collections.ConfigDict({"weight": 0.0})
  terms.online.num_proposals = 4  # of the policy, an image
  terms.online.noise_scale = 1.0  # as in `proposals`, and so the next two
  terms.online.noise_smoothing = 8.0
  terms.online.threshold_shift = 2.0
  terms.copy_paste = ml_collections.ConfigDict({"weight": 0.0})
  terms.copy_paste.unlabelled_weight = 0.5  # of the pixels whose label is a guess

  config.evaluate = evaluate = ml_collections.ConfigDict()
  evaluate.batch_size = 16  # records of a process, shared by its devices
  evaluate.mirror = False  # averages over flips, 4 passes an image or 8: launch.predict --mirror
  evaluate.metrics = ("dice", "iou")  # of dice, iou, hd95, hd100, assd, nsd
  evaluate.delivered_min_probability = 0.9  # that it is not below the base; 0: the last
  evaluate.delivered_max_kl = 0.05  # nats a pixel from the base, where validation does not show it
  evaluate.nsd_tolerance_mm = 2.0  # of nsd; in voxels if the spacing is unknown
  # fmt: on
  return config


def leaves(config, prefix: str = "") -> dict[str, Any]:
  """Every key with its value, as {"data.phantom.seed": 0, ...}."""
  found = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      found |= leaves(value, f"{prefix}{name}.")
    else:
      found[f"{prefix}{name}"] = value
  return found


def num_phases(config) -> int:
  """Fine-tunings of a job: its phases, the last one as often as there are rounds."""
  return max(len(config.phases), 1) + config.finetune.rounds - 1


def every_phase(config) -> list[ml_collections.ConfigDict]:
  """The configs of all phases, in their order; see `of_phase`."""
  return [of_phase(config, number) for number in range(1, num_phases(config) + 1)]


def of_phase(config, number: int | None = None) -> ml_collections.ConfigDict:
  """The config of a phase: the job's, with what the phase changes.

  In it `phases` are those up to this one, each with a value for every key that any of them changes,
  so that it is its own last phase, and those before it can be had from it.

  Args:
    config: of a job, or of a phase after this one.
    number: from 1; None for the last.

  Raises:
    ConfigError: if a phase names a key that is unknown, or of a section that phases share.
  """
  phases = tuple(config.phases) or ({},)
  phases += (phases[-1],) * (config.finetune.rounds - 1)
  values = leaves(config)
  for place, phase in enumerate(phases):
    for key in phase:
      if key not in values or key.split(".")[0] not in PHASE_SECTIONS or key == "finetune.rounds":
        raise ConfigError(
          f"config.phases[{place}]: found key {key!r}, expected a key of "
          f"{', '.join(PHASE_SECTIONS)}, without config"
        )
  changed = sorted(set().union(*phases))
  phases = tuple({key: phase.get(key, values[key]) for key in changed} for phase in phases)
  phases = phases[:number]
  own = config.copy_and_resolve_references()
  own.phases = phases if len(phases) > 1 else ()
  own.finetune.rounds = 1
  for key, value in phases[-1].items():
    try:
      own.update_from_flattened_dict({key: value})
    except TypeError as error:
      raise ConfigError(f"config.phases[{len(phases) - 1}]: {key}: {error}") from error
  return own


def input_size(config) -> tuple[int, ...]:
  """Pixels of the network's input: the patch, or in the simple mode the whole grid."""
  return tuple(config.data.patch_size if config.data.spacing else config.data.size)


def trains_base(config) -> bool:
  """Whether the base is trained here, and not taken from elsewhere."""
  return not (config.base.workdir or config.base.nnunet_folder)


def active_terms(config) -> dict[str, dict[str, Any]]:
  """The terms of fine-tuning's loss with a weight above 0: name -> options."""
  terms = config.finetune.terms.to_dict()
  return {name: options for name, options in terms.items() if options["weight"] > 0}


def weighs_images(config) -> bool:
  """Whether a term weighs images by the top score that the judge gave one of their proposals."""
  return any(options.get("image_temperature") for options in active_terms(config).values())


def region_classes(config) -> tuple[int, ...] | None:
  """The class ids whose pixels count in D; None for all."""
  return tuple(config.finetune.region_classes) or None
