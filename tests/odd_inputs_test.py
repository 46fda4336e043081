"""A short form of the odd inputs: a row of each kind of reader, hang, growth and past mistake."""

import pathlib
import subprocess
import sys

import odd_inputs

SCRIPT = pathlib.Path(odd_inputs.__file__)


def test_a_short_table():
  done = subprocess.run(
    [sys.executable, SCRIPT, "--short"], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  found = len(odd_inputs.rows(short=True))
  assert found == len(odd_inputs.SHORT)
  assert f"{found} odd inputs: 11 taken, {found - 11} refused, 0 FAILED" in done.stdout


def test_the_whole_table_is_long_and_its_rows_differ():
  names = [(row.kind, row.name) for row in odd_inputs.rows(short=False)]
  assert len(names) >= 200 and len(set(names)) == len(names)


def test_what_counts_as_a_failure():
  row = odd_inputs.Row("kind", "name", lambda root: ({}, None), says="colour")
  judge = odd_inputs.judge
  assert judge(row, 1, "error: no colour\n", 1, True) == ("refused", "no colour")
  assert judge(row, 0, "[prepare] colour\n", 1, True)[0] == "taken"
  for code, text, num_bytes, ended in (
    (1, "error: no colour\nin two lines\n", 1, True),
    (1, "Traceback\nValueError: colour\n", 1, True),
    (1, "error: something else\n", 1, True),
    (2, "taken, but colour\n", 1, True),
    (0, "colour\n", odd_inputs.MAX_BYTES + 1, True),
    (0, "colour\n", 1, False),
  ):
    assert judge(row, code, text, num_bytes, ended)[0] == "FAILED"
