"""What makes preferences worth more after a strong base: one change at a time, on the first draw.

  python -m launch.study --study=configs/studies/second_phase.py \
      --records=configs/results/second_phase --workdir=DIR --roots=ph2=DIR,acdc=DIR

With the workdir of configs/studies/main.py bases and first phases are those of that study.
"""

from configs.recipes import (
  weak_to_strong_beside_rn_dpo,
  weak_to_strong_rn_dpo,
  weak_to_strong_top1,
)

SECOND = weak_to_strong_rn_dpo.SECOND
# As many steps, on pairs that are mined four times from the policy of that moment.
ROUNDS = {
  "phases": ({}, {**SECOND, "finetune.num_steps": 100}),
  "finetune.rounds": 4,
}
# Judges by agreement, each trained on other patients; they cost three more bases.
ENSEMBLE = {"base.num_members": 4, "base.member_labels": 0.7}
LABELLED = {"finetune.terms.labelled.weight": 1.0}
# The judge is right more often of proposals that are far apart.
BOTTOM = {"mine.rule": "top_vs_bottom"}
# Pairs in which the model would answer otherwise than its judge.
BASE = {"mine.rule": "top_vs_base", "mine.pairs_per_image": 1}
MIX_OF_16 = {"proposals.mix": "base:1,tta+threshold:15"}
# Those that are worth more than one draw.
ON_ALL_DRAWS = {
  "top_vs_bottom": BOTTOM,
  "top_vs_base": BASE,
  "top_vs_base, labelled": {**BASE, "phases": ({}, {**SECOND, **LABELLED})},
  "top_vs_base, rounds": {**BASE, **ROUNDS},
  "rounds": ROUNDS,
  "rounds, labelled": {**ROUNDS, "phases": ({}, {**ROUNDS["phases"][1], **LABELLED})},
  "rounds of the oracle": {**ROUNDS, "judge.name": "oracle"},
}
VARIANTS = {
  "labelled": {"phases": ({}, {**SECOND, **LABELLED})},
  "average, rate 3e-4": {
    "phases": ({}, {**SECOND, "finetune.ema_decay": 0.99, "finetune.learning_rate": 3e-4}),
  },
  "top_vs_bottom, members": {**BOTTOM, **ENSEMBLE},
  "top_vs_bottom, rounds": {**BOTTOM, **ROUNDS},
  "top_vs_bottom, 16 proposals": {**BOTTOM, **MIX_OF_16},
  "random_pair": {"mine.rule": "random_pair"},
  "reliability": {"finetune.pair_weight": "reliability"},
  "smoothing": {
    "finetune.objective": "cdpo",
    "finetune.normalization": "region",
    "finetune.pair_smoothing": "reliability",
  },
  "probability 0.7": {"finetune.min_pair_probability": 0.7},
  "dropout_proposals": {
    "proposals.mix": "base:1,tta+mc_dropout+logit_noise:7",
    "proposals.noise_scale": 1.0,
  },
  "members": {**ENSEMBLE},
  "members' masks": {**ENSEMBLE, "proposals.mix": "base:1,member:3,tta+threshold:4"},
  "components": {
    "proposals.mix": "base:1,largest_component:1,tta+threshold:4,drop_component:1,corrupt:1",
  },
  "entropy": {"judge.name": "entropy"},
  "confidence": {"judge.name": "confidence"},
  "fused": {"judge.name": "fused"},
  "strong": {"finetune.strong": True, "finetune.dropout": True},
  "beta 1": {"finetune.beta": 1.0},
  "beta 1 of the oracle": {"finetune.beta": 1.0, "judge.name": "oracle"},
  "beta 3": {"finetune.beta": 3.0},
  "beta 30": {"finetune.beta": 30.0},
}


BESIDE_TOP1 = {
  **weak_to_strong_top1.SECOND,
  "finetune.terms.preference.weight": weak_to_strong_beside_rn_dpo.SECOND[
    "finetune.terms.preference.weight"
  ],
  "finetune.reference": "online",
}
ON_TOP1 = {
  # Images of whose top proposal the judge is surer weigh more.
  "images by score": {"finetune.terms.chosen.image_temperature": 0.05},
  "beside rn_dpo": {**BOTTOM, "phases": ({}, BESIDE_TOP1)},
}


def get_study():
  return {
    "data": {
      "ph2": {"config": "configs/ph2.py", "budgets": (10,)},
      "acdc": {"config": "configs/acdc.py", "budgets": (5,)},
    },
    "draws": (0,),
    "seeds": (0, 1),
    # Half of the first phase of the recipes as they are.
    "set": {"judge.gate.action": "warn", "finetune.num_steps": 800},
    "arms": [
      {"recipes": ("weak_to_strong_beside_rn_dpo", "weak_to_strong_online")},
      {"recipes": ("weak_to_strong_rn_dpo",), "axes": {"variant": VARIANTS}},
      {
        "recipes": ("weak_to_strong_rn_dpo",), "axes": {"variant": ON_ALL_DRAWS},
        "draws": (0, 1, 2),
      },
      {
        "recipes": ("weak_to_strong_dpo",), "axes": {"variant": {"top_vs_bottom": BOTTOM}},
        "draws": (0, 1, 2),
      },
      {
        "recipes": ("weak_to_strong_beside_rn_dpo",),
        "axes": {"variant": {"top_vs_bottom": BOTTOM}},
      },
      {"recipes": ("weak_to_strong_top1",), "axes": {"variant": ON_TOP1}},
    ],
  }  # fmt: skip
