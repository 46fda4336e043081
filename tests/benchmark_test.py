"""The benchmarks at tiny sizes: what they compute and report, never how fast."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax import benchmark, errors
from rndpo_jax.benchmark import loss, options, run, tables, timing

TINY = {"shape": (8, 4, 6), "sizes": ()}


def resolve(**given):
  return options.resolve("loss", {**TINY, **given})["loss"]


@pytest.fixture
def few_inputs(monkeypatch):
  monkeypatch.setattr(timing, "MAX_INPUTS", 3)
  monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)


class TestMeasure:
  def test_every_round_holds_each_variant_once_and_orders_differ(self):
    order = timing.interleaved(4, 20)
    assert order.shape == (20, 4)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (20, 1)))
    assert len({tuple(row) for row in order}) > 5

  def test_calls_are_interleaved_and_inputs_rotate(self, monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0.0)
    calls, work = [], timing.Work(1, 1, 1, 1)

    def variant(name):
      def call(turn):
        calls.append((name, turn))
        return turn

      return timing.Variant(
        name, "jax", work, call, wait=lambda turn: calls.append(("wait", turn)),
        settle=lambda: calls.append(("settle", name)),
      )  # fmt: skip

    seconds, counts = timing.sample([variant("a"), variant("b")], repeats=20, calls=2)
    assert seconds.shape == (2, 20) and (seconds > 0).all() and counts == [2, 2]
    turns = [turn for name, turn in calls if name in "ab"]
    assert turns == list(range(2 * timing.WARM_UP_CALLS + 20 * 2 * 3))  # no turn comes twice
    timed = calls[2 * 2 * timing.WARM_UP_CALLS :]
    names = []
    for start in range(0, len(timed), 6):
      settle, waking, awake, first, second, wait = timed[start : start + 6]
      assert settle == ("settle", first[0]) and second[0] == first[0] == waking[0]
      assert awake == ("wait", waking[1]) and wait == ("wait", second[1])
      names.append(first[0])
    order = np.array(["a", "b"])[timing.interleaved(2, 20).ravel()]
    assert names == order.tolist()

  def test_an_accelerator_gets_as_many_calls_as_fill_a_sample(self, monkeypatch):
    assert timing.calls_per_sample(1e-6) == 1  # the CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seconds = (1e-6, timing.SAMPLE_SECONDS / 7, 2 * timing.SAMPLE_SECONDS)
    assert [timing.calls_per_sample(s) for s in seconds] == [timing.MAX_CALLS, 7, 1]

  def test_flops_of_a_product_by_hand(self):
    compiled = timing.compile_ahead(jnp.matmul, jnp.ones((3, 5)), jnp.ones((5, 7)))
    assert compiled.flops == 2 * 3 * 5 * 7
    assert compiled.peak_bytes == 4 * (15 + 35 + 21) and compiled.seconds > 0
    variant = timing.compiled_variant("x", timing.Work(1, 1, 1, 1), compiled, None, calls=3)
    assert variant.flops == 3 * 210

  def test_inputs_exceed_the_cache(self):
    assert timing.num_inputs(1 << 24) * (1 << 24) >= timing.ROTATED_BYTES
    assert timing.num_inputs(1 << 40) == 2
    assert timing.num_inputs(1) == timing.MAX_INPUTS

  def test_a_variant_takes_the_input_of_its_turn(self):
    inputs = [(jnp.full(3, float(n)),) for n in range(3)]
    work = timing.Work(1, 1, 1, 12)
    variant = timing.jax_variant("double", work, lambda x: 2 * x, inputs)
    assert [float(variant.run(turn)[0]) for turn in range(5)] == [0.0, 2.0, 4.0, 0.0, 2.0]
    assert variant.compile_seconds > 0
    assert variant.peak_bytes == 24  # three float32 in, three out

  def test_rates_by_hand(self, monkeypatch):
    times = {timing.COPY: 0.5, "mine": 2.0}

    def sample(variants, repeats, calls):
      return np.array([[times[v.name]] * repeats for v in variants]), [7, 8]

    monkeypatch.setattr(timing, "sample", sample)
    copy = timing.copy_variant([jnp.zeros(25)])
    work = timing.Work(images=4, pairs=8, pixels=3_000_000, bytes_at_least=50)
    variant = timing.Variant("mine", "jax", work, lambda t: t, lambda o: o)
    missing = timing.Missing("other", "torch", "no compiler")
    rows = timing.rows(
      [copy, variant, missing], baseline=timing.COPY, repeats=20, setup={"shape": [1]}
    )
    assert [row.get("calls_per_sample") for row in rows] == [7, 8, None]
    assert copy.work.bytes_at_least == 200  # 25 float32 read and written
    assert rows[0]["fraction_of_copy_bandwidth"] == 1.0
    assert rows[1]["images_per_second"] == 2.0 and rows[1]["pairs_per_second"] == 4.0
    assert rows[1]["megapixels_per_second"] == 1.5
    assert rows[1]["bandwidth_bytes_per_second"] == 25.0
    assert rows[1]["fraction_of_copy_bandwidth"] == 25.0 / 400.0
    assert rows[1]["time_over_baseline"] == 4.0
    assert rows[2]["status"] == "not available" and rows[2]["reason"] == "no compiler"


class TestOptions:
  @pytest.mark.parametrize(
    "given, named",
    [
      ({"shape": (8, 4)}, "--shape"),
      ({"shape": (0, 4, 4)}, "--shape"),
      ({"classes": 0}, "--classes"),
      ({"classes": 257}, "--classes"),
      ({"dtype": "int8"}, "--dtype"),
      ({"repeats": 19}, "--repeats"),
      ({"pairs": 0}, "--pairs"),
      ({"disagreement": 0.0}, "--disagreement"),
      ({"disagreement": 1.5}, "--disagreement"),
      ({"sizes": (40,)}, "--sizes"),
      ({"width": 8}, "--width"),  # read by others
    ],
  )
  def test_refuses_what_cannot_work(self, given, named):
    with pytest.raises(errors.BenchmarkError, match=named):
      resolve(**given)

  def test_refuses_members_that_seeds_cannot_share(self):
    for given in ({"members": 5}, {"members": 0, "seeds": 0}):
      with pytest.raises(errors.BenchmarkError, match="--members, --seeds: found"):
        options.resolve("population", given)

  def test_refuses_an_unknown_benchmark_and_a_grid_that_the_unet_cannot_halve(self):
    with pytest.raises(errors.BenchmarkError, match="--benchmark: found 'speed'"):
      options.resolve("speed", {})
    with pytest.raises(errors.BenchmarkError, match="multiples of 8"):
      options.resolve("step", {"shape": (4, 20, 24)})

  def test_all_takes_options_that_one_of_them_reads(self):
    resolved = options.resolve("all", {"disagreement": 0.5, "repeats": 30})
    assert resolved["loss"].disagreement == resolved["step"].disagreement == 0.5
    assert {o.repeats for o in resolved.values()} == {30}


class TestLoss:
  @pytest.mark.parametrize(
    "shape, classes, pairs, dtype",
    [((8, 4, 6), 4, 1, "float32"), ((8, 4, 2, 3), 1, 2, "bfloat16")],
  )
  def test_inputs_rotate_and_disagree(self, few_inputs, shape, classes, pairs, dtype):
    given = resolve(shape=shape, classes=classes, pairs=pairs, dtype=dtype, disagreement=0.25)
    inputs = loss.make_inputs(jax.random.key(0), given)
    assert len(inputs) == 3
    logits, chosen, rejected, reference = inputs[0]
    lead = (8,) if pairs == 1 else (8, pairs)
    assert logits.shape == (*shape, classes) and logits.dtype == dtype
    assert chosen.shape == rejected.shape == (*lead, *shape[1:]) and chosen.dtype == jnp.uint8
    assert reference.shape == lead
    assert int(jnp.max(jnp.maximum(chosen, rejected))) == max(classes, 2) - 1
    assert 0.1 < float(jnp.mean(chosen != rejected)) < 0.4
    differs = np.asarray(chosen != rejected).reshape(*lead, -1)
    assert differs.any(axis=-1).all()
    assert not np.array_equal(inputs[0][0], inputs[1][0])
    assert not np.array_equal(inputs[0][1], inputs[1][1])

  def test_masks_stay_class_ids_with_256_classes(self, few_inputs):
    given = resolve(classes=256, disagreement=1.0)
    _, chosen, rejected, _ = loss.make_inputs(jax.random.key(0), given)[0]
    assert bool(jnp.all(chosen != rejected))

  def test_bytes_at_least_by_hand(self):
    # 8 x 4 x 6 pixels: 4 float32 logits in, 4 gradients out, one byte of each of two masks.
    assert loss.work_of(resolve()) == timing.Work(8, 8, 192, 192 * (16 + 16 + 2))
    work = loss.work_of(resolve(classes=1, dtype="bfloat16", pairs=3))
    assert work == timing.Work(8, 24, 192, 192 * (2 + 2 + 6))

  @pytest.mark.parametrize("classes, pairs, dtype", [(4, 1, "float32"), (1, 2, "bfloat16")])
  def test_variants_agree(self, few_inputs, classes, pairs, dtype):
    given = resolve(classes=classes, pairs=pairs, dtype=dtype)
    inputs = loss.make_inputs(jax.random.key(1), given)
    work = loss.work_of(given)
    variants = [
      timing.jax_variant(name, work, function, inputs) for name, function in loss.VARIANTS.items()
    ]
    loss.check_agreement(variants, dtype, None)
    value, grad = variants[0].run(0)
    assert abs(float(value) - math.log(2)) > 1e-3 and float(jnp.max(jnp.abs(grad))) > 0
    wrong_value = variants[1]._replace(run=lambda turn: (value * 1.05, grad))
    with pytest.raises(errors.BenchmarkError, match="gather: value"):
      loss.check_agreement([variants[0], wrong_value], dtype, None)
    off = 0.1 * float(jnp.max(jnp.abs(grad)))
    wrong_grad = variants[1]._replace(run=lambda turn: (value, grad.at[0, 0, 0, 0].add(off)))
    with pytest.raises(errors.BenchmarkError, match="nothing was timed"):
      loss.check_agreement([variants[0], wrong_grad], dtype, None)

  def test_sizes_too_large_for_the_memory_are_left_out(self, few_inputs, monkeypatch, capsys):
    monkeypatch.setattr(loss, "_too_large", lambda o: "too much" if o.shape[0] > 8 else None)
    monkeypatch.setattr(loss, "run_at", lambda o, other, slow: [])
    loss.run(resolve(sizes=(8, 9)), None)
    assert "loss at 21 images: left out, too much" in capsys.readouterr().out
    monkeypatch.undo()
    assert "GB are free" in loss._too_large(resolve(shape=(10**9, 64, 64)))
    assert loss._too_large(resolve()) is None

  def test_a_slow_variant_leaves_the_sweep_but_not_the_shape_asked_for(self, monkeypatch):
    seen = {}

    def run_at(o, other, slow):
      seen[o.shape[0]] = sorted(slow)
      return [{"variant": "slow", "status": "ok", "seconds_median": 0.2 * o.shape[0]}]

    monkeypatch.setattr(loss, "run_at", run_at)
    loss.run(resolve(shape=(16, 16, 16), sizes=(8, 10, 11, 13)), None)
    assert seen == {1: [], 4: [], 8: ["slow"], 16: [], 32: ["slow"]}


def test_program_writes_json_table_and_plot(tmp_path):
  """The whole program, in a process of its own with one device."""
  path = tmp_path / "loss.json"
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.benchmark", "--benchmark=loss", "--shape=2,4,4", "--sizes=",
      "--devices=1", f"--output={path}",
    ],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert "JAX, log-softmax and gather" in done.stdout
  content = json.loads(path.read_text())
  assert content["device_kind"] == "cpu" and content["num_devices"] == 1
  assert {"python", "jax", "jaxlib"} <= set(content["versions"])
  assert "--benchmark=loss" in content["command"] and "median" in content["method"]
  assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  assert {tuple(row["shape"]) for row in content["results"]} == {(2, 4, 4)}
  for row in content["results"]:
    assert row["status"] == "ok" and row["benchmark"] == "loss" and row["samples"] == 20
    assert row["seconds_min"] <= row["seconds_p25"] <= row["seconds_median"] <= row["seconds_p75"]
    assert row["compile_seconds"] > 0 and row["peak_memory_bytes"] > 0
    assert row["peak_memory_source"] == "compiled.memory_analysis"
    assert row["bandwidth_bytes_per_second"] * row["seconds_median"] == pytest.approx(
      row["bytes_at_least"]
    )
  pairs = [r["pairs_per_second"] for r in content["results"] if r["variant"] == loss.OURS]
  assert all(rate > 0 for rate in pairs)


def test_refusals_name_the_flag():
  with pytest.raises(errors.BenchmarkError, match="--devices=1"):
    run.load_peers()  # eight simulated devices
  with pytest.raises(errors.ConfigError, match="--shape"):
    loss.make_inputs(jax.random.key(0), resolve(shape=(3, 4, 4)))


def test_without_torch_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.delitem(sys.modules, "rndpo_jax.benchmark.torch_losses", raising=False)
  monkeypatch.delattr(benchmark, "torch_losses", raising=False)  # where a test has imported it
  with pytest.raises(errors.BenchmarkError, match=r"\.\[peers\]"):
    run.load_peers()


def test_peers_agree(few_inputs):
  pytest.importorskip("torch", reason="PyTorch, the extra 'peers', is not installed")
  from rndpo_jax.benchmark import torch_losses

  for changes in ({}, {"classes": 1, "pairs": 2, "dtype": "bfloat16"}):
    given = resolve(**changes)
    device = jax.devices()[0]
    inputs = [jax.device_put(i, device) for i in loss.make_inputs(jax.random.key(1), given)]
    work = loss.work_of(given)
    ours = timing.jax_variant(loss.OURS, work, loss.VARIANTS[loss.OURS], inputs)
    eager = [
      make()
      for name, make in torch_losses.loss_makers(inputs, work, loss.BETA).items()
      if "eager" in name
    ]
    loss.check_agreement([ours, *eager], given.dtype, torch_losses)
    off = torch_losses.loss_makers(inputs, work, 1.1 * loss.BETA)["PyTorch eager, cancelled"]()
    with pytest.raises(errors.BenchmarkError, match="eager, cancelled: value"):
      loss.check_agreement([ours, off], given.dtype, torch_losses)


def test_tables_show_what_is_missing():
  setup = {"benchmark": "loss", "shape": [1], "classes": 2, "dtype": "float32"}
  row = {**setup, "variant": "x", "framework": "torch", "status": "not available", "reason": "why"}
  (table,) = tables.tables([row])
  assert list(table.columns[0].cells) == ["x"]
  assert list(table.columns[-1].cells) == ["not available"]
