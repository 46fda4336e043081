"""The whole job on a tiny phantom: its files, skipping, refusals, resume, and blindness."""

import html
import math
import os
import shutil

import jax
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.data.sources import phantom
from rndpo_jax.pairs import shards
from rndpo_jax.report import summary
from rndpo_jax.runtime import files, preemption
from rndpo_jax.training import metric_writer


def tree_bytes(directory):
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file() and "tensorboard" not in path.parts
  }


def test_results_hold_what_the_contract_says(tiny_run):
  config, workdir = tiny_run
  results = files.read_json(workdir / "results.json")
  assert results["dataset"] == "phantom" and results["objective"] == "rn_dpo"
  assert results["num_labelled_cases"] == 4 and results["seed"] == config.seed
  for model in ("base", "finetuned", "selected"):
    for split in ("val", "test"):
      # Far from good, yet no empty masks: equal results would say little of those.
      assert 0.1 < results[model][split]["dice"] < 1
  assert [row["step"] for row in results["curve"]] == [0, 4, 8]
  assert results["curve"][-1]["test_dice"] == results["finetuned"]["test"]["dice"]
  assert set(results["sustained"]) >= {
    "peak", "final", "last_third_mean", "fraction_above_base", "drop_from_peak",
  }  # fmt: skip
  assert set(results["judges"]) == {"agreement", "confidence", "entropy"}
  for judge in results["judges"].values():
    # Measured on other images, so of other figures.
    assert judge["split"] == "val" and judge["kendall_tau"] != judge["labelled"]["kendall_tau"]
  assert results["pairs"]["count"] == files.read_json(workdir / "pairs/manifest.json")["num_pairs"]
  assert (workdir / "report.html").read_text().startswith("<!doctype html>")
  environment = files.read_json(workdir / "config.json")
  assert environment["versions"]["jax"] == jax.__version__ and environment["num_devices"] == 8


def test_summary_shows_base_finetuned_judges_and_pairs(tiny_run):
  _, workdir = tiny_run
  results = files.read_json(workdir / "results.json")
  text = summary.text(workdir)
  assert f"{results['finetuned']['test']['dice']:.4f}" in text
  assert "agreement" in text and f"{results['pairs']['count']} pairs of " in text
  # The same on the terminal, in results.json and on the page.
  page = html.unescape((workdir / "report.html").read_text())
  for warning in results["warnings"]:
    assert f"warning: {warning}" in text.splitlines() and warning in page
  assert len(results["warnings"]) == text.count("warning: ") > 0


def test_first_step_starts_at_log_two(tiny_run):
  _, workdir = tiny_run
  first = metric_writer.read_rows(workdir / "finetune", "train")[0]
  # Cached margins come from another compiled program: equal but for rounding.
  assert first["step"] == 1 and abs(first["loss"] - math.log(2)) < 1e-5
  assert abs(first["h_mean"]) < 1e-3 and abs(first["chosen_log_ratio"]) < 1e-2


def test_done_stages_are_skipped_and_change_nothing(tiny_run, capsys):
  config, workdir = tiny_run
  before = tree_bytes(workdir)
  pipeline.run(config, workdir)
  assert capsys.readouterr().out.count("done before") == 6
  assert tree_bytes(workdir) == before


def test_stages_out_of_order_or_unknown_raise(tiny_config, tmp_path):
  with pytest.raises(errors.ConfigError, match="'mine' needs .*selected.json.*'base' first"):
    pipeline.run(tiny_config(), tmp_path / "a", ["mine"])
  with pytest.raises(errors.ConfigError, match="unknown stage 'mining'"):
    pipeline.run(tiny_config(), tmp_path / "b", ["mining"])


def test_workdir_that_cannot_be_written_raises(tiny_config, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.ConfigError, match="--workdir: .*file/run cannot be written"):
    pipeline.run(tiny_config(), tmp_path / "file" / "run")


MEASURED = config_lib.STAGES[:-1]  # without the report, which takes longer than some stages


