"""Steps, mining and input of the benchmarks: what they run, never how fast."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rndpo_jax import errors, types
from rndpo_jax.benchmark import input, mine, network, options, population, step, timing
from rndpo_jax.losses import bit_planes
from rndpo_jax.runtime import sharding


@pytest.fixture(scope="module")
def small_unet():
  """(options, segmenter, params) of a small U-Net."""
  given = {"shape": (8, 4, 6), "width": 4, "depth": 2, "disagreement": 0.25}
  chosen = options.resolve("step", given)["step"]
  return chosen, *network.make(chosen)


class TestStep:
  def test_batches_are_as_the_stage_takes_them(self, small_unet):
    given = small_unet[0]
    batches = step.make_batches(jax.random.key(0), given, 3, sharding.make_mesh())
    first, second, *_ = [batch.pairs for batch in batches]
    masks = [bit_planes.unpack(mask, (4, 6), 2) for mask in (first.chosen, first.rejected)]
    assert masks[0].shape == (8, 3, 4, 6)
    assert 0.1 < float(jnp.mean(masks[0] != masks[1])) < 0.45
    assert first.images.shape == (8, 4, 6, 1) and first.reference_margin.shape == (8, 3)
    assert not np.array_equal(first.images, second.images)
    labelled = step.make_batches(jax.random.key(0), given, 0, sharding.make_mesh())[0]
    assert set(labelled) == {"image", "label"} and labelled["label"].shape == (8, 4, 6)
    with pytest.raises(errors.ConfigError, match="--shape"):
      odd = given._replace(shape=(3, 4, 6))
      step.make_batches(jax.random.key(0), odd, 0, sharding.make_mesh())

  def test_steps_go_on_from_each_other(self, small_unet):
    given, segmenter, params = small_unet
    mesh = sharding.make_mesh()
    batches = step.make_batches(jax.random.key(0), given, 2, mesh)
    turns = []

    def batch_of(turn):
      turns.append(turn)
      return batches[0]

    variant = step.step_variant(
      "x", loss_fn=step.preference_loss_fn(segmenter, given, "cached"), batch_of=batch_of,
      options=given, pairs=2, optimizer=optax.adam(1e-2), mesh=mesh, params=params,
    )  # fmt: skip
    seen = [float(variant.run(turn)["loss"]) for turn in range(4)]
    assert seen[0] > seen[1] > seen[2] > seen[3]  # one batch, again and again
    assert turns == [0, 0, 1, 2, 3]  # the first to compile for
    floats = 3 * sum(leaf.size for leaf in jax.tree.leaves(params))
    state = 4 * floats + 4 + 4  # parameters and both moments; the step, and Adam's own count
    # Images f32; 24 pixels in 3 bytes of each mask; margins, log-probabilities and weights f32,
    # and a volume an image.
    batch = 8 * 24 * 4 + 2 * 8 * 2 * 3 + 3 * 8 * 2 * 4 + 8 * 4
    assert variant.work == timing.Work(8, 16, 8 * 24, 2 * state + batch)

  def test_supervised_loss_is_cross_entropy(self, small_unet):
    given, segmenter, params = small_unet
    batch = step.make_batches(jax.random.key(0), given, 0, sharding.make_mesh())[0]
    inputs = types.StepInputs(jax.random.key(0))
    value, metrics = step.supervised_loss_fn(segmenter)(params, batch, inputs)
    logits = np.asarray(segmenter.apply(params, batch["image"]), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = np.asarray(batch["label"], np.int64)
    picked = np.take_along_axis(log_probs, labels[..., None], -1)
    np.testing.assert_allclose(value, -picked.mean(), rtol=1e-5)
    assert metrics == {}


class TestPopulation:
  def test_every_variant_takes_a_step_of_each_member(self, small_unet):
    changes = {"pairs": 2, "members": 4, "seeds": 2}
    given = small_unet[0]._replace(**changes)
    mesh = sharding.make_mesh()
    batches = step.make_batches(jax.random.key(0), given, 2, mesh)
    apart = population.apart(given, batches[:1], mesh)
    variants = [apart, *(population.together(given, batches[:1], form) for form in ("vmap", "map"))]
    first, second = ([v.run(turn) for v in variants] for turn in range(2))
    assert len(first[0]) == 4 and all(aux["loss"].shape == (2, 2) for aux in first[1:])
    # One batch for all and one start: the margins are equal, and the second step has moved on.
    margins = np.array([aux["h_mean"] for aux in first[0]])
    for aux in first[1:]:
      np.testing.assert_allclose(np.ravel(aux["h_mean"]), margins, rtol=1e-4)
    assert all((b["loss"] < a["loss"]).all() for a, b in zip(first[1:], second[1:], strict=True))
    assert all(b["loss"] < a["loss"] for a, b in zip(first[0], second[0], strict=True))
    work = variants[0].work
    assert (work.images, work.pairs, work.pixels) == (32, 64, 32 * 24)
    # The population adds a flag a member, and counts its steps once instead of for each.
    assert {v.work.bytes_at_least - work.bytes_at_least for v in variants[1:]} == {2 * 4}

  def test_rows_tell_steps_of_members(self, small_unet, monkeypatch):
    given = small_unet[0]._replace(pairs=1, members=4, seeds=2)

    def fake(name):
      return timing.Variant(name, "jax", timing.Work(1, 1, 1, 1), None, None)

    def sample(variants, repeats, calls):
      return np.full((len(variants), 1), 0.5), [1] * len(variants)

    monkeypatch.setattr(step, "copy_of_64_mib", lambda: fake(timing.COPY))
    monkeypatch.setattr(population, "apart", lambda *_: fake(population.APART))
    monkeypatch.setattr(population, "together", lambda o, b, form: fake(population.TOGETHER[form]))
    monkeypatch.setattr(timing, "sample", sample)
    rows = population.run(given, None)
    assert [row.get("member_steps_per_second") for row in rows] == [None, 8.0, 8.0, 8.0]
    assert rows[1]["members"] == 4 and rows[1]["seeds"] == 2


class TestMine:
  def test_both_ways_give_k_masks(self, small_unet):
    given, segmenter, params = small_unet
    images = mine.make_images(given, sharding.make_mesh())
    work = timing.Work(8, 0, 192, 1)
    full = mine.forward_variant(segmenter, params, images, work).run(1)
    cfg = network.make_config(given)
    shared = mine.sampling_variant(segmenter, params, images, work, cfg, mine.DROPOUT_MIX)
    masks = shared.run(1)
    assert len(full) == mine.K == masks.shape[1] and full[0].shape == (8, 4, 6)
    assert masks.dtype == full[0].dtype == jnp.uint8
    for some in (np.stack(full, axis=1), np.asarray(masks)):
      differs = (some[:, :1] != some[:, 1:]).any(axis=(0, 2, 3))
      assert differs.all()  # every pass has its own dropout


class TestInput:
  def test_a_sample_starts_with_no_batch_ready(self):
    seen = []
    variant = timing.Variant(
      "x", "jax", timing.Work(1, 1, 1, 1), lambda turn: seen.append("run"),
      lambda outputs: seen.append("wait"),
    )  # fmt: skip
    input.settled(variant).settle()
    assert seen == ["run"] * input.SETTLE_STEPS + ["wait"]
    data = network.make_config(options.resolve("input", {})["input"]).data
    assert input.SETTLE_STEPS > data.prefetch + 4  # Grain's buffer holds 4

  def test_the_phantom_has_its_classes(self):
    with pytest.raises(errors.BenchmarkError, match="--classes: found 3"):
      options.resolve("input", {"classes": 3})


def test_peer_network_is_ours(small_unet):
  pytest.importorskip("torch", reason="PyTorch, the extra 'peers', is not installed")
  from rndpo_jax.benchmark import torch_unet

  given, segmenter, params = small_unet
  images = jax.random.normal(jax.random.key(0), (8, 4, 6, 1))
  net = torch_unet.make(given, params)
  torch_unet.check_logits(net, given, segmenter, params, images)
  with pytest.raises(errors.BenchmarkError, match="PyTorch's U-Net takes"):
    torch_unet.make(given._replace(width=8), params)
  other = segmenter._replace(apply=lambda p, x: 1.01 * segmenter.apply(p, x))
  with pytest.raises(errors.BenchmarkError, match="logits differ"):
    torch_unet.check_logits(net, given, other, params, images)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, on a machine without a GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_compiles_the_network_whole(small_unet, dtype):
  pytest.importorskip("torch", reason="PyTorch, the extra 'peers', is not installed")
  from rndpo_jax.benchmark import torch_unet

  given, segmenter, params = small_unet
  images = [jax.random.normal(jax.random.key(0), (8, 4, 6, 1))]
  work = timing.Work(8, 0, 8 * 24, 1)
  made = torch_unet.sampling_variant(
    given._replace(dtype=dtype), segmenter, params, images, work, count=2, compiled=True
  )
  assert isinstance(made, timing.Variant), made.reason
  assert [mask.shape for mask in made.run(0)] == [(8, 4, 6)] * 2


@pytest.mark.parametrize("pairs", [0, 2])
def test_steps_of_pytorch_start_with_our_loss_and_gradient(small_unet, pairs):
  pytest.importorskip("torch", reason="PyTorch, the extra 'peers', is not installed")
  from rndpo_jax.benchmark import torch_unet

  given, segmenter, params = small_unet
  batches = step.make_batches(jax.random.key(0), given, pairs, sharding.make_mesh())[:1]
  batches = jax.device_put(batches, jax.devices()[0])
  loss_fn = (
    step.preference_loss_fn(segmenter, given, "cached")
    if pairs
    else step.supervised_loss_fn(segmenter)
  )
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  (value, _), grads = value_and_grad(params, batches[0], types.StepInputs(None))
  expected = {"loss": value, "grad_norm": optax.tree.norm(grads)}
  work = timing.Work(8, 8 * pairs, 8 * 24, 1)
  made = torch_unet.step_variant(given, params, batches, work, expected, compiled=False)
  assert made.name == ("PyTorch eager, RN-DPO, 2 pairs" if pairs else "PyTorch eager, supervised")
  assert float(made.run(0)) < float(value)  # `variant` took the first step
  for name in expected:
    wrong = {**expected, name: 1.1 * expected[name]}
    with pytest.raises(errors.BenchmarkError, match="differ from ours"):
      torch_unet.step_variant(given, params, batches, work, wrong, compiled=False)
