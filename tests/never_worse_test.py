"""A short form of the campaign: a judge that lies, and one that biases, never reach the user."""

import never_worse_campaign as campaign
import pytest

TINY = {
  "data__size": (24, 24),
  "data__phantom__num_cases": 44,
  "data__phantom__size": (26, 28),
  "data__num_labelled": 6,
  "data__num_val": 8,
  "data__num_test": 12,
  "model__depth": 2,
  "base__batch_size": 8,
  "base__learning_rate": 0.03,
  "mine__batch_size": 2,
  "evaluate__batch_size": 8,
  "judge__num_bootstrap": 200,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return campaign.make_config(80, 0, **TINY), tmp_path_factory.mktemp("never_worse") / "base"


@pytest.mark.parametrize("judge,right", [("reversed", 0.0), ("large", 0.656)])
def test_a_judge_that_makes_the_model_worse_does_not_reach_the_user(base, tmp_path, judge, right):
  """The second is right in most pairs, which 8 cases do not show to the gate, but biased."""
  changes = {"num_steps": 24, "eval_every_steps": 12, "batch_size": 8, "learning_rate": 3e-3}
  changes = {f"finetune__{name}": value for name, value in changes.items()}
  cell = campaign.run_cell(base, tmp_path / judge, judge, **changes)
  assert cell.base > 0.3 and cell.gate == "refuses" and cell.right.startswith(f"{right:.3f}")
  assert cell.last < cell.base - campaign.TOLERANCE  # it did harm
  assert cell.delivered >= cell.base - campaign.TOLERANCE
