"""A dry run against what a run leaves, and its refusals."""

import math
import re

import jax
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.planning import (
  cost,
  data_set,
  dry_run,
  program_inputs,
  programs,
  roofline,
  storage,
  timing,
)
from rndpo_jax.runtime import files, multihost, sharding
from rndpo_jax.stages import prepare
from rndpo_jax.training import checkpoint


@pytest.fixture(scope="module")
def tried(tiny_run):
  """The lines of a dry run of the tiny run's config, and the programs' trials."""
  config, workdir = tiny_run
  kept = {}

  def keep(*arguments):
    kept["trials"] = original(*arguments)
    return kept["trials"]

  original = timing.try_programs
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, "try_programs", keep)
    return dry_run.run(config, workdir), kept["trials"]


def test_pairs_take_the_bytes_that_were_planned(tiny_run, tried):
  config, workdir = tiny_run
  manifest = files.read_json(workdir / "pairs" / "manifest.json")
  record = dry_run.example_record(tried[1]["mine"].out_info)
  found = storage.planned(config, data_set.describe_data(config, workdir), _params(workdir), record)
  # Every record that was written is as large as planned; the plan counts images without pairs too.
  written = sum(entry["count"] for entry in manifest["shards"])
  assert found.pairs * written == manifest["num_bytes"] * manifest["num_images"]


def test_checkpoints_take_what_was_planned(tiny_run, tried):
  config, workdir = tiny_run
  record = dry_run.example_record(tried[1]["mine"].out_info)
  data = data_set.describe_data(config, workdir)
  planned = storage.planned(config, data, _params(workdir), record)
  params = sum(x.nbytes for x in jax.tree.leaves(_params(workdir)))
  kept = {
    (part, kind): len(list((workdir / part / kind).iterdir()))
    for part in ("base", "finetune")
    for kind in ("params", "state")
  }
  # The base's best parameters may be its last.
  assert kept["base", "params"] <= 2
  # A state is parameters and two moments.
  assert planned.base == params * (2 + 3 * kept["base", "state"])
  assert planned.finetune == params * (kept["finetune", "params"] + 3 * kept["finetune", "state"])


def test_printed_lines(tiny_run, tried):
  lines = "\n".join(tried[0])
  assert "8 of kind cpu, 1 process; mesh: data 8" in lines
  assert (
    "4 labelled, 20 unlabelled, 3 val, 3 test; 1 channels, 2 classes, taken at 16 x 16" in lines
  )
  assert "at most 40: 2 an image, of 4 proposals" in lines
  batches = {
    row[0]: row[-3] for row in (re.split(r"  +", line) for line in tried[0]) if len(row) == 7
  }
  # 20 images in two shards of 10, eight devices of one image each: 2 batches a shard. Validation
  # 2 + 2 times on 3 images, then 3 checkpoints, and the base by RankSEG, on 6 images.
  assert (batches["base"], batches["mine"], batches["finetune"]) == ("40", "4", "8")
  assert (batches["validate"], batches["evaluate"]) == ("4", "4")
  assert batches["measure"] == "2" and "judge" not in batches  # validation, labelled split
  # Images of 20 x 18 pixels, up to the next multiple of 64.
  assert tried[1]["resize"].out_info.shape[1:] == (64, 64) and batches["resize"] == "4"


def test_every_program_of_a_config_is_tried_and_no_other(tiny_config):
  config = tiny_config(
    judge__compare=("learned",), base__num_members=2, evaluate__metrics=("dice", "hd95")
  )
  sizes = timing.batch_sizes(config, sharding.make_mesh())
  assert sizes["judge"] == config.judge.learned.batch_size and sizes["measure"] == sizes["mine"]
  trials = {name: timing.Trial(size, 0, 0.0, None) for name, size in sizes.items()}
  images = {"labelled": 4, "unlabelled": 20, "val": 3, "test": 3}
  data = data_set.Data(None, images, 30, 30 * 720, None, None, num_unpacked=70)
  found = dry_run.num_batches(config, data, trials)
  assert found["base"] == 80 and found["judge"] == config.judge.learned.num_steps
  # Three checkpoints, the base by RankSEG, and three times one more for the distances.
  assert found["evaluate"] == 7
  shape = jax.ShapeDtypeStruct((100,), "float32")
  planned = storage.planned(config, data, {"w": shape}, {"index": 1})
  assert (planned.data, planned.unpacked) == (30 * 720, 70)
  with config.unlocked():
    config.base.workdir = "elsewhere"
  sizes = timing.batch_sizes(config, sharding.make_mesh())
  assert "base" not in sizes
  trials = {name: trials[name] for name in sizes}
  assert "base" not in dry_run.num_batches(config, data, trials)
  planned = storage.planned(config, data, {"w": shape}, {"index": 1})
  assert (planned.data, planned.unpacked) == (0, 0)
  assert planned.base == 2 * 400  # the members' parameters are copied


