"""Memory that a program may take: what control groups leave of the host's."""

import pytest

from rndpo_jax.planning import timing


@pytest.mark.parametrize(
  "own, limits, expected",
  [
    # Version 2, as under Slurm: the job's limit counts for its step.
    ("0::/slurm/job/step\n", {"slurm/job/memory.max": "5000", "slurm/memory.max": "max"}, [5000]),
    # Version 2 in a container, which sees its own group as the root.
    ("0::/\n", {"memory.max": "7000"}, [7000]),
    # Version 1 in a container, whose path is the host's.
    (
      "5:cpu,memory:/docker/a\n3:pids:/b\n0::/\n",
      {"memory/memory.limit_in_bytes": "6000", "b/memory.max": "1", "memory.max": "max"},
      [6000],
    ),
    ("0::/a\n", {}, []),
  ],
)
def test_limits_of_control_groups(tmp_path, own, limits, expected):
  (tmp_path / "own").write_text(own)
  for name, text in limits.items():
    (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "root" / name).write_text(f"{text}\n")
  assert timing.cgroup_limits(tmp_path / "own", tmp_path / "root") == expected
  assert timing.cgroup_limits(tmp_path / "missing", tmp_path / "root") == []


def test_the_memory_of_the_host_is_what_the_groups_leave(monkeypatch):
  monkeypatch.setattr(timing, "cgroup_limits", lambda: [8_000, 2**62])
  assert timing.memory_limit() == 1_000  # eight devices
  monkeypatch.setattr(timing, "cgroup_limits", lambda: [])
  assert timing.memory_limit() > 10_000_000
