"""An example that runs in some minutes: RN-DPO and DPO on the embedded phantom, two seeds.

python -m launch.study --study=configs/studies/quick.py --workdir=runs/study --records=runs/quick
"""


def get_study():
  return {
    "data": {"phantom": {"config": "configs/quickstart.py", "budgets": (8,)}},
    "draws": (0,),
    "seeds": (0, 1),
    "arms": [{"recipes": ("rn_dpo", "dpo")}],
  }
