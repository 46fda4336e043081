"""The study of the README: every recipe on PH2 and ACDC, three draws of patients, two seeds each.

  python -m launch.study --study=configs/studies/main.py --records=configs/results/main \
      --workdir=DIR --roots=ph2=DIR_OF_PH2,acdc=DIR_OF_ACDC

On 2 CPU cores a recipe of 400 steps takes some 2 minutes on PH2 and 6 on ACDC; the arms are in the
order in which they matter, and an interrupted study goes on where it was.
"""

# Every recipe has 400 steps after the base; those on weak_to_strong have 800, and 400 more in a
# second phase. The recipes as they are have twice as long a first one: they are arms of their own,
# and the default is one of those.
ONE_PHASE = ("rn_dpo", "supervised_longer", "self_training", "top1", "dpo")
ON_STRONG = (
  "weak_to_strong_rn_dpo", "weak_to_strong", "weak_to_strong_top1", "weak_to_strong_dpo",
)  # fmt: skip
HALF = {"finetune.num_steps": 800}
OTHERS = ("mean_teacher", "ua_mt", "copy_paste", "st_plus_plus", "cross_pseudo", "consensus", "ipo")
ORACLE = {"judge": {"oracle": {"judge.name": "oracle"}}}
# Proposals that see things larger and smaller, for data in which organs differ in size.
ZOOM = {"mix": {"zoom": {"proposals.mix": "base:1,tta+zoom:7"}}}


def get_study():
  return {
    "data": {
      "ph2": {"config": "configs/ph2.py", "budgets": (10,)},
      "acdc": {"config": "configs/acdc.py", "budgets": (5,)},
    },
    "draws": (0, 1, 2),
    "seeds": (0, 1),
    # What the gate would stop is to be seen here.
    "set": {"judge.gate.action": "warn"},
    "arms": [
      {"recipes": ON_STRONG[:2], "set": HALF},
      {"recipes": ONE_PHASE},
      {"recipes": ON_STRONG[2:], "set": HALF},
      # The ceiling: what the pairs could give.
      {"recipes": ("rn_dpo",), "axes": ORACLE},
      {"recipes": ("weak_to_strong_rn_dpo",), "axes": ORACLE, "set": HALF},
      # The winner's training without its second phase, as many steps.
      {"recipes": ("weak_to_strong",), "axes": {"finetune.num_steps": (1200,)}},
      # The first phase as long as the recipe has it, and twice as long; its steps without a second.
      {"recipes": ("weak_to_strong_rn_dpo",), "axes": {"finetune.num_steps": (1600, 3200)}},
      {"recipes": ("weak_to_strong",), "axes": {"finetune.num_steps": (2000,)}},
      # Three phases, at the lengths that the recipe has.
      {"recipes": ("weak_to_strong_top1_rn_dpo",)},
      # The default, the same without its second phase, and with one between the two.
      {
        "recipes": (
          "weak_to_strong_affine_rn_dpo", "weak_to_strong_affine",
          "weak_to_strong_affine_top1_rn_dpo",
        ),
      },
      {"recipes": ("weak_to_strong_affine_rn_dpo", "rn_dpo"), "axes": ZOOM},
      {"recipes": OTHERS},
      # Stability over betas, on the first draw.
      {"recipes": ("rn_dpo",), "axes": {"finetune.beta": (1.0, 3.0, 10.0, 30.0)}, "draws": (0,)},
      {"recipes": ("dpo",), "axes": {"finetune.beta": (0.003, 0.01, 0.03, 0.1)}, "draws": (0,)},
      # Chosen on validation, for every recipe the same number of rates.
      {
        "recipes": ONE_PHASE, "axes": {"finetune.learning_rate": (3e-4, 3e-3)},
        "draws": (0,), "seeds": (0,), "tuning": True,
      },
      {
        "recipes": ("weak_to_strong",), "axes": {"finetune.learning_rate": (3e-4, 3e-3)},
        "set": HALF, "draws": (0,), "seeds": (0,), "tuning": True,
      },
    ],
  }  # fmt: skip
