"""Where preferences begin to pay: RN-DPO and DPO under judges of known accuracy, small phantom.

  python -m launch.study --study=configs/studies/judge_accuracy.py \
      --records=configs/results/judge_accuracy --workdir=DIR

Some 20 s a cell on a CPU core. A judge ranks an image's proposals by their true Dice, and a share
of the images the other way round: of the pairs as large a share is wrong.
"""

SMALL = {
  "data.size": (32, 32),
  "data.phantom.num_cases": 104,
  "data.phantom.size": (36, 40),
  "data.num_labelled": 8,
  "data.num_val": 16,
  "data.num_test": 32,
  "model.depth": 3,
  "base.num_steps": 100,
  "mine.num_shards": 1,
  "judge.compare": (),
  "judge.gate.action": "off",
}
RULES = {rule: {"mine.rule": rule} for rule in ("top_vs_random", "top_vs_bottom", "random_pair")}
# Masks with gross errors among them: few pairs then hold most of the pixels of all D.
REGIONS = {
  "like sizes": {},
  "heavy tails": {"proposals.mix": "base:1,tta+threshold:5,corrupt:2"},
}


def get_study():
  return {
    "data": {"phantom": {"config": "configs/quickstart.py", "budgets": (8,), "set": SMALL}},
    "draws": (0,),
    "seeds": (0, 1, 2),
    # After the recipe, which has 400 steps.
    "set": {"finetune.num_steps": 200, "judge.name": "noisy_oracle"},
    "arms": [
      {
        "recipes": ("rn_dpo", "dpo"),
        "axes": {"judge.flip_rate": (0.02, 0.1, 0.2, 0.3, 0.4, 0.5), "rule": RULES},
      },
      {
        "recipes": ("rn_dpo",),
        "axes": {"finetune.beta": (1.0, 3.0, 10.0, 30.0), "regions": REGIONS},
        "set": {"judge.flip_rate": 0.2},
      },
      {
        "recipes": ("dpo",),
        "axes": {"finetune.beta": (0.003, 0.01, 0.03, 0.1), "regions": REGIONS},
        "set": {"judge.flip_rate": 0.2},
      },
    ],
  }
