"""user_judges: a function of your own runs on the device or the host; its faults are one line."""

import pathlib
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import errors, pipeline
from rndpo_jax.mining import judges, pair_rules, program, proposals, user_judges
from rndpo_jax.pairs import shards
from rndpo_jax.planning import program_inputs, programs
from rndpo_jax.runtime import files, sharding

SHAPES = tuple(
  jax.ShapeDtypeStruct(shape, dtype)
  for shape, dtype in (
    ((2, 5, 6, 1), jnp.float32), ((2, 4, 5, 6), jnp.uint8), ((2, 4, 5, 6, 2), jnp.float32)
  )
)  # fmt: skip

SOURCE = """
  import jax
  import jax.numpy as jnp
  import numpy as np

  def on_device(images, masks, probs):
    return jnp.einsum("bkhw,w->bk", masks.astype(int), jnp.arange(masks.shape[-1]))

  def numpy_methods(images, masks, probs):
    return np.sum(probs[..., 1], axis=(2, 3))  # of a tracer too

  def in_numpy(images, masks, probs):
    for array in (images, masks, probs):
      assert type(array) is np.ndarray and array.flags.writeable
    return np.einsum("bkhw,w->bk", masks.astype(int), np.arange(masks.shape[-1]))

  class Tensor:
    "What PyTorch's has, and no more: from arrays alone, with a gradient, on another device."
    def __init__(self, values, there=True):
      if not isinstance(values, np.ndarray):
        raise TypeError(f"expected np.ndarray (got {type(values).__name__})")
      self.values, self.there = values, there
    def detach(self):
      return self
    def cpu(self):
      return Tensor(self.values, there=False)
    def __array__(self, dtype=None, copy=None):
      if self.there:
        raise TypeError("can't convert a tensor of another device")
      return self.values

  def in_torch(images, masks, probs):
    return Tensor(in_numpy(images, Tensor(masks).values, probs).astype(np.float32))

  def as_list(images, masks, probs):
    return in_numpy(images, masks, probs).tolist()

  def with_callback(images, masks, probs):
    shape = jax.ShapeDtypeStruct(masks.shape[:2], jnp.float32)
    return jax.pure_callback(lambda m: np.sum(m, axis=(2, 3), dtype=np.float32), shape, masks)

  def bad_callback(images, masks, probs):
    def fail(m):
      raise RuntimeError("no model file")
    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    return jax.jit(lambda m: jax.pure_callback(fail, shape, m))(masks)

  def raises(images, masks, probs):
    raise KeyError("weights.pt")

  def two_lines(images, masks, probs):
    raise ValueError("first\\nsecond")

  def two_arguments(images, masks):
    return masks

  def returns_none(images, masks, probs):
    return None

  def returns_strings(images, masks, probs):
    return [["good"] * masks.shape[1]] * masks.shape[0]

  def returns_objects(images, masks, probs):
    return np.array([[object()] * masks.shape[1]] * masks.shape[0])

  def wrong_shape(images, masks, probs):
    return jnp.sum(masks, axis=(1, 2, 3))

  def wrong_shape_on_host(images, masks, probs):
    return np.asarray(masks).sum((1, 2, 3))

  number = 3
"""


@pytest.fixture
def clinic(tmp_path, monkeypatch):
  (tmp_path / "clinic_judges.py").write_text(textwrap.dedent(SOURCE))
  (tmp_path / "broken_judges.py").write_text("1 / 0\n")
  (tmp_path / "ending_judges.py").write_text("import sys\nsys.exit('usage: ...')\n")
  monkeypatch.syspath_prepend(tmp_path)
  yield
  sys.modules.pop("clinic_judges", None)


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=SHAPES[0].shape).astype(np.float32),
    rng.integers(0, 2, SHAPES[1].shape).astype(np.uint8),
    rng.uniform(size=SHAPES[2].shape).astype(np.float32),
  )


@pytest.mark.parametrize(
  "name,reason",
  [
    ("on_device", None),
    ("numpy_methods", None),
    ("in_numpy", r"cannot trace it \(AssertionError: "),
    ("in_torch", r"cannot trace it \(TypeError: expected np.ndarray \(got "),
    ("as_list", "cannot trace it"),
    ("with_callback", "calls back"),
    ("bad_callback", "calls back"),
    ("raises", r"cannot trace it \(KeyError: 'weights.pt'\)"),
  ],
)
def test_what_runs_where(clinic, name, reason):
  found = user_judges.why_on_host(f"clinic_judges:{name}", *SHAPES)
  assert (found is None) if reason is None else re.search(reason, found)


