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
  for place in ("old", "masks"):
    (folder / place / "in").mkdir(parents=True)
    (folder / place / "in" / "a.png").touch()
  (folder / "masks" / inputs.SETTINGS).touch()  # what prediction wrote
  (folder / "notes.txt").write_text("not an image")
  nibabel.save(_nifti(np.full((9, 8, 2), np.nan, np.float32)), folder / "nan.nii.gz")
  nibabel.save(_nifti(np.zeros((9, 8, 2, 3), np.float32)), folder / "time.nii.gz")
  with pytest.raises(errors.DataError, match=r"5 of 8 cases could not be predicted"):
    _predict(network, folder, tmp_path / "out")
  lines = [line for line in capsys.readouterr().out.splitlines() if "not predicted" in line]
  for name in ("cut.png", "rgb.png", "scan.mha", "nan.nii.gz", "time.nii.gz"):
    assert len([line for line in lines if f"{folder / name}: " in line]) == 1, lines
  assert "3 channels, but the network was trained on 1" in str(lines)
  assert f"not predicted: 1 images in folders below --input, such as {folder / 'old'}" in str(lines)
  with (tmp_path / "out" / score_table.FILE).open(newline="") as file:
    assert [row["case_id"] for row in csv.DictReader(file)] == [
      path.stem for path in sorted(good, key=lambda path: int(path.stem[4:]))
    ]


def test_pictures_are_not_for_a_network_of_images_with_a_spacing(tmp_path, network, truth):
  """Their axes are (H, W), and those of NIfTI (x, y)."""
  source = inputs.list_inputs(str(_write_png(tmp_path / "in", truth)), 1)[0]
  with pytest.raises(errors.DataError, match=r"\.png: a picture, .* the axes \(x, y\)"):
    case_reader.read(source, network._replace(spacing_unit="mm"))


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
  # One of its files is of the same folder, and the table stays that of all masks.
  assert len(_predict(network, kept, output)) == len(rows)
  with pytest.raises(errors.ConfigError, match="input was '.*/in', is '.*/other'"):
    _predict(network, _write_png(tmp_path / "other", truth), output)
  (output / "predict.json").write_text("{")
  with pytest.raises(errors.ConfigError, match="predict.json is damaged, .* name another folder"):
    _predict(network, folder, output)


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
  assert [network.mirrors(asked) for asked in (None, False, True)] == [False, False, True]
  network = network._replace(config=config)
  assert network.mirrors(None) and not network.mirrors(False)
  _run(network, folder, output, run_lib.Options(mirror=network.mirrors(None), scores=False))
  for index in truth:
    mask = np.asarray(Image.open(output / f"case{index}.png"))
    np.testing.assert_array_equal(mask, want[index])
  assert any((want[index] != mask).any() for index, (_, mask) in truth.items())
  plain = evaluation._replace(mirror_axes=())
  assert cases_lib._fingerprint(plain, {}) != cases_lib._fingerprint(evaluation, {})


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


def test_the_program_ends_with_one_if_a_file_is_broken(tmp_path, tiny_run, truth):
  """And mirrors, without a flag, as the evaluation of the run did."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  for path in tiny_run[1].iterdir():
    (workdir / path.name).symlink_to(path)
  content = files.read_json(workdir / "config.json")
  content["config"]["evaluate"]["mirror"] = True
  (workdir / "config.json").unlink()
  files.write_json(workdir / "config.json", content)
  folder = _write_png(tmp_path / "in", truth)
  (folder / "cut.png").write_bytes(b"")
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.predict", f"--workdir={workdir}", f"--input={folder}",
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
  assert files.read_json(tmp_path / "out" / "predict.json")["mirror"]
