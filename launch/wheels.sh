#!/usr/bin/env bash
# Fetches into wheels/ what a GPU machine with JAX, Flax, Optax, Orbax and PyTorch, but without a
# network, lacks for this program; git ignores the folder. Needs pip and a network.
#   bash launch/wheels.sh [PYTHON_VERSION]      of the GPU machine; default 3.12, x86-64 Linux
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} version=${1:-3.12}
packages=(grain array_record tensorflow-datasets ml_collections tensorboardX nibabel dm-tree
  immutabledict simple_parsing tensorflow-metadata toml wrapt docstring-parser importlib_resources
  googleapis-common-protos portpicker termcolor)
platforms=(--platform=any)
for tag in manylinux_2_{28,27,24,17,12,5}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
  platforms+=("--platform=$tag")
done
pip=("$python" -m pip --quiet --disable-pip-version-check)
rm -rf wheels && mkdir wheels
"${pip[@]}" download --dest=wheels --no-deps --only-binary=:all: --python-version="$version" \
  "${platforms[@]}" "${packages[@]}"
"${pip[@]}" wheel --wheel-dir=wheels --no-deps promise # has no wheel of its own
du -sh wheels
echo "to install without a network, in the project's root:"
echo "  python3 -m pip install --no-index --no-deps --target=DIR wheels/*.whl && export PYTHONPATH=DIR"
