"""examples/cpp: built with CMake against this torch, and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedconvbn

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
OPERATORS = Path(fusedconvbn.__file__).with_name("_ops.so")
pytestmark = pytest.mark.slow  # builds it in a quarter of a minute


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the program, its model and its data."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake was not found")
    folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        [cmake, "-S", EXAMPLE, "-B", folder, prefix],
        [cmake, "--build", folder],
        [sys.executable, EXAMPLE / "make_model.py", folder],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if "uses CUDA but I cannot find the CUDA" in done.stderr:
            pytest.skip("this torch has CUDA, whose toolkit CMake did not find")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run(folder, operators=OPERATORS, data="data.pt"):
    return subprocess.run(
        [folder / "example", operators, "model.pt", data],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_trains_and_evaluates(built):
    done = run(built)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step") == 10
    assert "evaluation: differs from Python's by at most" in done.stdout


def test_says_what_is_wrong(built, tmp_path):
    done = run(built, operators=tmp_path / "missing.so")
    assert done.returncode == 1
    assert "dlopen" in done.stderr

    data = torch.jit.load(built / "data.pt")
    data.output[0, 0] += 1e-3
    data.save(built / "wrong.pt")
    done = run(built, data="wrong.pt")
    assert done.returncode == 1
    assert "evaluation: not what Python computed" in done.stderr
