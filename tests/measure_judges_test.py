"""What is measured before mining: a base that finds nothing is refused."""

import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.stages import measure_judges


def test_base_without_any_foreground_is_refused_before_mining():
  measure_judges.check_foreground(np.array([False, True, False]), "val")
  with pytest.raises(errors.MiningError, match="no foreground in any of 3 .*num_steps"):
    measure_judges.check_foreground(np.zeros(3, bool), "val")
