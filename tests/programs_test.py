"""One small config compiled for a TPU slice that is not here."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import killable
import pytest
from jax.sharding import SingleDeviceSharding

from rndpo_jax.errors import ConfigError
from rndpo_jax.planning import chips, program_inputs, programs, roofline
from rndpo_jax.planning import topology as topology_lib
from rndpo_jax.runtime import sharding

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed; it comes with the extra tpu-aot",
)
BATCH = 2
PROGRAMS = ("mine", "base", "finetune", "validate", "evaluate", "resize")


@pytest.fixture(scope="module")
def slice_of_four():
  return topology_lib.open_topology("v5e:2x2")


def test_programs_follow_the_stages_without_libtpu(tiny_config):
  """Lowered alone, for the devices that are here, with options that change what a step holds."""
  config = tiny_config(finetune__ema_decay=0.9, finetune__reference="online", judge__name="learned")
  mesh = sharding.make_mesh()
  found = programs.programs(
    config,
    program_inputs.problem_of(config, 1, 0),
    mesh,
    dict.fromkeys(PROGRAMS, BATCH * mesh.size),
  )
  outputs = {name: lower().out_info for name, lower in found.items()}
  images = BATCH * mesh.size
  # 16 x 16 pixels of two classes: one bit plane of 32 bytes.
  assert outputs["mine"]["chosen"].shape == (images, 2, 1, 32)
  assert outputs["mine"]["scores"].shape == (images, 4)
  assert set(outputs["validate"]) == {"val_dice", "val_kl", "val_entropy", "valid"}
  assert outputs["validate"]["val_dice"].shape == (images,)
  # Grids of 16 x 16 are rounded up.
  assert outputs["resize"].shape == (images, 64, 64) and outputs["resize"].dtype == "uint8"
  assert outputs["evaluate"].shape == (images, 16, 16, 2) and outputs["evaluate"].dtype == "float32"
  for name in ("base", "finetune"):
    state, metrics = outputs[name]
    assert metrics["loss"].shape == () and (state.ema is not None) == (name == "finetune")


def test_lanes_are_those_of_the_devices_that_it_is_compiled_for(tiny_config):
  mesh, texts = sharding.make_mesh(), []
  for lanes in (0, 1, 128):
    config = tiny_config(model__lanes=lanes)
    lowers = programs.programs(
      config, program_inputs.problem_of(config, 1, 0), mesh, {"evaluate": mesh.size}
    )
    texts.append(lowers["evaluate"]().as_text())
  assert texts[0] == texts[1] != texts[2]


@needs_libtpu
@pytest.mark.parametrize("name", chips.CHIPS)
def test_slices_of_the_scaling_table_can_be_opened(name):
  assert set(chips.CHIPS[name].slices) == {8, 64, 256}
  for count, shape in chips.CHIPS[name].slices.items():
    chip, mesh = topology_lib.open_topology(f"{name}:{shape}")
    assert chip is chips.CHIPS[name] and mesh.size == count


@needs_libtpu
@pytest.mark.parametrize("name,shape", [("v5e", "2x2"), ("v6e", "2x2"), ("v5p", "2x2x1")])
def test_memory_is_what_the_compiler_allows(name, shape):
  """A TiB is more than any chip has; the error says what it has."""
  chip, mesh = topology_lib.open_topology(f"{name}:{shape}")
  one_device = SingleDeviceSharding(mesh.devices.flat[0])
  large = jax.ShapeDtypeStruct((2**38,), jnp.float32, sharding=one_device)
  with pytest.raises(jax.errors.JaxRuntimeError) as refused:
    jax.jit(lambda x: x + 1).lower(large).compile()
  assert f"exceeds available HBM ({chip.memory / 2**30:.2f}G)" in str(refused.value)


@needs_libtpu
def test_rows_of_a_batch_are_where_their_process_reads_them():
  """A slice of four hosts, which the mesh that suits its wires would go through out of order."""
  _, mesh = topology_lib.open_topology("v5e:4x4")
  owners = [device.process_index for device in mesh.devices.flat]
  assert owners == sorted(owners) and len(set(owners)) == 4


@needs_libtpu
def test_steps_reduce_gradients_and_mining_is_silent(slice_of_four, tiny_config):
  _, mesh = slice_of_four
  assert mesh.size == 4
  config = tiny_config()
  folded_programs = programs.programs(
    config,
    program_inputs.problem_of(config, 1, 0),
    mesh,
    dict.fromkeys(PROGRAMS, BATCH * mesh.size),
  )
  assert set(folded_programs) == set(PROGRAMS)
  plain = programs.programs(
    tiny_config(model__lanes=1),
    program_inputs.problem_of(config, 1, 0),
    mesh,
    {"finetune": BATCH * mesh.size},
  )
  folded, step = (roofline.measure(of["finetune"]().compile()) for of in (folded_programs, plain))
  # 6,400 parameters of 4 bytes and a few metrics, whatever the number of images.
  reduced, by_lanes = (
    sum(size for kind, size in report.collectives if kind == "all-reduce")
    for report in (step, folded)
  )
  assert 4 * 6_000 < reduced < 4 * 7_000
  assert 4 * 6_000 < by_lanes < 4 * 7_000  # kernels folded by 128 / 8 are many times as large
  assert 0 < step.memory < 2**30 and step.flops > 0 and step.hbm_bytes > 0
  for name in ("mine", "evaluate", "resize"):
    assert roofline.measure(folded_programs[name]().compile()).collectives == []


@needs_libtpu
def test_micro_batches_cost_what_the_batch_does(slice_of_four, tiny_config):
  """A loop's body counted once would give a quarter; the gradients are reduced after the loop."""
  _, mesh = slice_of_four
  reports = []
  for parts in (1, 4):
    config = tiny_config(finetune__accumulate_steps=parts)
    lowered = programs.programs(
      config, program_inputs.problem_of(config, 1, 0), mesh, {"finetune": 32 * mesh.size}
    )
    reports.append(roofline.measure(lowered["finetune"]().compile(), parts))
  whole, by_parts = reports
  # Each part pays for folding the kernels and for the loop.
  assert 0.9 < by_parts.flops / whole.flops < 1.5
  assert 0.9 < by_parts.cycles / whole.cycles < 6
  assert {kind for report in reports for kind, _ in report.collectives} == {"all-reduce"}
  # Each chip adds up its own gradients of all parts first; a few metrics are reduced in each part.
  sums = [sum(size for _, size in report.collectives) for report in reports]
  assert 1 < sums[1] / sums[0] < 1.05
  assert len(by_parts.collectives) == len(whole.collectives) + 3


