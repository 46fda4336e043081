"""Phases: each starts from the result of the one before; a job of them resumes and is evaluated."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import acdc, folder, ph2, quickstart, recipes
from rndpo_jax import config as config_lib
from rndpo_jax import pipeline
from rndpo_jax.checks import config_checks
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import metrics
from rndpo_jax.runtime import files
from rndpo_jax.stages import phases, reliable
from rndpo_jax.training import checkpoint

FIRST = {
  "finetune.terms.preference.weight": 0.0,
  "finetune.terms.labelled.weight": 1.0,
  "finetune.terms.weak_to_strong.weight": 1.0,
  "finetune.ema_decay": 0.5,
  "finetune.num_steps": 3,
}
SECOND = {"finetune.terms.pseudo.weight": 0.1, "finetune.reliable_share": 0.5}


def test_a_phase_has_its_own_values_and_those_of_the_job_for_the_rest():
  config = config_lib.base_config()
  config.finetune.beta = 7.0
  config.phases = ({"finetune.beta": 1.0}, {}, {"finetune.num_steps": 9})
  config.finetune.rounds = 2
  assert config_lib.num_phases(config) == 4
  found = [config_lib.of_phase(config, n) for n in (1, 2, 3, 4)]
  assert [own.finetune.beta for own in found] == [1.0, 7.0, 7.0, 7.0]
  assert [own.finetune.num_steps for own in found] == [300, 300, 9, 9]
  assert [config_lib.num_phases(own) for own in found] == [1, 2, 3, 4]
  # Those before can be had from a phase's own config, which has overwritten the job's values.
  assert config_lib.of_phase(found[3], 1).finetune.num_steps == 300
  assert config_lib.of_phase(found[3]).to_json() == found[3].to_json()
  assert config_lib.of_phase(config).to_json() == found[3].to_json()


@pytest.mark.parametrize(
  "phase,message",
  [
    ({"finetune.betas": 1.0}, r"phases\[1\]: found key 'finetune.betas'"),
    ({"data.num_val": 3}, r"phases\[1\]: found key 'data.num_val', expected a key of augment"),
    ({"finetune.rounds": 2}, r"phases\[1\]: found key 'finetune.rounds'"),
    ({"finetune.beta": "a"}, r"phases\[1\]: finetune.beta"),
    ({"finetune.beta": -1.0}, "finetune.beta: found -1.0"),
    ({"finetune.num_steps": None}, "finetune.num_steps: found None, expected int"),
    ({"judge.compare": (1,)}, r"judge.compare: found \(1,\), expected names"),
    ({"finetune.terms.preference.weight": 0.0}, "terms: every weight is 0"),
    ({"finetune.terms.preference.weight": -1.0}, "preference.weight: found -1.0"),
    ({"finetune.terms.consistency.weight": 1.0}, "ema_decay: found 0.0.*consistency learns"),
    ({"finetune.terms.cross_pseudo.weight": 1.0}, "num_members: found 1.*cross_pseudo trains"),
    (
      {"finetune.terms.labelled.weight": 1.0, "finetune.accumulate_steps": 2},
      "accumulate_steps: found 2, but the terms",
    ),
    (
      {
        "finetune.terms.copy_paste.weight": 1.0,
        "finetune.ema_decay": 0.9,
        "finetune.labelled_batch_size": 4,
      },
      "labelled_batch_size: found 4.*unlabelled_batch_size=8",
    ),
    (
      {"finetune.terms.online.weight": 1.0, "finetune.ema_decay": 0.9}
      | {f"finetune.terms.online.{name}": 0.0 for name in ("noise_scale", "threshold_shift")},
      "terms.online: noise_scale and threshold_shift are 0",
    ),
    ({"finetune.reliable_share": 0.5}, "reliable_share: found 0.5, which nothing reads"),
    ({"finetune.strong": True}, "reference: changed images need an 'online' reference"),
    ({"finetune.terms.pseudo.threshold": 0.4}, "threshold: found 0.4, which nothing reads"),
  ],
)
def test_a_phase_that_cannot_work_is_refused_by_key(phase, message):
  config = config_lib.base_config()
  config.phases = ({}, phase)
  with pytest.raises(ConfigError, match=message):
    config_checks.validate(config)


@pytest.mark.parametrize(
  "first,message",
  [
    ({"judge.learned.num_steps": 100}, "phases: found judge.learned.num_steps 100 and 300"),
    ({"augment.gamma": 0.07}, "phases: found augment.gamma 0.07 and"),
    (  # not trained there
      {"judge.learned.num_steps": 100, "judge.compare": ("agreement",)},
      "judge.learned.num_steps: found 100, which nothing reads",
    ),
    ({"augment.gamma": 0.07, **FIRST}, None),
  ],
)
def test_phases_share_one_learned_judge(first, message):
  config = config_lib.base_config()
  config.judge.compare = ("agreement", "learned")
  config.finetune.augment, config.finetune.reference = True, "online"
  config.phases = (first, {})
  if message is None:
    return config_checks.validate(config)
  with pytest.raises(ConfigError, match=f"config.{message}"):
    config_checks.validate(config)


@pytest.mark.parametrize("phases", [(), ({"finetune.num_steps": 50}, {})])
def test_reliable_images_are_told_by_checkpoints_of_a_phase_before(phases):
  config = config_lib.base_config()
  config.finetune.terms.entropy.weight = 1.0
  config.finetune.reliable_share = 0.5
  config.phases = phases
  with pytest.raises(ConfigError, match="reliable_share: found 0.5, but it is told by two or more"):
    config_checks.validate(config)


def test_reliable_images_need_checkpoints_of_what_a_gate_leaves_before_them():
  config = config_lib.base_config()
  config.finetune.terms.entropy.weight = 1.0
  short = {**FIRST, "finetune.num_steps": 50}  # one checkpoint, where the next phase has six
  config.phases = (short, {}, {"finetune.reliable_share": 0.5})
  with pytest.raises(ConfigError, match="two or more checkpoints .* gate may leave it out"):
    config_checks.validate(config)
  config.judge.gate.action = "warn"
  config_checks.validate(config)


def test_a_second_network_is_trained_in_the_first_phase_alone():
  both = {"finetune.terms.cross_pseudo.weight": 1.0}
  config = config_lib.base_config()
  config.base.num_members = 2
  config.phases = (both, {"finetune.terms.cross_pseudo.weight": 0.0})
  config_checks.validate(config)
  config.phases = ({"finetune.terms.cross_pseudo.weight": 0.0}, both)
  with pytest.raises(ConfigError, match="cross_pseudo: the second network .* is not kept"):
    config_checks.validate(config)
  config.phases = ()
  config.finetune.terms.cross_pseudo.weight = 1.0
  config_checks.validate(config)
  config.finetune.rounds = 2
  with pytest.raises(ConfigError, match="cross_pseudo: the second network .* is not kept"):
    config_checks.validate(config)


def test_reliable_images_are_whole_ones_on_one_grid():
  config = config_lib.base_config()
  config.finetune.terms.entropy.weight = 1.0
  config.data.spacing, config.data.patch_size = (1.0, 1.0), (64, 64)
  config.phases = ({}, {"finetune.reliable_share": 0.5})
  message = "reliable_share: found 0.5, but with config.data.spacing a step is shown patches"
  with pytest.raises(ConfigError, match=message):
    config_checks.validate(config)
  config.data.spacing = config.data.patch_size = ()
  config_checks.validate(config)


def test_stability_is_the_agreement_with_the_last_and_the_best_share_stays():
  images = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
  params = np.random.default_rng(1).normal(size=(3, 2, 3)).astype(np.float32)
  found = reliable.stability(lambda p, x: x @ p, params, images, 3)
  masks = [np.argmax(images @ p, -1) for p in params]
  for row in range(3):
    dice = [np.mean(metrics.dice(masks[n][row], masks[2][row], 3, 2)) for n in (0, 1)]
    np.testing.assert_allclose(found[row], np.mean(dice), rtol=1e-6)
  places = np.array([5, 7, 8, 9])
  np.testing.assert_array_equal(
    reliable.most_stable(places, np.array([0.3, 0.9, 0.1, 0.9]), 0.5), [7, 9]
  )
  assert reliable.most_stable(places, np.array([0.3, 0.2, 0.4, 0.1]), 0.1).tolist() == [8]


def test_every_recipe_is_of_use_on_every_data_set():
  for name in recipes.names():
    for module in (quickstart, ph2, acdc, folder):
      config = module.get_config(name)
      if config.data.source != "phantom":
        config.data.root = "/data"
      config_checks.validate(config)
  with pytest.raises(ConfigError, match="unknown recipe 'rn_dop'; known: consensus, copy_paste"):
    ph2.get_config("rn_dop")


def test_what_a_phase_changes_is_not_for_the_base(tiny_config, tmp_path, monkeypatch):
  config, seen = tiny_config(), {}
  online = {"finetune.augment": True, "finetune.reference": "online"}
  config.phases = ({"augment.affine": 0.5, **online},)

  def remember(name):
    def run(given, workdir):
      seen[name] = given.augment.affine
      files.write_text(epath.Path(workdir) / pipeline.DONE[name], "")

    return run

  for name in ("prepare", "base", "finetune"):
    monkeypatch.setitem(pipeline.RUNNERS, name, remember(name))
  pipeline.run(config, tmp_path, ("prepare", "base"))
  for path in (pipeline.DONE["mine"], *pipeline.ALSO["mine"]):
    files.write_text(tmp_path / path, "{}")
  pipeline.run(config, tmp_path, ("finetune",))
  assert seen["base"] == 0.0 and seen["finetune"] == 0.5


def read_phase(config, workdir, number, dataset):
  own = config_lib.of_phase(config, number)
  return phases.start(own, workdir, dataset)


def test_a_job_of_two_phases(tiny_run, tiny_config, tmp_path):
  base_workdir = tiny_run[1]
  config = tiny_config(
    base__workdir=str(base_workdir),
    finetune__num_steps=4,
    finetune__eval_every_steps=2,
    judge__gate__action="off",
  )
  config.phases = (FIRST, SECOND)
  pipeline.run(config, tmp_path, ("base", "mine", "finetune", "evaluate", "report"))
  workdir = epath.Path(tmp_path)
  assert not (workdir / "phase-1" / "pairs").exists()  # none of its terms reads pairs
  results = files.read_json(workdir / "results.json")
  assert [point["step"] for point in results["curve"]] == [0, 2, 3, 5, 7]
  assert results["finetuned"]["step"] == 7 and results["delivered"]["step"] in (0, 2, 3, 5, 7)
  dataset = dataset_lib.open_dataset(config, workdir)
  starts = [read_phase(config, workdir, number, dataset) for number in (1, 2)]
  folder = workdir / "phase-1" / "finetune"
  last = checkpoint.restore_params(folder / "params", 3, stage_directory=folder)
  jax.tree.map(np.testing.assert_array_equal, starts[1], last)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *starts)
  assert max(jax.tree.leaves(moved)) > 0
  # The second is mined by the first one's result, and says so; its h starts at 0.
  made = files.read_json(workdir / "pairs" / "fingerprints.json")
  assert made["base"] != files.read_json(base_workdir / "pairs" / "fingerprints.json")["base"]
  # Half of its unlabelled images are those on which the first one's two checkpoints agree most.
  found = files.read_json(workdir / "finetune" / "reliable.json")["stability"]
  assert len(found) == len(dataset.splits["unlabelled"]) and all(0 <= x <= 1 for x in found)
  own = reliable.shown_to(config_lib.of_phase(config), workdir, workdir / "finetune", dataset)
  expected = reliable.most_stable(dataset.splits["unlabelled"], np.array(found), 0.5)
  np.testing.assert_array_equal(own.splits["unlabelled"], expected)
  harm = files.read_json(workdir / "evaluate" / "harm.json")
  assert [point["step"] for point in harm["curve"]] == [3, 5, 7]
  # A lost second phase is made again from the first, which stays, bit for bit.
  kept = (workdir / "phase-1" / "finetune" / "done.json").stat().mtime
  before = checkpoint.restore_params(
    workdir / "finetune" / "params", 4, stage_directory=workdir / "finetune"
  )
  (workdir / "finetune").rmtree()
  pipeline.run(config, tmp_path, ("mine", "finetune"))
  after = checkpoint.restore_params(
    workdir / "finetune" / "params", 4, stage_directory=workdir / "finetune"
  )
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert (workdir / "phase-1" / "finetune" / "done.json").stat().mtime == kept
