"""The parts of the GPU report: what each runs, at which shapes, and the goals of its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Part(NamedTuple):
  """One part of the report.

  Attributes:
    name: by which it is asked for.
    what: it measures.
    function: module and function of `rndpo_jax.benchmark` that does it.
    limit_seconds: after which it is ended.
    settings: keyword arguments of the function.
    tiny: those that differ in a rehearsal.
    goals: figure -> (sign, value), the goals that issue 17 sets.
    essential: whether it is among those of which a first call must give the figures.
    same_code_as: a part whose rehearsal is this one's too; "" if there is none.
  """

  name: str
  what: str
  function: str
  limit_seconds: float
  settings: Mapping[str, Any]
  tiny: Mapping[str, Any]
  goals: Mapping[str, tuple[str, float]] = {}
  essential: bool = True
  same_code_as: str = ""


_STEP_GOALS = {
  "RN-DPO, 1 pair, over supervised": ("<=", 1.10),
  "RN-DPO, 4 pairs, over supervised": ("<=", 1.25),
  "supervised over PyTorch compiled": ("<=", 1.0),
}
_PLANE = {"shape": (16, 512, 512), "width": 32}
_VOLUME = {"shape": (2, 128, 128, 128), "width": 32}
_TINY_PLANE = {"shape": (2, 8, 8), "width": 4, "depth": 1, "matrix": 64}
_TINY_JOB = (
  "--config.data.num_labelled=4", "--config.data.num_val=3", "--config.data.num_test=3",
  "--config.data.phantom.num_cases=24", "--config.model.width=4", "--config.model.depth=1",
  "--config.base.num_steps=4", "--config.base.batch_size=4", "--config.base.warmup_steps=1",
  "--config.base.eval_every_steps=2", "--config.base.log_every_steps=2",
  "--config.mine.batch_size=4", "--config.mine.num_shards=1", "--config.finetune.num_steps=4",
  "--config.finetune.batch_size=4", "--config.finetune.eval_every_steps=2",
  "--config.finetune.log_every_steps=2", "--config.judge.num_bootstrap=20",
  "--config.judge.gate.action=off", "--config.base.augment=False",
  "--config.finetune.augment=False", "--config.finetune.reference=cached",
  "--config.proposals.mix=base:1,threshold:3", "--config.mine.pairs_per_image=2",
)  # fmt: skip
_TINY_QUICKSTART = ("--config.data.size=(16,16)", *_TINY_JOB)
_TINY_VOLUME = {"shape": (2, 4, 4, 4), "width": 4, "depth": 1, "matrix": 64}


def _step(name, what, limit_seconds, shape, tiny, dtype, essential, same="") -> Part:
  settings = {**shape, "depth": 4, "dtype": dtype, "matrix": 8192}
  return Part(
    name, what, "gpu_parts.step", limit_seconds, settings, tiny, _STEP_GOALS, essential, same
  )  # fmt: skip


# The most valuable first; each is run in its turn while there is time.
PARTS = (
  Part(
    "device", "copy bandwidth at several sizes; matrix rate", "gpu_parts.device", 50,
    {"copy_mib": (1, 16, 64, 256, 1024, 4096), "matrix": 8192},
    {"copy_mib": (1,), "matrix": 64},
  ),
  Part(
    "loss", "preference loss, value and gradient, beside PyTorch and naive JAX", "gpu_parts.loss",
    120,
    {"cases": (
      ((64, 512, 512), 4, "bfloat16", 1), ((16, 256, 256), 4, "float32", 1),
      ((64, 512, 512), 4, "bfloat16", 4), ((16, 256, 256), 4, "float32", 4),
    )},
    {"cases": (((2, 4, 4), 4, "float32", 1), ((2, 4, 4), 4, "bfloat16", 4))},
    {"times as fast as torch.compile, log-softmax": (">=", 4.0),
     "share of copy bandwidth": (">=", 0.85)},
  ),
  _step("step", "2D step, bfloat16", 110, _PLANE, _TINY_PLANE, "bfloat16", True),
  Part(
    "mine", "K = 8 proposals against 8 forward passes; the mining program", "gpu_parts.mine", 90,
    {"shape": (16, 256, 256), "width": 32, "depth": 4, "dtype": "bfloat16"},
    {"shape": (2, 8, 8), "width": 4, "depth": 1},
    {"sampling over 8 forward passes": ("<=", 0.6)},
  ),
  Part(
    "population", "8 fine-tunings by vmap against one after another", "gpu_parts.population", 70,
    {"shape": (16, 64, 64), "width": 8, "depth": 4, "members": 8, "seeds": 2},
    {"shape": (2, 8, 8), "width": 4, "depth": 1},
    {"times as fast as one after another, vmap": (">=", 3.0)},
  ),
  Part(
    "determinism", "equal bits of equal runs, and what they cost", "gpu_jobs.determinism", 100,
    {"shape": (16, 256, 256), "width": 32, "depth": 4, "dtype": "bfloat16", "steps": 20},
    {"shape": (2, 8, 8), "width": 4, "depth": 1, "steps": 2},
    {"equal bits with --xla_gpu_deterministic_ops=true": ("is", 1)},
  ),
  Part("smoke", "the quick start, wall time", "gpu_jobs.smoke", 120, {"platform": ""},
    {"flags": _TINY_QUICKSTART}),
  _step("step3d", "3D step, bfloat16", 120, _VOLUME, _TINY_VOLUME, "bfloat16", False),
  Part(
    "job", "the whole job on PH2 at 256 x 256, width 32", "gpu_jobs.job", 240,
    {"size": 256, "width": 32}, {"size": 16, "width": 4, "flags": _TINY_JOB}, essential=False,
  ),
  Part(
    "input", "steps with real input against a batch on the device", "gpu_parts.feed", 90,
    {"shape": (16, 256, 256), "width": 32, "depth": 4, "dtype": "bfloat16", "workers": (0, 8)},
    {"shape": (2, 8, 8), "width": 4, "depth": 1, "workers": (1,)},
    {"steps with real input, of those without": (">=", 0.95)},
    essential=False,
  ),
  _step("step_f32", "2D step, float32", 150, _PLANE, _TINY_PLANE, "float32", False, "step"),
  _step("step3d_f32", "3D step, float32", 150, _VOLUME, _TINY_VOLUME, "float32", False, "step3d"),
  Part(
    "smoke_cpu", "the quick start on this machine's CPU, beside `smoke`", "gpu_jobs.smoke", 240,
    {"platform": "cpu"}, {"flags": _TINY_QUICKSTART}, essential=False, same_code_as="smoke",
  ),
)  # fmt: skip