@needs_libtpu
def test_loss_reads_and_writes_close_to_the_minimum(slice_of_four):
  _, mesh = slice_of_four
  lowered, minimum = topology_lib.lower_loss(mesh, (16, 256, 256, 4), "float32")
  assert minimum == 16 * 256 * 256 * (2 * 4 * 4 + 2)
  found = roofline.measure(lowered.compile())
  assert 0.99 * minimum < found.hbm_bytes < 1.1 * minimum


def test_unknown_chip_or_number_of_classes_raises(tiny_config):
  with pytest.raises(ConfigError, match=r"--topology: found 'v9z:2x2'"):
    topology_lib.open_topology("v9z:2x2")
  with pytest.raises(ConfigError, match="--num_classes"):
    program_inputs.problem_of(tiny_config(data__num_classes=0), 1, 0)


@needs_libtpu
def test_a_slice_that_does_not_exist_raises():
  with pytest.raises(ConfigError, match="v5e:3x5"):
    topology_lib.open_topology("v5e:3x5")


@pytest.fixture(scope="module")
def compile_tpu():
  """compile_tpu(*arguments) -> (exit code, what it printed), each in a process of its own."""
  with killable.programs("launch.compile_tpu") as program:
    yield functools.partial(program, "--config=tests/tiny_config.py", "--topology=v5e:2x2")


@pytest.mark.parametrize(
  "arguments,error",
  [
    (["--config.model.widht=8"], "widht"),
    (["--programs=base,tune"], "--programs: found 'tune'"),
    (
      ["--config.finetune.accumulate_steps=4", "--batch_per_device=6", "--programs=base,finetune"],
      "--batch_per_device: found 6, no multiple of config.finetune.accumulate_steps=4; use 8,",
    ),
    (
      ["--config.base.accumulate_steps=4", "--batch_per_device=1", "--programs=base"],
      "--batch_per_device: found 1, no multiple of config.base.accumulate_steps=4; use 4,",
    ),
  ],
)
def test_errors_of_the_program_are_one_line(compile_tpu, arguments, error):
  code, said = compile_tpu(*arguments)
  assert code == 1
  assert said.startswith("error: ") and error in said and said.count("\n") == 1


@needs_libtpu
def test_the_program_tells_what_a_slice_would_need(compile_tpu):
  """Only the step that is compiled has to suit its micro-batches."""
  code, said = compile_tpu(
    "--programs=finetune", "--batch_per_device=2", "--config.base.accumulate_steps=4"
  )
  assert code == 0, said
  lines = said.splitlines()
  assert lines[0] == "v5e:2x2, 2 images a chip of (16, 16), 2 classes"
  assert re.fullmatch(
    r"finetune  memory 0\.\d\d of 15\.75 GiB, 0\.\d GFLOP, 0\.\d\d GB accessed \(0\.0\d in HBM\), "
    r"at least 0\.\d\d ms \(bandwidth\), \d\.\d Mcycles estimated, at most \d+ images/s a chip; "
    r"\d all-reduce of 0\.02\d MB",
    lines[1],
  )
  assert re.fullmatch(
    r" +weak scaling, nothing overlapped: 0\.\d{3} at 8 chips, 0\.\d{3} at 64 chips, "
    r"0\.\d{3} at 256 chips",
    lines[2],
  )
  assert len(lines) == 3