def test_phases_before_the_last_are_counted_and_tried(tiny_config, monkeypatch):
  first = {"finetune.terms.preference.weight": 0.0, "finetune.terms.labelled.weight": 1.0}
  last = {"finetune.terms.preference.weight": 1.0, "finetune.terms.labelled.weight": 0.0}
  config = tiny_config(
    phases=({**first, "finetune.batch_size": 4, "finetune.num_steps": 6}, last), finetune__rounds=2
  )
  own, mesh, tried = config_lib.of_phase(config), sharding.make_mesh(), []

  def no_program(config, problem, mesh, sizes, shown=""):
    tried.append((sizes, config.finetune.terms.labelled.weight))
    return {name: timing.Trial(size, 0, 0.0, None) for name, size in sizes.items()}

  monkeypatch.setattr(timing, "_try", no_program)
  trials = timing.try_programs(own, None, mesh)
  # The second phase is the last one's round before: its step is compiled once.
  assert tried == [(timing.batch_sizes(own, mesh), 0.0), ({"finetune": 4}, 1.0)]
  assert (trials["phase 1"].batch_size, trials["phase 2"].batch_size) == (4, 8)
  images = {"labelled": 4, "unlabelled": 20, "val": 3, "test": 3}
  data = data_set.Data(None, images, 30, 30 * 720, None, None, num_unpacked=0)
  found = dry_run.num_batches(own, data, trials)
  assert (found["phase 1"], found["phase 2"], found["finetune"]) == (6, 8, 8)
  # Of 20 images, 4 batches a mining; the first phase reads no pairs, but measures the judges.
  assert (found["mine"], found["measure"]) == (2 * 4, 3 * 2)
  # 2, 2 and 2 checkpoints, one more of the base, and the base by RankSEG.
  assert found["evaluate"] == 2 + 2 + 2 + 2
  shape = jax.ShapeDtypeStruct((100,), "float32")
  planned = storage.planned(own, data, {"w": shape}, {"index": 1})
  alone = storage.planned(tiny_config(), data, {"w": shape}, {"index": 1})
  assert planned.pairs == 2 * alone.pairs
  assert planned.finetune == 3 * alone.finetune
  large = {**trials, "phase 1": trials["phase 1"]._replace(memory=9)}
  (line,) = dry_run.refusals(own, large, 8, planned, None)
  assert "config.finetune.batch_size: found 4, with which the program 'phase 1'" in line


def test_memory_of_what_mining_begins_with(tiny_config):
  """The judges measured on the validation split, and the learned one's training."""
  mesh, memory = sharding.make_mesh(), []
  for judges, masks in ((), 4), (("agreement", "confidence", "entropy", "learned"), 32):
    config = tiny_config(
      judge__compare=judges, judge__learned__batch_size=8, judge__learned__masks_per_image=masks
    )
    lowers = programs.programs(
      config, program_inputs.problem_of(config, 1, 0), mesh, {"measure": 16, "judge": 8}
    )
    compiled = {program: lower().compile() for program, lower in lowers.items()}
    memory.append({program: roofline.memory(x) for program, x in compiled.items()})
    assert lowers["measure"]().out_info["truth"].shape == (16, 4)
  few, many = memory
  assert many["measure"] > few["measure"] and many["judge"] > 2 * few["judge"]


def test_several_processes_run_a_program_as_often_as_the_first_says(monkeypatch):
  """Their clocks differ, and they may wait for each other in it."""
  calls, answers = [], iter([1, 1, 1, 0])
  asked = []

  def agree(ask):
    asked.append(ask())
    return next(answers)

  monkeypatch.setattr(multihost, "broadcast", agree)
  monkeypatch.setattr(timing, "_ENOUGH_SECONDS", -1.0)  # this one has had enough after two
  compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()

  class Counted:
    args_info, input_shardings = compiled.args_info, compiled.input_shardings

    def __call__(self, *arguments):
      calls.append(arguments)
      return compiled(*arguments)

  assert timing._seconds(Counted()) > 0
  assert len(calls) == 3 and asked == [True, True, False, False]


def test_finished_files_do_not_count_as_storage_to_come(tiny_run, tried, tmp_path):
  config, workdir = tiny_run
  planned = cost.Storage(data=10**6, unpacked=0, base=10**6, pairs=10**6, finetune=10**6)
  assert sum(storage.to_come(planned, workdir)) == 0  # all is done
  assert storage.to_come(planned, tmp_path) == planned
  (tmp_path / "pairs" / "judge").mkdir(parents=True)
  (tmp_path / "pairs" / "judge" / "part").write_bytes(bytes(1000))
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "selected.json").write_text("{}")
  (tmp_path / "data" / "unpacked-0123").mkdir(parents=True)
  (tmp_path / "data" / "unpacked-0123" / "0-image.npy").write_bytes(bytes(100))
  found = storage.to_come(planned._replace(unpacked=300), tmp_path)
  assert found == planned._replace(data=999_900, unpacked=200, base=0, pairs=999_000)
  assert "; 0 B of it to come; " in "\n".join(tried[0])


