"""Prediction of new cases: evaluation's masks, in the input's format, whatever is beside them."""

import csv
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import nibabel
import numpy as np
import pytest
from etils import epath
from PIL import Image

from rndpo_jax import config as config_lib
from rndpo_jax import errors, models
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.evaluation import cases as cases_lib
from rndpo_jax.evaluation import predict as evaluation_lib
from rndpo_jax.predict import (
  case_files,
  case_reader,
  grid_run,
  inputs,
  output_folder,
  programs,
  score_table,
)
from rndpo_jax.predict import run as run_lib
from rndpo_jax.predict import trained as trained_lib
from rndpo_jax.runtime import files, preemption
from rndpo_jax.stages import evaluate

AFFINE = np.array([[0, -1.5, 0, 7], [2.5, 0, 0, -3], [0, 0, 4, 11], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def network(tiny_run):
  """The last checkpoint, which differs from the base."""
  return trained_lib.load(tiny_run[1], "last")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Equal programs are traced and compiled once for the file."""
  make, made = grid_run.make_predictor, {}

  def make_once(trained, options):
    key = (trained.step, trained.spatial_dims, options._replace(workers=0))
    if key not in made:
      made[key] = make(trained, options)
    return made[key]

  grid_run.make_predictor = make_once
  yield
  grid_run.make_predictor = make


@pytest.fixture(scope="module")
def truth(tiny_run, network):
  """Record index -> (image as it came, the mask that `evaluate` makes), of the test split."""
  config, workdir = tiny_run
  dataset = dataset_lib.open_dataset(config, workdir)
  folder = epath.Path(workdir).parent / "evaluated"
  evaluation = evaluation_lib.open_evaluation(config, dataset, folder, lambda _: network.params)
  masks = evaluation_lib.predict(evaluation, network.params, list(dataset.splits["test"]))
  return {
    index: (dataset_lib.load_native(dataset, index, with_labels=False)["image"], mask)
    for index, mask in masks
  }


def _run(network, source, output, options):
  run_lib.run(grid_run.job(network, options), str(source), output, options)


def _predict(network, source, output, **options):
  """Runs, and returns the rows of the table."""
  output_folder.check(str(source), str(output))
  _run(network, source, output, run_lib.Options(**options))
  with (output / score_table.FILE).open(newline="") as file:
    return list(csv.DictReader(file))


def _write_png(folder, truth):
  folder.mkdir()
  for index, (image, _) in truth.items():
    Image.fromarray(image[..., 0]).save(folder / f"case{index}.png")
  return folder


def _nifti(array, affine=AFFINE):
  image = nibabel.Nifti1Image(array, affine)
  image.set_sform(affine, code="scanner")
  image.set_qform(affine, code="aligned")
  image.header.set_xyzt_units("mm", "sec")
  image.header["cal_max"], image.header["descrip"] = 255, b"by a scanner"
  return image


def test_masks_of_images_are_those_of_evaluate(tmp_path, network, truth):
  rows = _predict(network, _write_png(tmp_path / "in", truth), tmp_path / "out")
  assert [row["case_id"] for row in rows] == [f"case{index}" for index in sorted(truth)]
  assert sum(mask.any() for _, mask in truth.values()) > 0
  for index, (_, mask) in truth.items():
    with Image.open(tmp_path / "out" / f"case{index}.png") as found:
      assert found.mode == "L"
      np.testing.assert_array_equal(np.asarray(found), mask)


def test_slices_of_a_volume_are_those_of_evaluate_under_the_same_header(tmp_path, network, truth):
  volume = np.stack([image[..., 0] for image, _ in truth.values()], axis=-1)
  (tmp_path / "in").mkdir()
  nibabel.save(_nifti(volume), tmp_path / "in" / "a_0000.nii.gz")
  _predict(network, tmp_path / "in", tmp_path / "out")
  found = nibabel.load(tmp_path / "out" / "a.nii.gz")
  want = np.stack([mask for _, mask in truth.values()], axis=-1)
  np.testing.assert_array_equal(np.asarray(found.dataobj), want)
  assert found.get_data_dtype() == np.uint8
  for get in ("get_sform", "get_qform"):
    affine, code = getattr(found, get)(coded=True)
    np.testing.assert_array_equal(affine, getattr(_nifti(volume), get)())
    assert code == {"get_sform": 1, "get_qform": 2}[get]
  assert found.header.get_xyzt_units() == ("mm", "sec")
  assert found.header["descrip"].item() == b"by a scanner" and found.header["cal_max"] == 0
  assert found.header.get_zooms() == (2.5, 1.5, 4.0)


def test_a_volume_has_one_mask_whatever_its_format(tmp_path, network, truth):
  sitk = pytest.importorskip("SimpleITK", reason="needs the extra 'itk'")
  dicom_files = pytest.importorskip("dicom_files", reason="needs the extra 'dicom'")
  volume = np.stack([image[..., 0] for image, _ in truth.values()], axis=-1)
  want = np.stack([mask for _, mask in truth.values()], axis=-1)
  folder = tmp_path / "in"
  dicom_files.write_series(
    folder / "series", volume.astype(np.uint16) * 2, RescaleSlope=0.5, RescaleIntercept=0
  )
  scan = sitk.ReadImage([str(dicom_files.path(folder / "series", n)) for n in range(len(truth))])
  for name in ("a_0000.mha", "b_0000.nrrd", "c_0000.nii.gz"):
    sitk.WriteImage(scan, str(folder / name))
  rows = _predict(network, folder, tmp_path / "out")
  names = {"a": "a.mha", "b": "b.nrrd", "c": "c.nii.gz", "series": "series.nii.gz"}
  assert {row["case_id"]: row["mask"] for row in rows} == names
  for name in names.values():
    found = sitk.ReadImage(str(tmp_path / "out" / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found).T, want)
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
      np.testing.assert_allclose(getattr(found, get)(), getattr(scan, get)(), atol=1e-5)
  again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*")}
  assert _predict(network, folder, tmp_path / "out") == rows
  assert all((tmp_path / "out" / name).stat().st_mtime_ns == again[name] for name in names.values())


def test_channels_of_a_volume_go_to_a_3d_network_in_their_order(tmp_path, network):
  config = network.config.copy_and_resolve_references()
  config.model.width = 4
  segmenter = models.build(config.model, num_classes=3, spatial_dims=3)
  params = jax.jit(segmenter.init)(jax.random.key(1), np.zeros((1, 8, 8, 4, 2), np.float32))
  network = network._replace(
    config=config, num_classes=3, class_names=["background", "a", "b"], num_channels=2,
    spatial_dims=3, size=(8, 8, 4), crop=(), params=params,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  volume = rng.integers(0, 900, (9, 7, 5, 2)).astype(np.int16)
  (tmp_path / "in").mkdir()
  for channel in (0, 1):
    image = _nifti(volume[..., channel])
    nibabel.save(image, tmp_path / "in" / f"v_000{channel}.nii")
  options = run_lib.Options(scores=False)
  _run(network, tmp_path / "in", tmp_path / "out", options)
  image = dataset_lib.to_model(network, volume.astype(np.float32))
  logits = jax.jit(segmenter.apply)(params, image[None])[0]
  want = dataset_lib.to_native(logits, volume.shape[:3], ()).argmax(-1)
  assert len(np.unique(want)) > 1
  np.testing.assert_array_equal(nibabel.load(tmp_path / "out" / "v.nii").get_fdata(), want)
  Image.new("L", (9, 9)).save(tmp_path / "flat.png")
  nibabel.save(_nifti(volume[..., 0, 0]), tmp_path / "flat_0000.nii")
  nibabel.save(_nifti(volume[..., 0, 0]), tmp_path / "flat_0001.nii")
  flat = inputs.list_inputs(str(tmp_path / "flat_0000.nii"), 2)
  for one in (*flat, inputs.Input("flat", (tmp_path / "flat.png",), ".png")):
    with pytest.raises(errors.DataError, match="2D image.* but the network was trained on volumes"):
      case_reader.read(one, network)


def test_probabilities_on_the_own_grid_belong_to_the_mask():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 4, 6, 3)).astype(np.float32)
  shapes = [(9, 8), (5, 12)]
  resize = evaluation_lib.resize_matrices(shapes, (4, 6), (6, 10))
  masks = np.asarray(evaluation_lib.native_masks(logits, resize))
  probs = np.asarray(programs.native_probabilities(logits, resize))
  assert probs.dtype == np.float16
  for row, (h, w) in enumerate(shapes):
    native = dataset_lib.to_native(logits[row], (h, w), (6, 10))
    want = np.asarray(jax.nn.softmax(native))
    np.testing.assert_allclose(probs[row, :h, :w], want, atol=1e-3)
    np.testing.assert_array_equal(masks[row, :h, :w], native.argmax(-1))


def test_scores_follow_their_definitions(network, truth):
  """With proposals by temperature and threshold alone, which numpy repeats."""
  config = network.config.copy_and_resolve_references()
  config.proposals.mix, config.proposals.threshold_shift = "base:1,threshold:2", 1.5
  segmenter = models.build(config.model, num_classes=2, spatial_dims=2)
  shown = [image for image, mask in truth.values() if mask.any()][:2]
  images = np.stack([dataset_lib.to_model(network, image) for image in shown])
  z = np.asarray(jax.jit(segmenter.apply)(network.params, images))
  rows = (images, z, np.arange(2, dtype=np.uint32))
  got = jax.jit(programs.make_scores(config, segmenter, 2))(network.params, rows)
  moved = [z - shift * np.array([1, 0], np.float32) for shift in (0, -1.5, 1.5)]
  drawn = np.stack([m.argmax(-1) for m in moved], axis=1).astype(np.float64)
  q = np.stack([np.asarray(jax.nn.softmax(m))[..., 1] for m in moved], axis=1).mean(1)
  for n, y in enumerate(np.float64(z.argmax(-1))):
    dice = [2 * (y * m).sum() / (y.sum() + m.sum()) for m in drawn[n]]
    assert 0 < y.sum() < 256 and 0 < np.mean(dice) < 1
    assert got["agreement"][n] == pytest.approx(np.mean(dice), rel=1e-5)
    soft = (2 * (q[n] * y).sum() + 1) / (q[n].sum() + y.sum() + 1)
    assert got["confidence"][n] == pytest.approx(soft, rel=1e-5)
    assert got["weight"][n] == np.maximum(y, drawn[n].max(0)).sum()
    p = np.float64(jax.nn.softmax(z[n]))
    near = np.zeros((16, 16), bool)
    for i, j in np.argwhere(y):
      b = config.judge.border
      near[max(i - b, 0) : i + b + 1, max(j - b, 0) : j + b + 1] = True
    assert got["entropy"][n] == pytest.approx((p * np.log(p)).sum(-1)[near].mean(), rel=1e-4)


def test_new_images_have_no_files_and_no_other_members():
  mix = "base:1, file:3,member+threshold:2, threshold:4"
  assert programs.drawn_mix(mix) == "base:1,threshold:4"
  default = config_lib.base_config().proposals.mix
  assert programs.drawn_mix(default) == default
  assert programs.drawn_mix("base:1,file:3") == programs.drawn_mix("file:3") == default


def test_a_slice_counts_by_what_is_seen_in_it():
  parts = {"agreement": [0.5, 1.0, 0.8], "confidence": [0.1, 1.0, 0.2], "entropy": [-1, 0, -3]}
  found = score_table.of_case({**parts, "weight": [30, 0, 10]})
  assert found == pytest.approx({"agreement": 0.575, "confidence": 0.125, "entropy": -1.5})
  assert score_table.of_case({**parts, "weight": [0, 0, 0]})["confidence"] == pytest.approx(1.3 / 3)


def test_the_worst_case_has_rank_one():
  def row(case_id, agreement, confidence):
    scores = {"agreement": agreement, "confidence": confidence, "entropy": -0.1}
    return {"case_id": case_id, "mask": "m", "scores": scores, "foreground_pixels": 3}

  rows = [row("a", 0.9, 0.5), row("b", 0.2, 0.9), row("=c", 0.9, 0.4)]
  found = list(csv.DictReader(score_table.text(rows).splitlines()))
  assert [(one["case_id"], one["rank"]) for one in found] == [("a", "3"), ("b", "1"), ("'=c", "2")]


def test_scores_do_not_depend_on_what_is_beside_a_case(tmp_path, network, truth):
  folder = _write_png(tmp_path / "in", truth)
  rows = _predict(network, folder, tmp_path / "all")
  for row in rows:
    one = _predict(network, folder / f"{row['case_id']}.png", tmp_path / row["case_id"])
    assert one == [{**row, "rank": "1"}]


def test_broken_files_are_named_and_the_others_go_on(tmp_path, network, truth, capsys):
  folder = _write_png(tmp_path / "in", truth)
  good = sorted(folder.iterdir())
  (folder / "cut.png").write_bytes(good[0].read_bytes()[:100])
  Image.new("RGB", (9, 9)).save(folder / "rgb.png")
  (folder / "scan.mha").write_bytes(b"?")
  (folder / "notes.txt").write_text("not an image")
  nibabel.save(_nifti(np.full((9, 8, 2), np.nan, np.float32)), folder / "nan.nii.gz")
  nibabel.save(_nifti(np.zeros((9, 8, 2, 3), np.float32)), folder / "time.nii.gz")
  with pytest.raises(errors.DataError, match=r"5 of 8 cases could not be predicted"):
    _predict(network, folder, tmp_path / "out")
  lines = [line for line in capsys.readouterr().out.splitlines() if "not predicted" in line]
  for name in ("cut.png", "rgb.png", "scan.mha", "nan.nii.gz", "time.nii.gz"):
    assert len([line for line in lines if f"{folder / name}: " in line]) == 1, lines
  assert "3 channels, but the network was trained on 1" in str(lines)
  with (tmp_path / "out" / score_table.FILE).open(newline="") as file:
    assert [row["case_id"] for row in csv.DictReader(file)] == [
      path.stem for path in sorted(good, key=lambda path: int(path.stem[4:]))
    ]


def _times(output):
  return {path.name: path.stat().st_mtime_ns for path in output.glob("case*.png")}


def test_a_rerun_does_what_is_missing_alone(tmp_path, network, truth):
  folder, output = _write_png(tmp_path / "in", truth), tmp_path / "out"
  rows, before = _predict(network, folder, output), _times(output)
  lost, changed, kept = (folder / row["mask"] for row in rows)
  (output / case_files.FOLDER / f"{lost.stem}.json").unlink()
  shutil.copy(kept, changed)
  again, after = _predict(network, folder, output), _times(output)
  assert after[kept.name] == before[kept.name]
  assert after[lost.name] > before[lost.name] and after[changed.name] > before[changed.name]
  names = ("agreement", "confidence", "entropy", "foreground_pixels")
  for place in (0, 2):
    assert [again[place][name] for name in names] == [rows[place][name] for name in names]
  assert again[1]["foreground_pixels"] == again[2]["foreground_pixels"]
  with pytest.raises(errors.ConfigError, match="mirror was False, is True"):
    _predict(network, folder, output, mirror=True)


def test_a_signal_ends_it_and_the_rerun_finishes(tmp_path, network, truth, monkeypatch):
  folder, output = _write_png(tmp_path / "in", truth), tmp_path / "out"
  want = _predict(network, folder, tmp_path / "undisturbed")
  monkeypatch.setattr(preemption, "_noted", [signal.SIGTERM])
  with pytest.raises(preemption.Preempted):
    _predict(network, folder, output)
  assert not (output / score_table.FILE).exists()
  monkeypatch.setattr(preemption, "_noted", [])
  assert _predict(network, folder, output) == want


def test_options_reach_the_files(tmp_path, network, truth):
  folder = _write_png(tmp_path / "in", truth)
  output = tmp_path / "out"
  options = run_lib.Options(mirror=True, probabilities=True, scores=False, workers=1)
  _run(network, folder, output, options)
  assert not (output / score_table.FILE).exists()
  for index, (image, _) in truth.items():
    with np.load(output / f"case{index}.npz") as content:
      probs = content["probabilities"]
    assert probs.shape == (*image.shape[:2], 2) and probs.dtype == np.float16
    mask = np.asarray(Image.open(output / f"case{index}.png"))
    sure = np.abs(probs[..., 1] - 0.5) > 1e-3
    np.testing.assert_array_equal(mask[sure], (probs[..., 1] > 0.5)[sure])


def test_a_mirrored_evaluation_is_predicted_bit_for_bit(tmp_path, network, truth, tiny_run):
  config, workdir = tiny_run
  config = config.copy_and_resolve_references()
  config.evaluate.mirror = True
  dataset = dataset_lib.open_dataset(config, workdir)
  axes = evaluate.mirror_axes(config, workdir, dataset)
  evaluation = evaluation_lib.open_evaluation(config, dataset, tmp_path, lambda _: 0, axes)
  want = dict(evaluation_lib.predict(evaluation, network.params, list(truth)))
  folder, output = _write_png(tmp_path / "in", truth), tmp_path / "out"
  assert not network.mirrors
  network = network._replace(config=config)
  _run(network, folder, output, run_lib.Options(mirror=network.mirrors, scores=False))
  for index in truth:
    mask = np.asarray(Image.open(output / f"case{index}.png"))
    np.testing.assert_array_equal(mask, want[index])
  assert any((want[index] != mask).any() for index, (_, mask) in truth.items())
  plain = evaluation._replace(mirror_axes=())
  assert cases_lib._fingerprint(plain, {}) != cases_lib._fingerprint(evaluation, {})


def _case(name, shape, count=1):
  source = inputs.Input(name, (), ".png")
  return case_reader.Case(source, "", [None] * count, shape, count > 1)


def test_batches_are_of_one_size_and_few_records_wait():
  cases = [_case("v", (20, 30), 7), _case("a", (70, 30)), _case("b", (64, 64)), _case("c", (9, 9))]
  found = [
    [(case.source.case_id, place) for case, place in rows]
    for rows in grid_run.batches(iter(cases), 4)
  ]
  rest = [("v", n) for n in range(4, 7)]
  assert found == [[("v", n) for n in range(4)], [*rest, ("b", 0)], [("a", 0)], [("c", 0)]]
  pulled = 0

  def sizes():
    nonlocal pulled
    for pulled in range(1, 1001):
      yield _case(str(pulled), (64 * pulled, 64))

  stream = grid_run.batches(sizes(), 2)
  assert next(stream)[0][0].source.case_id == "1" and pulled == 9


def test_names_say_which_files_make_a_case(tmp_path):
  for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a10_0000.nii", "a10_0001.nii", "a2_0000.nii"):
    (tmp_path / name).touch()
  found = inputs.list_inputs(str(tmp_path), 2)
  assert [one.case_id for one in found] == ["a2", "a10", "b"]
  assert [file.name for file in found[2].files] == ["b_0000.nii.gz", "b_0001.nii.gz"]
  assert "a2_0000.nii" in found[0].problem and "0000 to 0001" in found[0].problem
  assert found[1].problem == "" and found[1].mask_name == "a10.nii"
  one = inputs.list_inputs(str(tmp_path / "b_0001.nii.gz"), 2)
  assert one == [found[2]]
  (tmp_path / "plain.nii").touch()
  assert len(inputs.list_inputs(str(tmp_path), 1)) == 6
  assert inputs.Input("x", (), ".JPG").mask_name == "x.png"


@pytest.mark.parametrize(
  "make, source, message",
  [
    ([], "gone", "gone: no such folder or file"),
    (["notes.txt"], ".", r"no images; expected files .nii.gz"),
    (["imagesTs/"], ".", r"give .*imagesTs"),
    (["a.png", "a.tif"], ".", r"a.tif: second file of the id 'a', beside a.png"),
  ],
)
def test_bad_input_is_one_line(tmp_path, make, source, message):
  for name in make:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
  with pytest.raises(errors.DataError, match=message) as caught:
    inputs.list_inputs(str(tmp_path / source), 1)
  assert "\n" not in str(caught.value)


def test_output_must_be_a_place_of_its_own(tmp_path, network, truth):
  folder = _write_png(tmp_path / "in", truth)
  for source in (folder, next(folder.iterdir())):
    with pytest.raises(errors.ConfigError, match="where the images of --input are"):
      output_folder.check(str(source), str(folder))
  with pytest.raises(errors.ConfigError, match="holds other files"):
    output_folder.check(str(tmp_path), str(folder))
  blocked = tmp_path / "file" / "out"
  (tmp_path / "file").touch()
  with pytest.raises(errors.ConfigError, match="--output: .* cannot be written"):
    _predict(network, folder, blocked)


def test_checkpoints_by_name(tiny_run, network, tmp_path):
  workdir = tiny_run[1]
  found = {name: trained_lib.load(workdir, name) for name in ("base", "best", "delivered", "4")}
  results = files.read_json(epath.Path(workdir) / "results.json")
  assert network.step == 8 and found["base"].step == 0 and found["4"].step == 4
  assert found["best"].step == results["selected"]["step"]
  assert found["delivered"].step == results["delivered"]["step"]
  by_step = {0: found["base"], 4: found["4"], 8: network}
  for name in ("best", "delivered"):
    jax.tree.map(
      np.testing.assert_array_equal, found[name].params, by_step[found[name].step].params
    )
  with pytest.raises(
    errors.ConfigError, match="no checkpoint of step 5; there are those of 0, 4, 8"
  ):
    trained_lib.load(workdir, "5")
  with pytest.raises(errors.ConfigError, match="--checkpoint: found 'final', expected delivered"):
    trained_lib.load(workdir, "final")
  with pytest.raises(errors.ConfigError, match="config.json is missing"):
    trained_lib.load(tmp_path, "base")
  shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("cases", "delivered"))
  with pytest.raises(
    errors.ConfigError, match="delivered.json is missing; run the stage 'evaluate'"
  ):
    trained_lib.load(tmp_path / "run", "delivered")
  assert trained_lib.load(tmp_path / "run", "last").step == 8  # the data are not read


def test_the_program_ends_with_one_if_a_file_is_broken(tmp_path, tiny_run, truth):
  folder = _write_png(tmp_path / "in", truth)
  (folder / "cut.png").write_bytes(b"")
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.predict", f"--workdir={tiny_run[1]}", f"--input={folder}",
      f"--output={tmp_path / 'out'}", "--noscores",
    ],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 1
  assert "1 of 4 cases could not be predicted" in done.stdout + done.stderr
  assert len(list((tmp_path / "out").glob("case*.png"))) == 3
  assert not list((tmp_path / "out").glob(".*"))
