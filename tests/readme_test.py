"""The pages, every README.md: their Python runs, their commands parse, their links are right."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
  page
  for folder in (ROOT, *(ROOT / name for name in ("rndpo_jax", "configs", "launch")))
  for page in folder.glob("README.md" if folder == ROOT else "**/README.md")
)
BLOCKS = [
  pytest.param(page, block, id=f"{page.parent.name}-{n}")
  for page in PAGES
  for n, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]

# Parses each command of a JSON list as its program would, each in a process of its own that starts
# nothing; prints those that do not parse.
PARSE = """
import importlib, json, os, sys
from absl import flags
for module, *arguments in json.load(sys.stdin):
  if os.fork():
    os.wait()[1] and print(module, *arguments, flush=True)
    continue
  try:
    sys.argv = [module, *arguments]  # where config_flags looks for the keys of a config
    importlib.import_module(module)
    flags.FLAGS(sys.argv)
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      assert flags.FLAGS.config.data is not None
  except BaseException as error:
    print(type(error).__name__, error, flush=True)
    os._exit(1)
  os._exit(0)
"""


def commands(page):
  """The shell commands of a page, of indented blocks and of backticks, as lists of words."""
  text = page.read_text()
  lines = re.sub(r" *\\\n *", " ", "\n".join(re.findall(r"^    .*$", text, re.M))).splitlines()
  found = [line.strip() for line in lines] + re.findall(r"`([^`\n]+)`", text)
  for line in found:
    line = line.replace("\\|", "|").replace("--config=...", "--config=configs/ph2.py")
    line = re.sub(r"--config\.SECTION\S+|\[flags\]|\.\.\.|[\[\]]", " ", line)
    line = re.sub(r"=(\w+)(\|\w+)+", r"=\1", line)  # one of several
    words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
    names = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if names and names[0] in ("python", "bash", "source", "sbatch"):
      yield words, names


def test_pages_are_found():
  assert ROOT / "README.md" in PAGES and len(BLOCKS) >= 1


@pytest.mark.parametrize("page,block", BLOCKS)
def test_the_python_of_a_page_runs_as_it_stands(page, block):
  names = {}
  exec(compile(block, str(page), "exec"), names)  # as a reader would paste it
  if page == ROOT / "README.md":
    np.testing.assert_allclose(names["loss"], np.log(2), rtol=1e-6)
    norm = sum(float((leaf**2).sum()) for leaf in names["jax"].tree.leaves(names["gradient"]))
    assert np.isfinite(norm) and norm > 0


def test_the_programs_of_every_page_parse_their_flags():
  """Modules, flags, config files and config keys are there."""
  listed = [
    [names[2], *names[3:]]
    for page in PAGES
    for _, names in commands(page)
    if names[:2] == ["python", "-m"] and names[2].startswith("launch.")
  ]
  assert len(listed) > 5
  done = subprocess.run(
    [sys.executable, "-c", PARSE],
    input=json.dumps(listed),
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_scripts_of_every_page_are_there_and_read_the_variables_that_it_sets():
  listed = [
    (page, words, next(word for word in names if word.endswith((".sh", ".sbatch"))))
    for page in PAGES
    for words, names in commands(page)
    if names[0] != "python" and any(word.endswith((".sh", ".sbatch")) for word in names)
  ]
  assert len(listed) > 3
  for page, words, script in listed:
    assert (ROOT / script).exists(), f"{page}: {script}"
    text = (ROOT / script).read_text() + (ROOT / "launch" / "setup.sh").read_text()
    for word in words[: words.index(script)]:
      name = word.split("=")[0]
      assert not name.isupper() or name in text, f"{page}: {name} of {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_links_and_paths_of_a_page_lead_somewhere(page):
  text = page.read_text()
  links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
  paths = re.findall(r"`((?:rndpo_jax|configs|launch|tests)/[\w./]+)`", text)
  gone = [link for link in links if not (page.parent / link).exists()]
  gone += [path for path in paths if not (ROOT / path).exists()]
  assert not gone
