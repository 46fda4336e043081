"""The default beside baselines that have as many steps as it has, and its zooms and turns.

  python -m launch.study --study=configs/studies/alike.py --records=configs/results/alike \
      --workdir=DIR --roots=ph2=DIR_OF_PH2,acdc=DIR_OF_ACDC

In the study of the README baselines have 400 steps and no zooms. A cell here has 2000 steps: on 2
CPU cores some 8 minutes on PH2 and 12 on ACDC.
"""

from configs.recipes import weak_to_strong_affine
from configs.studies import main

# Both kinds of lesson that need no judge: of weak_to_strong and of mean_teacher.
BOTH = {
  "alike": {
    "2000 steps, consistency": {
      "finetune.num_steps": 2000,
      "finetune.terms.consistency.weight": 10.0,
      "finetune.ramp_steps": 100,
    }
  }
}
ALIKE = {
  "alike": {"2000 steps, zooms": {"finetune.num_steps": 2000, **weak_to_strong_affine.FIRST}}
}


def get_study():
  return {
    **main.get_study(),
    "arms": [
      {"recipes": ("weak_to_strong_affine_rn_dpo",)},
      {"recipes": ("mean_teacher", "top1", "self_training", "supervised_longer"), "axes": ALIKE},
      {"recipes": ("weak_to_strong_affine",), "axes": BOTH},
    ],
  }
