"""Training shared by data, fsdp and space is the training of one device, and stays shared."""

import functools
from collections import Counter

import jax
import numpy as np
import optax
import pytest
from mesh_problem import BATCH, CLASSES, MIN_SIZE, PAIRS, PLANE, VOLUME, mesh_of, network, problem

from rndpo_jax import types
from rndpo_jax.config import base_config
from rndpo_jax.planning import hlo
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import base, finetune
from rndpo_jax.training import train_step

# The gradient stands in the state after a step.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def compile_step(kind, size, mesh, accumulate_steps=1, depth=2):
  """(compiled step, state, (batch, key, reference)) of the base's or fine-tuning's training."""
  params, batch = problem(size, depth)
  segmenter = network(len(size), depth)
  segmenter = segmenter._replace(apply=sharding.data_parallel(segmenter.apply, mesh))
  if kind == "terms":
    config = base_config()
    config.data.size = size
    config.augment.update({"turn": 0.0, "gamma": 0.0, "intensity": 0.0})  # the base has them
    config.strong.gamma = 0.0
    terms = config.finetune.terms
    for name in ("weak_to_strong", "consistency"):
      terms[name].weight = 1.0
    terms.preference.weight = 0.0
    terms.weak_to_strong.threshold = 0.4
    terms.consistency.max_entropy = 0.95
    terms.consistency.passes = 1
    loss_fn = finetune.make_loss_fn(config, segmenter.apply, num_classes=CLASSES)
    shown = {"image": batch.pairs.images[::-1]}
    batch = types.FinetuneBatch(unlabelled=shown)
  elif kind == "finetune":
    config = base_config()
    config.data.size = size
    config.finetune.reference = "online" if size == PLANE else "cached"
    loss_fn = finetune.make_loss_fn(config, segmenter.apply, num_classes=CLASSES)
  else:
    batch = batch.labelled
    options = base_config().augment.to_dict()
    options |= {"elastic": 0.5} if size == PLANE else {"turn": 0.0}
    ignored = kind == "base, ignored pixels"
    if ignored:
      labels = np.where(batch["label"] == CLASSES - 1, types.IGNORED, batch["label"])
      batch = {**batch, "label": labels.astype(np.uint8)}
    loss_fn = base.make_loss_fn(
      segmenter, dice_weight=1.0, augment_options=options, has_ignored=ignored
    )
  step = train_step.make_train_step(loss_fn, OPTIMIZER, mesh, accumulate_steps, 0.5, MIN_SIZE)
  state = train_step.make_state(params, OPTIMIZER, mesh, True, MIN_SIZE)
  batch = sharding.put_batch(batch, mesh)
  reference = jax.tree.map(lambda x: np.float32(0.9) * x, params)
  arguments = (batch, jax.random.key(1), sharding.put_params(reference, mesh, MIN_SIZE))
  # The partitioner and the passes on arrays run all the same; machine code is made sooner.
  fast = {"xla_backend_optimization_level": 0}
  lowered = step.lower(state, *arguments)
  return lowered.compile(compiler_options=fast), state, arguments


def take(compiled, state, arguments):
  return compiled(state, *arguments)


@functools.cache
def alone(kind, size, accumulate_steps=1, depth=2):
  """(bytes of the step's program, result of a step) of one device."""
  compiled, state, arguments = compile_step(kind, size, mesh_of(1, 1, 1), accumulate_steps, depth)
  return num_bytes(compiled), jax.device_get(take(compiled, state, arguments))


