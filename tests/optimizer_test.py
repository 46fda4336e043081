"""The optimisers of base and fine-tuning: each of their options acts, values by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax.runtime import files
from rndpo_jax.stages import base, finetune
from rndpo_jax.training import metric_writer

RATE = 0.5
RTOL = 1e-4  # Adam's correction 1 - 0.999**t has no more digits in float32


def steps(stage, gradients, param=2.0, **changes):
  """Each update of one parameter that stays where it is; Adam on equal gradients moves by -rate."""
  options = config_lib.base_config()[stage.__name__.split(".")[-1]]
  options.update(
    {"learning_rate": RATE, "num_steps": 4, "clip_norm": 0.0, "weight_decay": 0.0, **changes}
  )
  optimizer = stage.optimizer(options)
  param = jnp.float32(param)
  state, updates = optimizer.init(param), []
  for gradient in gradients:
    update, state = optimizer.update(jnp.float32(gradient), state, param)
    updates.append(float(update))
  return np.array(updates)


def test_finetuning_rate_is_constant_or_a_cosine_to_zero():
  constant = steps(finetune, [1, 1, 1, 1], schedule="constant")
  np.testing.assert_allclose(constant, [-RATE] * 4, rtol=RTOL)
  cosine = steps(finetune, [1, 1, 1, 1], schedule="cosine")
  expected = -RATE * 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
  np.testing.assert_allclose(cosine, expected, rtol=RTOL)


def test_base_rate_warms_up_then_falls_to_zero():
  found = steps(base, [1] * 7, num_steps=6, warmup_steps=2)
  expected = -RATE * np.array([0, 0.5, 1, *(0.5 * (1 + np.cos(np.pi * np.arange(1, 5) / 4)))])
  np.testing.assert_allclose(found, expected, rtol=RTOL, atol=1e-8)


@pytest.mark.parametrize("stage", [base, finetune])
def test_clipping_is_by_norm_before_adam(stage):
  # Adam alone does not see the scale of a gradient, but it does see that one differs from another.
  clipped = steps(stage, [10, 0.5, 0.5], clip_norm=1.0)
  np.testing.assert_allclose(clipped, steps(stage, [1, 0.5, 0.5]), rtol=RTOL)
  assert abs(clipped - steps(stage, [10, 0.5, 0.5]))[-1] > 0.01


@pytest.mark.parametrize("stage", [base, finetune])
def test_weight_decay_is_apart_from_the_gradient(stage):
  plain, decayed = (steps(stage, [1, 1], weight_decay=decay) for decay in (0.0, 0.1))
  rate = -steps(stage, [1, 1])  # of each step, by its schedule
  np.testing.assert_allclose(decayed, plain - rate * 0.1 * 2.0, rtol=RTOL)


@pytest.mark.parametrize("select,step", [("best", 4), ("last", 6)])
def test_the_base_is_the_best_checkpoint_or_the_last(tmp_path, monkeypatch, select, step):
  dice = {2: 0.5, 4: 0.8, 6: 0.7}
  for saved in dice:
    (tmp_path / "params" / str(saved)).mkdir(parents=True)
    (tmp_path / "params" / str(saved) / "commit_success.txt").touch()
  rows = [f'{{"kind": "val", "step": {s}, "val_dice": {d}}}\n' for s, d in dice.items()]
  (tmp_path / "metrics.jsonl").write_text("".join(rows))
  assert len(metric_writer.read_rows(tmp_path, "val")) == 3
  config = config_lib.base_config()
  config.base.select = select
  base._select(config, epath.Path(tmp_path), "d")
  assert files.read_json(tmp_path / "selected.json")["step"] == step
  kept = sorted(path.name for path in (tmp_path / "params").iterdir())
  assert kept == sorted({str(step), "6"})
