"""What is installed: the two compiled parts, the metadata, and what is said when they do not
fit."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedconvbn

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fusedconvbn.__file__).parent


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_the_operators_have_no_python_symbol():
    if shutil.which("nm") is None:
        pytest.skip("nm was not found")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", PACKAGE / "_ops.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "conv" in symbols.stdout  # it did list them
    assert not [s for s in symbols.stdout.split() if s.startswith(("Py", "_Py"))]


def test_the_build_facts_need_no_torch(tmp_path):
    """They are what can speak when the operators do not load."""
    (library,) = PACKAGE.glob("_C*.so")
    shutil.copy(library, tmp_path)
    code = "import sys, json, _C; assert 'torch' not in sys.modules; "
    code += "print(json.dumps(_C.build_info()))"
    result = python("-c", code, cwd=tmp_path, check=True)
    assert json.loads(result.stdout)["torch"] == torch.__version__


def test_metadata_requires_the_torch_of_the_build():
    minor = ".".join(torch.__version__.split(".")[:2])
    assert importlib.metadata.requires("fusedconvbn") == [f"torch=={minor}.*"]
    assert importlib.metadata.version("fusedconvbn") == fusedconvbn.__version__


def copy_package(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fusedconvbn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "fusedconvbn"


def test_another_torch_is_named(tmp_path):
    package = copy_package(tmp_path)
    (package / "_C.py").write_text("def build_info(): return {'torch': '2.3.1'}")
    for library in package.glob("_C*.so"):
        library.unlink()
    result = python("-c", "import fusedconvbn", cwd=tmp_path)
    expected = "ImportError: fusedconvbn was built against torch 2.3.1, found torch "
    assert f"{expected}{torch.__version__}; run `pip install" in result.stderr


def test_a_library_that_does_not_load_is_explained(tmp_path):
    package = copy_package(tmp_path)
    (package / "_ops.so").write_bytes(b"not a library")
    result = python("-c", "import fusedconvbn", cwd=tmp_path)
    assert "ImportError: fusedconvbn, built against torch" in result.stderr
    assert "to build it again" in result.stderr


@pytest.mark.parametrize("installed", (False, True))
def test_sources_that_are_not_built_are_explained(installed, tmp_path):
    for library in copy_package(tmp_path).glob("*.so"):
        library.unlink()
    # An editable install would find the libraries of the sources.
    code = """
import sys
from pathlib import Path
sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]
sys.path = [p for p in sys.path if not list(Path(p, 'fusedconvbn').glob('_C*'))]
"""
    if installed:
        code += f"sys.path.append({str(PACKAGE.parent)!r})\n"
    result = python("-c", f"{code}import fusedconvbn", cwd=tmp_path)
    *_, said = result.stderr.splitlines()
    assert said.startswith(f"ImportError: fusedconvbn in {tmp_path}/fusedconvbn is not built")
    assert ("run `pip install .`" in said) is not installed
    hides = f"hides the one that is installed in {PACKAGE.parent}: start Python in another folder"
    assert (hides in said) is installed


@pytest.mark.parametrize(
    "source", ("channel_kernels", "channel_loops_baseline", "channel_loops_avx512")
)
def test_cpu_kernels_compile_for_aarch64(source, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    sources = ROOT / "csrc/cpu"
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ was not found")
    include = Path(torch.__file__).parent / "include"
    command = [
        compiler,
        "-std=c++20",
        "-O3",
        "-fno-trapping-math",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-DAT_PER_OPERATOR_HEADERS", "-isystem", include, "-c", sources / f"{source}.cpp"]
    subprocess.run([*command, "-o", tmp_path / "object.o"], check=True)


@pytest.mark.parametrize("fits", (False, True))
def test_models_of_torchvision_beside_its_own_operators_and_without(fits):
    """Where its library fits this torch it has registered its operators, which cannot be done
    twice."""
    code = """
import torch
from torch.library import Library
if {fits}:
    library = Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from fusedconvbn import _torchvision
assert _torchvision.models() is _torchvision.models()
import zoo
print(len(zoo.MODELS["resnet18"]()[1]))
"""
    if python("-c", "import torchvision").returncode == 0:
        fits = False  # it does fit, and registers them itself
    result = python("-c", code.format(fits=fits), cwd=ROOT / "tests")
    assert result.stdout == "4\n", result.stderr
