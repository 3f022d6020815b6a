"""Compiles the CUDA kernels and their wrapper as objects, with the nvcc that is found and the headers of any torch."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)


def find_toolkit() -> Path | None:
    """The folder with bin/nvcc and include/cuda_runtime.h; the nvcc on PATH may only be a wrapper."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
    ]
    for path in (Path(c) for c in candidates if c):
        if (path / "bin/nvcc").exists() and (path / "include/cuda_runtime.h").exists():
            return path
    return None


def main() -> None:
    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA sources not compiled: nvcc was not found")
        return
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as out:
        kernels = [
            toolkit / "bin/nvcc",
            "-c",
            "csrc/cuda/channel_launch.cu",
            "-o",
            f"{out}/kernels.o",
        ]
        kernels += [
            "-std=c++20",
            "-O3",
            "-Werror",
            "all-warnings",
            "-Xcompiler",
            "-fPIC,-Wall,-Wextra",
        ]
        kernels += ["-isystem", include, *targets]
        wrapper = [
            "g++",
            "-c",
            "csrc/cuda/channel_kernels.cpp",
            "-o",
            f"{out}/wrapper.o",
            "-std=c++20",
        ]
        wrapper += ["-fPIC", "-Wall", "-Wextra", "-Werror", "-DAT_PER_OPERATOR_HEADERS"]
        wrapper += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a CPU build of torch lacks that file
        for path in (include, include / "torch/csrc/api/include", toolkit / "include"):
            wrapper += ["-isystem", path]
        for command in (kernels, wrapper):
            if subprocess.run(command, cwd=ROOT).returncode:
                sys.exit("CUDA sources do not compile")
    print(f"CUDA sources compile for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")


if __name__ == "__main__":
    main()