def test_nothing_is_written_and_headers_suffice(tiny_config, tmp_path, monkeypatch):
  config = tiny_config()
  monkeypatch.setattr(timing, "try_programs", _no_trials)
  with pytest.raises(_Reached):
    dry_run.run(config, tmp_path / "run")
  assert not list(tmp_path.iterdir())
  data = data_set.describe_data(config, tmp_path / "run")
  assert data.dataset is None
  assert data.num_images == {"labelled": 4, "unlabelled": 20, "val": 3, "test": 3}
  prepare.run(config, tmp_path / "run")
  prepared = data_set.describe_data(config, tmp_path / "run")
  assert prepared.num_images == data.num_images and prepared.problem == data.problem
  # 30 images of 20 x 18 bytes with their masks; stored compressed, with names and affines.
  assert data.num_bytes == 30 * 20 * 18 * 2
  assert prepared.num_bytes == sum(
    path.stat().st_size for path in (tmp_path / "run/data/cases").rglob("*") if path.is_file()
  )


def test_more_images_than_there_are(tiny_run, tried, monkeypatch):
  config, workdir = tiny_run
  monkeypatch.setattr(timing, "try_programs", lambda *_: tried[1])
  lines = "\n".join(dry_run.run(config, workdir, num_unlabelled=10_000_000))
  assert "10,000,000 unlabelled" in lines and "at most 20,000,000" in lines
  assert "mine" in lines and "1,250,000" in lines  # 5,000,000 a shard, 8 at once
  # The size of an image is that of those which are there, and said.
  stored = data_set.describe_data(config, workdir).num_bytes
  assert f"stored with {stored // 30:,} bytes each" in lines
  assert f"data {cost.show_bytes(stored / 30 * 10_000_010)}, " in lines


def test_time_of_preparing_is_estimated_if_it_has_not_run(tiny_config, tiny_run, tried, tmp_path):
  data = data_set.describe_data(tiny_config(), tmp_path)
  found, reading = dry_run._preparing(data, remote=False)
  rate = re.fullmatch(
    r"prepare   [\d.]+ s: ([\d,.]+) records/s in a process, 30 in 1 file, which 1 process writes",
    found,
  )
  assert rate and "not measured" in reading
  assert not list(tmp_path.iterdir())
  more = dry_run._preparing(data_set.with_unlabelled(data, 20_000_000), remote=False)
  # 720 bytes each, and 4 GiB a file.
  assert "20,000,010 in 4 files, which 1 process writes" in more[0]
  config, workdir = tiny_run
  assert dry_run._preparing(data_set.describe_data(config, workdir), remote=False) == []
  assert not any(line.startswith("prepare") for line in tried[0])


def test_images_of_no_split_count_as_stored(tiny_config, tmp_path):
  config = tiny_config()
  config.data.num_unlabelled = 2
  data = data_set.describe_data(config, tmp_path)
  assert data.num_images["unlabelled"] == 2 and data.num_stored == 30
  more = data_set.with_unlabelled(data, 7)
  assert more.num_bytes == 35 * 20 * 18 * 2 and more.num_images["unlabelled"] == 7


def test_error_for_what_does_not_fit_names_the_key(tiny_run, tried, monkeypatch, capsys):
  config, workdir = tiny_run
  monkeypatch.setattr(timing, "try_programs", lambda *_: tried[1])
  monkeypatch.setattr(timing, "memory_limit", lambda: tried[1]["finetune"].memory - 1)
  with pytest.raises(ConfigError, match=r"config.finetune.batch_size: found 8, with which the pro"):
    dry_run.run(config, workdir)
  # Too large to be run, and so without a time.
  unknown = {name: one._replace(seconds=math.nan) for name, one in tried[1].items()}
  monkeypatch.setattr(timing, "try_programs", lambda *_: unknown)
  capsys.readouterr()
  with pytest.raises(ConfigError, match=r"config.finetune.batch_size"):
    dry_run.run(config, workdir)
  lines = capsys.readouterr().out.splitlines()
  rows = {row[0]: row[3:] for row in (re.split(r"  +", line) for line in lines) if len(row) == 7}
  assert rows["mine"] == ["-", "4", "-", "-"] and rows["evaluate"] == ["-", "4", "-", "-"]
  monkeypatch.undo()
  monkeypatch.setattr(timing, "try_programs", lambda *_: tried[1])
  with pytest.raises(ConfigError, match=r"--workdir: needs up to .* TB more, its disk has"):
    dry_run.run(config, workdir, num_unlabelled=10**12)


class _Reached(Exception):
  pass


def _no_trials(*_):
  raise _Reached


def _params(workdir):
  step = files.read_json(workdir / "base" / "selected.json")["step"]
  folder = workdir / "base"
  return checkpoint.restore_params(folder / "params", step, stage_directory=folder)
