# shellcheck shell=bash
# Sourced from the project's root: activates .venv, installing the project if that is needed.
#   source launch/setup.sh [EXTRA]      cuda12, cuda13, tpu, gcs, itk, dicom; several as in tpu,gcs
# In a script always with an argument, be it "": without one `source` hands on the script's own.
# PYTHON names the Python to use (default python3), VENV the environment's folder (default .venv).
_extra=${1:-}
_venv=${VENV:-.venv}
_stamp=$_venv/.installed${_extra:+-$_extra}
if [ ! -e "$_stamp" ] || [ setup.cfg -nt "$_stamp" ]; then
  _python=${PYTHON:-python3}
  "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $_python is $("$_python" --version 2>&1); Python 3.11 or newer is needed. Set PYTHON=..." >&2
    return 1
  }
  [ -x "$_venv/bin/python" ] || "$_python" -m venv "$_venv" || return
  "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".[run${_extra:+,$_extra}]" || return
  touch "$_stamp"
fi
# shellcheck source=/dev/null
source "$_venv/bin/activate"

# Huge pages for large arrays, and freed memory kept: XLA allocates again at every step, and page
# faults are a tenth of a training step on the CPU. The C library reads this at its start.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=8589934592}"
