"""progress: plain lines where there is no terminal, with counts and throughput."""

import re

from rndpo_jax.runtime import progress


def test_plain_lines_say_how_much_and_how_fast(capsys):
  shown = progress.track(iter("abc"), total=5, description="mine", unit="batches", done=2)
  assert list(shown) == ["a", "b", "c"]
  assert re.fullmatch(r"mine: 5/5 in \d+\.\d s, \d+\.\d batches/s\n", capsys.readouterr().out)


def test_long_loops_say_what_is_left(capsys, monkeypatch):
  clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
  list(progress.track(range(3), total=6, description="base", unit="steps"))
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "base: 2/6, 0.1 steps/s, 40 s left"
  assert lines[-1] == "base: 3/6 in 40.0 s, 0.1 steps/s"


def test_nothing_to_do_says_nothing(capsys):
  assert list(progress.track([], total=4, description="base", unit="steps", done=4)) == []
  assert capsys.readouterr().out == ""


def test_each_of_several_processes_prints_its_number(capsys, monkeypatch):
  monkeypatch.setattr(progress.jax, "process_count", lambda: 2)
  monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
  progress.say("done")
  assert capsys.readouterr().out == "[process 1] done\n"
