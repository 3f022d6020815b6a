#!/bin/sh
# Installs a CUDA build of the package into the environment $1, from a copy of the sources: the objects and libraries of
# the other build stay as they are.
set -eu
venv=$(cd "$1" && pwd)
sources=$venv/sources
mkdir -p "$sources"
rm -rf "$sources/csrc" "$sources/fusedconvbn"
cp -Rp setup.py pyproject.toml README.md LICENSE csrc fusedconvbn "$sources"
rm -f "$sources"/fusedconvbn/*.so
# nvcc on PATH may be a wrapper; the toolkit is the folder with the headers.
if [ -z "${CUDA_HOME:-}" ]; then
    nvcc=$(command -v nvcc) || { echo "nvcc was not found: set CUDA_HOME" >&2; exit 1; }
    for CUDA_HOME in "$(dirname "$(dirname "$(readlink -f "$nvcc")")")" /usr/local/cuda; do
        [ ! -f "$CUDA_HOME/include/cuda_runtime.h" ] || break
    done
fi
export CUDA_HOME FORCE_CUDA=1
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0;10.0}"
"$venv/bin/pip" install --quiet --no-build-isolation --no-deps --force-reinstall "$sources"
