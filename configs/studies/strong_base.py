"""How weak_to_strong is best set: one change at a time, judged on validation alone.

  python -m launch.study --study=configs/studies/strong_base.py \
      --records=configs/results/strong_base --workdir=DIR --roots=ph2=DIR,acdc=DIR
"""

from configs.recipes import weak_to_strong_affine

AFFINE = {"augment.affine": 0.8}
ELASTIC = {"augment.elastic": 0.5, "augment.elastic_scale": 2.0, "augment.elastic_smoothing": 6.0}
VARIANTS = {
  "as it is": {},
  "mirrored teacher": {"finetune.teacher_views": "flips"},
  "mirrored, turned teacher": {"finetune.teacher_views": "flips_turns"},
  "affine": {"phases": (AFFINE,)},
  "affine, elastic": {"phases": ({**AFFINE, **ELASTIC},)},
  "rate 3e-3": {"finetune.learning_rate": 3e-3},
  "boxes in all": {"finetune.terms.weak_to_strong.cutmix": 1.0},
  "stronger views": {
    "strong.intensity_scale": 0.6, "strong.gamma": 0.8, "strong.gamma_scale": 0.8,
    "strong.noise_scale": 0.3,
  },
  "rate 3e-3, boxes in all": {
    "finetune.learning_rate": 3e-3, "finetune.terms.weak_to_strong.cutmix": 1.0,
  },
  "16 unlabelled": {"finetune.unlabelled_batch_size": 16},
  "threshold 0.7": {"finetune.terms.weak_to_strong.threshold": 0.7},
  "second view": {"finetune.terms.weak_to_strong.second_view": True},
}  # fmt: skip
# At the recipe's own length: most is lost on patients whose hearts are larger or smaller in pixels
# than those of all labelled ones.
LONG = {
  "as it is": {},
  "zoom": {"phases": (weak_to_strong_affine.FIRST,)},
}


def get_study():
  return {
    "data": {
      "acdc": {"config": "configs/acdc.py", "budgets": (5,)},
      "ph2": {"config": "configs/ph2.py", "budgets": (10,)},
    },
    "draws": (0,),
    "seeds": (0,),
    "set": {"judge.gate.action": "off", "finetune.num_steps": 400},
    "arms": [
      {"recipes": ("weak_to_strong",), "axes": {"variant": VARIANTS}, "tuning": True},
      {
        "recipes": ("weak_to_strong",),
        "axes": {"1600 steps": LONG},
        "tuning": True,
        "set": {"finetune.num_steps": 1600},
        "draws": (0, 1, 2),
        "data": ("acdc",),
      },
    ],
  }
