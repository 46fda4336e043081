"""The study of the README: every recipe on PH2 and ACDC, three draws of patients, two seeds each.

  python -m launch.study --study=configs/studies/main.py --records=configs/results/main \
      --workdir=DIR --roots=ph2=DIR_OF_PH2,acdc=DIR_OF_ACDC
"""

RECIPES = (
  "supervised_longer", "self_training", "st_plus_plus", "mean_teacher", "ua_mt", "cross_pseudo",
  "weak_to_strong", "copy_paste", "top1", "consensus", "dpo", "ipo", "rn_dpo",
)  # fmt: skip


def get_study():
  return {
    "data": {
      "ph2": {"config": "configs/ph2.py", "budgets": (10,)},
      "acdc": {"config": "configs/acdc.py", "budgets": (5,)},
    },
    "draws": (0, 1, 2),
    "seeds": (0, 1),
    "arms": [
      {"recipes": RECIPES},
      # The ceiling: what the pairs could give.
      {"recipes": ("rn_dpo",), "axes": {"judge": {"oracle": {"judge.name": "oracle"}}}},
      # Stability over betas, on the first draw.
      {"recipes": ("rn_dpo",), "axes": {"finetune.beta": (1.0, 3.0, 10.0, 30.0)}, "draws": (0,)},
      {"recipes": ("dpo",), "axes": {"finetune.beta": (0.003, 0.01, 0.03, 0.1)}, "draws": (0,)},
      # Chosen on validation, for every recipe the same number of rates.
      {
        "recipes": RECIPES, "axes": {"finetune.learning_rate": (3e-4, 1e-3, 3e-3)},
        "draws": (0,), "seeds": (0,), "tuning": True,
      },
    ],
  }  # fmt: skip
