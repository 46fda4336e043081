"""What is measured before mining: a base that finds nothing is refused."""

import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.mining import judge_gate
from rndpo_jax.stages import measure_judges


def test_base_without_any_foreground_is_refused_before_mining():
  judge_gate.check_foreground(np.array([False, True, False]), "val")
  with pytest.raises(errors.MiningError, match="no foreground in any of 3 .*num_steps"):
    judge_gate.check_foreground(np.zeros(3, bool), "val")


def test_base_and_proposals_are_of_the_same_images():
  """The second image has no proposal: headroom is 0.6 - 0.5, whatever the base makes of it."""
  found = measure_judges.proposal_figures(
    {
      "truth": np.array([[0.4, 0.6, 0.9], [0.1, 0.1, 0.1]], np.float32),
      "present": np.array([[True, True, False], [False, False, False]]),
      "base": np.array([0.5, 0.9], np.float32),
      "diversity": np.array([0.7, np.nan], np.float32),
    }
  )
  wanted = {"diversity": 0.7, "base_dice": 0.5, "mean_dice": 0.5, "best_dice": 0.6}
  assert {name: found[name] for name in wanted} == pytest.approx(wanted)