def num_bytes(compiled):
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def volume_step():
  """The fine-tuning step of volumes on 2 x 2 x 2 devices; its result and that of the next one.

  In the form that accelerators get, whose collectives are what counts.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    compiled, state, arguments = compile_step("finetune", VOLUME, mesh_of(2, 2, 2))
  first = jax.device_get(take(compiled, state, arguments))
  # A program takes its arguments where it was compiled for them: the state stays where it was.
  state = train_step.make_state(problem(VOLUME)[0], OPTIMIZER, mesh_of(2, 2, 2), True, MIN_SIZE)
  state, _ = take(compiled, state, arguments)
  return compiled, first, take(compiled, state, arguments)[0]


def assert_same(one, shared, size):
  """Metrics, parameters, their average and their gradients after a step of the same state.

  Sums of 10^3 to 10^4 float32 terms in another order differ by some 1e-6 of what is added up; the
  gradient of a normalisation is a difference of such sums. h and log-ratios are differences of sums
  over D with terms near 1, of which the metrics show no size: 4e-7 a pixel.
  """
  (state, metrics), (other, other_metrics) = one, shared
  for name, value in metrics.items():
    is_difference = name.startswith("h_") or name.endswith("_log_ratio")
    near = 4e-7 * np.prod(size) if is_difference else 1e-6
    np.testing.assert_allclose(other_metrics[name], value, rtol=2e-5, atol=near, err_msg=name)
  trees = [(s.params, s.ema, s.opt_state[0].trace) for s in (state, other)]
  leaves = jax.tree.leaves_with_path(trees[0])
  for (path, x), y in zip(leaves, jax.tree.leaves(trees[1]), strict=True):
    bound = 2e-5 * np.max(np.abs(x))
    np.testing.assert_allclose(y, x, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  "kind,size,depth,axes,parts,unshared",
  [
    ("base, ignored pixels", PLANE, 1, (2, 2, 2), 1, 4),
    ("base", VOLUME, 2, (2, 2, 2), 1, 4),
    ("terms", PLANE, 1, (2, 2, 2), 1, 4),
    ("finetune", PLANE, 2, (1, 2, 4), 2, 2),
    ("finetune", PLANE, 1, (2, 2, 1), 1, 2),
    ("finetune", PLANE, 2, (1, 2, 1), 2, 1),
  ],
)
def test_a_step_on_several_devices_is_that_of_one(kind, size, depth, axes, parts, unshared):
  """Also with dropout and augmentation, which draw by place, and in micro-batches."""
  memory, result = alone(kind, size, parts, depth)
  shared = compile_step(kind, size, mesh_of(*axes), parts, depth)
  # An eighth of the activations, borders and the parameters; if those of an image were not shared,
  # it would be this part.
  assert num_bytes(shared[0]) < 0.9 * memory / unshared
  assert_same(result, jax.device_get(take(*shared)), size)


def test_a_fine_tuning_step_of_volumes_on_eight_devices_is_that_of_one(volume_step):
  assert_same(alone("finetune", VOLUME)[1], volume_step[1], VOLUME)


def test_volumes_are_shared_by_borders_and_never_gathered(volume_step):
  """What is gathered are large parameters, once each, and numbers a pair."""
  params, _ = problem(VOLUME)
  found = hlo.collectives(volume_step[0].as_text())
  gathered = Counter(size for kind, size in found if kind == "all-gather")
  large = Counter(4 * x.size for x in jax.tree.leaves(params) if x.size >= MIN_SIZE)
  rest = gathered - large
  assert gathered - rest == large and len(large) == 3
  # The quantiles sort the pairs; a mask of an image takes a byte a voxel, activations far more.
  assert max(rest, default=0) <= 4 * BATCH * PAIRS < np.prod(VOLUME) / 10
  kinds = Counter(kind for kind, _ in found)
  assert kinds["collective-permute"] > 10 and "all-to-all" not in kinds
  # A border is one plane of 12 channels, concatenated of 8 and 4.
  borders = [size for kind, size in found if kind == "collective-permute"]
  assert max(borders) <= 4 * 12 * np.prod(VOLUME[1:])


def test_gradients_of_folded_kernels_are_reduced_as_those_of_plain_ones(monkeypatch):
  """Folded by 16, or 128 / width, the kernels are hundreds of times as large."""
  reduced = []
  for lanes in (1, 128):
    folded = functools.partial(network, lanes=lanes)
    monkeypatch.setitem(globals(), "network", folded)
    compiled, *_ = compile_step("finetune", PLANE, mesh_of(2, 2, 1), depth=1)
    found = hlo.collectives(compiled.as_text())
    reduced.append(sum(size for kind, size in found if kind == "all-reduce"))
    monkeypatch.undo()
  params = sum(4 * x.size for x in jax.tree.leaves(problem(PLANE, 1)[0]))
  assert params <= reduced[1] <= reduced[0] < 1.2 * params


def test_large_parameters_and_their_moments_lie_in_parts(volume_step):
  state = volume_step[2]
  trees = (state.params, state.ema, state.opt_state[0].trace)
  shared = 0
  for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
    first = leaves[0]
    part = first.addressable_shards[0].data.size
    assert part == (first.size // 2 if first.size >= MIN_SIZE else first.size)
    shared += part < first.size
    assert all(leaf.sharding == first.sharding for leaf in leaves)
  assert shared == 3 and state.step.is_fully_replicated
