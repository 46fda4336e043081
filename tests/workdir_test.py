"""workdir: which configs go on with a work directory, and with the base of another one."""

import json
import re
import sys

import pytest

from rndpo_jax import errors, pipeline, workdir
from rndpo_jax.runtime import files


@pytest.fixture
def claimed(tiny_config, tmp_path):
  """A work directory that is claimed and started."""
  workdir.claim(tiny_config(), tmp_path / "run", started=False, prepared=False)
  return tmp_path / "run"


def test_another_config_in_the_same_workdir_raises_naming_the_keys(claimed, tiny_config):
  changed = tiny_config(finetune__beta=3.0, data__size=(24, 24))
  with pytest.raises(errors.ConfigError) as error:
    workdir.claim(changed, claimed, started=True, prepared=True)
  assert "config.finetune.beta: was 10.0, is 3.0" in str(error.value)
  assert "config.data.size: was [16, 16], is [24, 24]" in str(error.value)
  workdir.claim(changed, claimed, started=False, prepared=False)  # no stage was begun


@pytest.mark.parametrize("content", [None, "{"])
def test_a_lost_config_raises_whatever_the_new_one_is(claimed, tiny_config, content):
  (claimed / "config.json").unlink()
  if content:
    (claimed / "config.json").write_text(content)
  for changes in ({}, {"seed": 9}):
    with pytest.raises(errors.ConfigError, match="config.json is missing or damaged.*bring it"):
      workdir.claim(tiny_config(**changes), claimed, started=True, prepared=True)
  workdir.claim(tiny_config(), claimed, started=False, prepared=False)
  assert files.read_json(claimed / "config.json")["config"]["seed"] == 0


def test_a_process_that_does_not_share_the_workdir_raises(claimed, tiny_config, tmp_path):
  workdir.check_shared(tiny_config(), claimed)
  with pytest.raises(errors.ConfigError, match="process 0 does not see .*config.json"):
    workdir.check_shared(tiny_config(), tmp_path)
  with pytest.raises(errors.ConfigError, match="config.seed: was 0, is 1"):
    workdir.check_shared(tiny_config(seed=1), claimed)


def test_keys_that_cannot_change_results_may_differ_and_are_written(claimed, tiny_config):
  today = {
    "mesh.fsdp": 2,
    "data.num_workers": 3,
    "data.prefetch": 1,
    "data.root": "/moved",
    "base.keep_checkpoints": 1,
    "base.checkpoint_minutes": 5.0,
    "judge.gate.action": "warn",
    "finetune.keep_checkpoints": 3,
    "finetune.checkpoint_minutes": 0.5,
  }
  assert set(workdir.OPERATIONAL) == {
    re.sub(r"(mesh|judge.gate)\..*", r"\1", name) for name in today
  }
  before = files.read_json(claimed / "config.json")
  config = tiny_config(**{name.replace(".", "__"): value for name, value in today.items()})
  workdir.claim(config, claimed, started=True, prepared=True)
  after = files.read_json(claimed / "config.json")
  assert after["config"] == json.loads(config.to_json_best_effort()) != before["config"]
  assert after["command"] == before["command"]


def test_another_root_raises_until_the_data_are_prepared(claimed, tiny_config):
  moved = tiny_config(data__root="/moved")
  with pytest.raises(errors.ConfigError, match="config.data.root: was '', is '/moved'"):
    workdir.claim(moved, claimed, started=True, prepared=False)
  workdir.claim(moved, claimed, started=True, prepared=True)
  with pytest.raises(errors.ConfigError, match="config.finetune.log_every_steps: was 1, is 2"):
    workdir.claim(tiny_config(finetune__log_every_steps=2), claimed, started=True, prepared=True)


def test_a_moved_base_is_accepted_and_another_config_of_it_raises(claimed, tiny_config):
  def claim(path):
    workdir.claim(tiny_config(base__workdir=path), claimed, started=True, prepared=True)

  with pytest.raises(errors.ConfigError, match="config.base.workdir: was '', is '/there'"):
    claim("/there")
  workdir.claim(tiny_config(base__workdir="/there"), claimed, started=False, prepared=False)
  claim("/moved")
  assert files.read_json(claimed / "config.json")["config"]["base"]["workdir"] == "/moved"
  with pytest.raises(errors.ConfigError, match="config.base.workdir: was '/moved', is ''"):
    claim("")


def test_a_base_of_another_seed_or_augmentation_is_printed(claimed, tiny_config, capsys):
  def said(**changes):
    workdir.check_same_base(tiny_config(base__workdir=str(claimed), **changes))
    return capsys.readouterr().out

  assert said(data__num_workers=2, base__num_members=2, augment__flip=0.0) == ""
  assert f"the base is that of {claimed}" in (out := said(seed=1)) and "seed: was 0, is 1" in out
  with pytest.raises(errors.ConfigError, match="config.base.learning_rate: was 0.05, is 0.5"):
    said(base__learning_rate=0.5)
  workdir.claim(tiny_config(base__augment=True), claimed, started=False, prepared=False)
  assert "config.augment.flip: was 0.5, is 0.0" in said(base__augment=True, augment__flip=0.0)


def test_an_option_newer_than_the_folder_counts_as_its_default(claimed, tiny_config):
  path = claimed / "config.json"
  content = files.read_json(path)
  del content["config"]["base"]["fold"], content["config"]["strong"]
  path.write_text(json.dumps(content))
  workdir.check_same_base(tiny_config(base__workdir=str(claimed)))
  with pytest.raises(errors.ConfigError, match="config.base.fold: was '0', is '1'"):
    workdir.check_same_base(tiny_config(base__workdir=str(claimed), base__fold="1"))
  with pytest.raises(errors.ConfigError, match="config.strong.gamma: was 0.5, is 0.9"):
    workdir.claim(tiny_config(strong__gamma=0.9), claimed, started=True, prepared=True)
  workdir.claim(tiny_config(), claimed, started=True, prepared=True)


@pytest.mark.parametrize(
  "module,expected",
  [
    ("launch.sweep", "python -m launch.sweep --betas=1,2"),
    ("pytest.__main__", "python -m pytest --betas=1,2"),
    (None, "python /script --betas=1,2"),
  ],
)
def test_the_command_is_that_of_the_program(monkeypatch, module, expected):
  class Program:
    class __spec__:  # noqa: N801, its name in every module
      name = module

  if module is None:
    Program.__spec__ = None
  monkeypatch.setitem(sys.modules, "__main__", Program)
  monkeypatch.setattr(sys, "argv", ["/script", "--betas=1,2"])
  assert workdir.environment()["command"] == expected


def test_what_only_other_stages_need_is_not_checked(tiny_config):
  config = tiny_config(base__batch_size=12)
  with pytest.raises(errors.ConfigError, match="config.base.batch_size: found 12"):
    pipeline.check_here(config)
  pipeline.check_here(config, ("mine", "finetune"))
  pipeline.check_here(tiny_config(base__batch_size=12, base__workdir="/other"))
  config = tiny_config(
    finetune__batch_size=12,
    judge__compare=("learned", "no_module:judge"),
    judge__learned__batch_size=12,
  )
  pipeline.check_here(config, ("base", "report"))
  with pytest.raises(errors.ConfigError, match="config.judge: .*no_module"):
    pipeline.check_here(tiny_config(judge__compare=("no_module:judge",)), ("mine",))
