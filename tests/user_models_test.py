"""user_models: a network of one's own, as on the page, goes through base and mining."""

import re
import sys
import textwrap

import pytest
from readme_test import ROOT

from rndpo_jax import errors, pipeline
from rndpo_jax.pairs import shards

PAGE = ROOT / "rndpo_jax" / "models" / "README.md"
SOURCE = """
  def raises(model_config, *, num_classes, spatial_dims):
    raise KeyError("weights.npz")

  def returns_none(model_config, *, num_classes, spatial_dims):
    return None

  def no_classes(model_config):
    return None
"""


@pytest.fixture
def clinic(tmp_path, monkeypatch):
  block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
  assert len(block.splitlines()) <= 30
  (tmp_path / "my_network.py").write_text(block)
  (tmp_path / "broken_networks.py").write_text(textwrap.dedent(SOURCE))
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in ("my_network", "broken_networks"):
    sys.modules.pop(name, None)


def test_the_network_of_the_page_is_trained_and_mined_from(clinic, tiny_config, tmp_path):
  config = tiny_config(model__name="my_network:build", base__num_steps=100)
  pipeline.run(config, tmp_path / "work", ["prepare", "base", "mine"])
  assert len(list(shards.read(tmp_path / "work" / "pairs"))) > 10


@pytest.mark.parametrize(
  "name,message",
  [
    ("broken_networks:raises", r"raised KeyError: 'weights.npz' \(broken_networks.py, line \d+\)$"),
    ("broken_networks:returns_none", "returned NoneType, expected rndpo_jax.types.Segmenter"),
    ("broken_networks:no_classes", r"it takes \(model_config\), expected \(model_config, \*, num"),
    ("no_such_module:build", "No module named 'no_such_module'; expected package.module:function"),
  ],
)
def test_what_is_no_network_is_one_line_before_anything_runs(clinic, tiny_config, name, message):
  with pytest.raises(errors.ConfigError, match=f"^config.model.name: '{name}':? {message}"):
    pipeline.check_here(tiny_config(model__name=name))