def copy_without(workdir, copy, *lost):
  """A copy before the evaluation, without the files and folders `lost` either."""
  lost += ("evaluate", "results.json", "report.html")
  ignore = lambda folder, _: lost if folder == str(workdir) else ()  # noqa: E731
  return shutil.copytree(workdir, copy, ignore=ignore)


def test_signal_then_corrupt_state_then_lost_manifest_end_with_the_same_results(
  tiny_run, tmp_path, monkeypatch, capsys
):
  config, undisturbed = tiny_run
  workdir = copy_without(undisturbed, tmp_path / "run", "finetune")
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "reached", lambda step: step == 6)
    with pytest.raises(preemption.Preempted, match="finetune: saved at step 6"):
      pipeline.run(config, workdir, MEASURED)
  written = workdir / "finetune" / "state" / "6" / "ocdbt.process_0" / "d"
  largest = max(written.iterdir(), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(bytes(content))
  (workdir / "pairs" / "manifest.json").unlink()
  pipeline.run(config, workdir, MEASURED)
  assert "6 cannot be read; going back to that of step 4" in capsys.readouterr().out
  assert (workdir / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def test_missing_files_of_a_finished_stage_are_made_again(tiny_run, tmp_path):
  """By the remedy that the program itself names."""
  config, undisturbed = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  before = tree_bytes(workdir)
  (workdir / "pairs" / "judges.json").write_text("{")
  (workdir / "results.json").unlink()
  with pytest.raises(errors.FileError, match="judges.json: no valid JSON .*; delete it and run"):
    pipeline.run(config, workdir)
  (workdir / "pairs" / "judges.json").unlink()
  pipeline.run(config, workdir, MEASURED)
  assert tree_bytes(workdir) == before
  for name in ("evaluate/gallery.npz", "pairs/examples.npz"):
    content = (workdir / name).read_bytes()
    (workdir / name).write_bytes(content[: len(content) // 2])
    (workdir / "report.html").unlink(missing_ok=True)
    with pytest.raises(errors.FileError, match=f"{name}: cannot be read .*; delete it and run"):
      pipeline.run(config, workdir)
    (workdir / name).unlink()
    if name.startswith("evaluate"):  # the stage before
      with pytest.raises(errors.ConfigError, match=f"needs .*{name}, which is missing"):
        pipeline.run(config, workdir, ["report"])
      pipeline.run(config, workdir, MEASURED)
  pipeline.run(config, workdir)
  assert tree_bytes(workdir) == before


def test_lost_metrics_do_not_change_the_selected_base(tiny_run, tmp_path):
  config, undisturbed = tiny_run
  workdir = copy_without(undisturbed, tmp_path / "run", "pairs", "finetune")
  for name in ("selected.json", "metrics.jsonl"):
    (workdir / "base" / name).unlink()
  with pytest.raises(errors.FileError, match=r"steps \[\], expected \[20, 40\]; bring it back, or"):
    pipeline.run(config, workdir)
  shutil.rmtree(workdir / "base")
  pipeline.run(config, workdir, ["base"])
  for name in ("selected.json", "metrics.jsonl"):
    assert (workdir / "base" / name).read_bytes() == (undisturbed / "base" / name).read_bytes()


def test_unlabelled_masks_never_matter(tiny_run, tmp_path, monkeypatch):
  config, clean = tiny_run
  unlabelled = set(files.read_json(clean / "splits.json")["unlabelled"])
  assert len(unlabelled) == 20
  real = phantom.draw

  def poisoned(seed, **options):
    image, mask = real(seed, **options)
    if f"phantom_{seed[1]:04d}" in unlabelled:
      mask = np.random.default_rng(9).integers(0, 2, mask.shape).astype(np.uint8)
    return image, mask

  monkeypatch.setattr(phantom, "draw", poisoned)
  pipeline.run(config, tmp_path, MEASURED)
  assert (tmp_path / "results.json").read_bytes() == (clean / "results.json").read_bytes()
  # The poison did reach the records, so the masks were there to be read.
  assert tree_bytes(tmp_path / "data") != tree_bytes(clean / "data")


def test_a_run_that_could_not_start_leaves_its_workdir_to_the_corrected_command(
  tiny_config, tmp_path
):
  with pytest.raises(errors.DataError, match="num_labelled"):
    pipeline.run(tiny_config(data__num_labelled=500), tmp_path, ["prepare"])
  pipeline.run(tiny_config(), tmp_path, ["prepare"])
  (tmp_path / "splits.json").unlink()
  pipeline.run(tiny_config(), tmp_path, ["prepare"])
  assert (tmp_path / "splits.json").exists()


def test_base_of_another_workdir_gives_the_same_job(tiny_run, tiny_config, tmp_path):
  _, first = tiny_run
  pipeline.run(tiny_config(base__workdir=str(first)), tmp_path, MEASURED)
  assert (tmp_path / "results.json").read_bytes() == (first / "results.json").read_bytes()
  other = tiny_config(base__workdir=str(first), model__width=4, data__num_val=2)
  with pytest.raises(errors.ConfigError, match="config.data.num_val.*config.model.width"):
    pipeline.run(other, tmp_path / "other")
  with pytest.raises(errors.ConfigError, match="config.base.workdir"):
    pipeline.run(tiny_config(base__workdir=str(tmp_path / "nowhere")), tmp_path / "second")


def test_online_reference_with_augmentation_starts_at_log_two(tiny_run, tiny_config, tmp_path):
  _, first = tiny_run
  before = tree_bytes(first / "base")
  config = tiny_config(
    base__workdir=str(first),
    finetune__augment=True,
    finetune__reference="online",
    finetune__num_steps=4,
  )
  pipeline.run(config, tmp_path, ["base", "mine", "finetune"])
  rows = metric_writer.read_rows(tmp_path / "finetune", "train")
  # XLA fuses the two forward passes each in its own way: equal but for rounding of the sums.
  assert abs(rows[0]["loss"] - math.log(2)) < 1e-5
  assert abs(rows[0]["h_mean"]) < 1e-3 and abs(rows[0]["chosen_log_ratio"]) < 1e-2
  assert abs(rows[-1]["h_mean"]) > 0.01  # the policy has left the reference, which stood still
  assert tree_bytes(first / "base") == before


def test_no_pairs_left_names_the_filter(tiny_run, tiny_config, tmp_path):
  _, first = tiny_run
  config = tiny_config(base__workdir=str(first), mine__min_region_size=10_000)
  with pytest.raises(errors.MiningError, match="left no pair.*region_size [1-9]"):
    pipeline.run(config, tmp_path)
  assert not (tmp_path / "pairs" / "manifest.json").exists()


def test_corrupt_files_are_named_and_made_again_alone(tiny_run, tmp_path):
  """By the remedy of each: parameters, one of them gone, a byte of a shard, half of it, none."""
  config, first = tiny_run
  workdir = copy_without(first, tmp_path / "run")
  params = workdir / "finetune" / "params"
  (params / "4" / "_METADATA").write_text("{")
  with pytest.raises(errors.CheckpointError, match="params/4 .*Delete the folder .*finetune "):
    pipeline.run(config, workdir)
  shutil.rmtree(params / "4")
  with pytest.raises(errors.CheckpointError, match=r"steps \[8\], expected \[4, 8\]"):
    pipeline.run(config, workdir)
  shutil.rmtree(workdir / "finetune")
  paths = [shards.shard_path(workdir / "pairs", n, 2) for n in range(2)]
  good = paths[1].read_bytes()
  for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2]):
    paths[1].write_bytes(bad)
    with pytest.raises(errors.PairsError, match=f"{paths[1].name} is corrupt.*delete"):
      pipeline.run(config, workdir)
  paths[1].unlink()
  with pytest.raises(errors.PairsError, match=f"{paths[1].name} is missing.*delete"):
    pipeline.run(config, workdir)
  shards.summary_path(paths[1]).unlink()
  (workdir / "pairs" / "manifest.json").unlink()
  untouched = os.stat(paths[0]).st_mtime_ns
  pipeline.run(config, workdir, MEASURED)
  assert paths[1].read_bytes() == good and os.stat(paths[0]).st_mtime_ns == untouched
  assert (workdir / "results.json").read_bytes() == (first / "results.json").read_bytes()