@pytest.mark.parametrize("name", ["in_numpy", "in_torch", "as_list"])
def test_host_and_device_give_the_same_scores(clinic, name):
  images, masks, probs = arrays()
  expected = user_judges.on_device("clinic_judges:on_device")(images, masks, probs, None)
  for array in (images, masks, probs):
    array.setflags(write=False)  # as what comes from a device
  got = user_judges.on_host(f"clinic_judges:{name}")(images, masks, probs)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  "name,message",
  [
    ("raises", r"raised KeyError: 'weights.pt' \(clinic_judges.py, line \d+\)$"),
    ("two_lines", r"raised ValueError: first \("),
    ("returns_none", "returned NoneType of object, expected numbers"),
    ("returns_strings", "returned list of <U4, expected numbers"),
    ("returns_objects", "returned ndarray of object, expected numbers"),
    ("wrong_shape_on_host", r"returned shape \(2,\), expected .* = \(2, 4\)"),
    ("bad_callback", "raised JaxRuntimeError: RuntimeError: no model file"),
  ],
)
def test_a_fault_on_the_host_is_one_line_naming_the_judge(clinic, name, message):
  with pytest.raises(errors.JudgeError, match=f"^judge 'clinic_judges:{name}' {message}") as error:
    user_judges.on_host(f"clinic_judges:{name}")(*arrays())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name,message",
  [
    ("broken_judges:f", r"importing broken_judges raised ZeroDivisionError: division by zero \("),
    ("ending_judges:f", "importing ending_judges raised SystemExit: usage"),
    ("clinic_judges:number", "it is of type int, expected a function"),
    ("clinic_judges:missing", "has no attribute 'missing'; expected package.module:function"),
    ("clinic_judges:two_arguments", r"it takes \(images, masks\), expected \(images, masks, probs"),
    ("no_such_module:f", "No module named 'no_such_module'; expected package.module:function"),
  ],
)
def test_what_cannot_be_loaded_is_one_line_before_anything_runs(clinic, tiny_config, name, message):
  with pytest.raises(errors.ConfigError, match=f"^config.judge: judge '{name}': .*{message}"):
    pipeline.check_here(tiny_config(judge__name=name))


def test_a_wrong_shape_is_found_by_tracing(clinic):
  with pytest.raises(errors.JudgeError, match=r"clinic_judges:wrong_shape' returned shape \(2,\)"):
    user_judges.why_on_host("clinic_judges:wrong_shape", *SHAPES)


def with_batch_size(config, size):
  config = config.copy_and_resolve_references()
  config.mine.batch_size = size
  return config


def mine(config, workdir):
  pipeline.run(config, workdir, ["base", "mine"])
  return list(shards.read(workdir / "pairs")), files.read_json(workdir / "pairs" / "judges.json")


def test_pairs_of_a_judge_on_the_host_are_those_of_the_device(
  clinic, tiny_run, tiny_config, tmp_path, monkeypatch, capsys
):
  """On eight devices, on three with another batch size, and traced; also measured by the host."""
  there = str(tiny_run[1])
  host = tiny_config(
    base__workdir=there,
    judge__name="clinic_judges:in_numpy",
    judge__compare=("clinic_judges:in_torch", "agreement"),
  )
  eight, judged = mine(host, tmp_path / "eight")
  assert (
    "'clinic_judges:in_numpy' runs on the host, which is slower: JAX cannot"
    in capsys.readouterr().out
  )
  device, measured = mine(
    tiny_config(
      base__workdir=there, judge__name="clinic_judges:on_device", judge__compare=("agreement",)
    ),
    tmp_path / "device",
  )
  assert "runs on the host" not in capsys.readouterr().out
  local = jax.local_devices()[:3]
  monkeypatch.setattr(jax, "local_devices", lambda: local)
  monkeypatch.setattr(jax, "local_device_count", lambda: 3)
  three, _ = mine(with_batch_size(host, 2), tmp_path / "three")
  assert len(eight) > 10
  for other in (three, device):
    assert len(other) == len(eight)
    for ours, theirs in zip(eight, other, strict=True):
      for name in ("index", "chosen", "rejected", "valid", "score_gap"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
      for name in ("reference_margin", "reference_log_prob"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)
  wanted = measured["clinic_judges:on_device"]
  for name in ("clinic_judges:in_numpy", "clinic_judges:in_torch"):
    assert {**judged[name], "used": True} == wanted
  assert judged["agreement"] == measured["agreement"]


def test_a_judge_that_fails_while_mining_ends_in_one_line(clinic, tiny_run, tiny_config, tmp_path):
  config = tiny_config(
    base__workdir=str(tiny_run[1]), judge__name="clinic_judges:raises", judge__compare=()
  )
  with pytest.raises(errors.JudgeError, match="^judge 'clinic_judges:raises' raised KeyError"):
    pipeline.run(config, tmp_path, ["base", "mine"])


def test_a_plan_takes_a_judge_on_the_host_for_nothing(clinic, tiny_config):
  config = tiny_config(judge__name="clinic_judges:in_numpy", judge__compare=())
  problem = program_inputs.Problem(2, 1, 2, (16, 16), native=(20, 18))
  assert list(program.host_judges(config, problem)) == ["clinic_judges:in_numpy"]
  lowered = programs.programs(config, problem, sharding.make_mesh(), {"mine": 8, "measure": 8})
  for lower in lowered.values():
    assert "callback" not in lower().as_text()


README = pathlib.Path(program.__file__).parent / "README.md"


def test_the_judge_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
  (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  (tmp_path / "my_judges.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  _, masks, probs = arrays()
  masks[:] = 0
  masks[0, 0, 1:4, 1:4] = 1  # 9 pixels, 12 sides
  masks[0, 1, 2, :5] = 1  # 5 pixels, 11 sides: one is the edge of the image
  got = user_judges.on_host("my_judges:compactness")(None, masks, probs)
  np.testing.assert_allclose(got[0], [9 / 144, 5 / 121, 0, 0], rtol=1e-6)
  assert user_judges.why_on_host("my_judges:compactness", *SHAPES) == (
    "JAX cannot trace it (TracerArrayConversionError)"
  )


def test_the_readme_names_every_judge_rule_and_sampler():
  text = README.read_text()
  for name in (*judges.JUDGES, *pair_rules.RULES, *proposals.SAMPLERS):
    assert f"`{name}`" in text, name
