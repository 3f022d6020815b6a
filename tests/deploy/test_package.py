"""What is installed: the two compiled parts, the metadata, and what is said when they do not fit.
What is given away: the sdist and the wheels."""

import email
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import fusedconvbn

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fusedconvbn.__file__).parent
MINOR = ".".join(torch.__version__.split(".")[:2])
# What setup.py runs in, with another platform or without torch: SETUP.format(…), command, options
SETUP = """
import sys, runpy
class NoTorch:
    def find_spec(name, *_):
        assert name.partition(".")[0] != "torch", "torch was asked for"
{before}
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


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
    wheel = f"{torch.__version__}; install its wheel for torch {MINOR}, or run `pip install --force"
    assert expected + wheel in result.stderr
    assert 'return to that torch by `pip install "torch==2.3.*"`' in result.stderr


def test_a_library_that_does_not_load_is_explained(tmp_path):
    package = copy_package(tmp_path)
    (package / "_ops.so").write_bytes(b"not a library")
    result = python("-c", "import fusedconvbn", cwd=tmp_path)
    assert "ImportError: fusedconvbn, built against torch" in result.stderr
    assert "to build it again" in result.stderr


@pytest.mark.parametrize("installed", (False, True))
def test_sources_that_are_not_built_are_explained(installed, tmp_path):
    if not installed and Path(torch.__file__).parents[1] == PACKAGE.parent:
        pytest.skip("the package is installed beside torch, which is needed without it")
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def tracked():
    """What git knows, as it lies here."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sources(tracked, tmp_path_factory):
    """A copy of the sources, with what a build and a run of the tests leave there."""
    folder = tmp_path_factory.mktemp("sources")
    left = ("fusedconvbn/_ops.so", "tests/__pycache__/cases.cpython-311.pyc", "build/x/conv_bn.o")
    for name in (*tracked, *left, "output/mnist.png", ".venv/bin/python", "dist/old.whl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copy2(ROOT / name, folder / name)
        else:
            (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    before = "sys.meta_path.insert(0, NoTorch)"
    command = ("-c", SETUP.format(before=before), "--quiet", "sdist", "--dist-dir", folder)
    result = python(*command, cwd=sources)
    assert result.returncode == 0, result.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def description(sdist):
    """The metadata of the sdist."""
    name = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        return email.message_from_bytes(archive.extractfile(f"{name}/PKG-INFO").read())


def test_sdist_has_the_sources_and_nothing_else(sdist, tracked):
    assert sdist.name == f"fusedconvbn-{fusedconvbn.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in files if name.startswith("fusedconvbn.egg-info/")}
    made |= {"PKG-INFO", "setup.cfg"}
    not_needed = {
        name for name in tracked if name.startswith((".ci/", ".gitignore", ".pre-commit"))
    }
    assert files - made - not_needed == tracked - not_needed


def test_metadata_of_the_sdist(description):
    wanted = [Requirement(each) for each in description.get_all("Requires-Dist")]
    assert [str(each) for each in wanted if each.marker is None] == ["torch"]
    extras = {"plot": [], "dev": []}
    for each in wanted:
        for extra in extras:
            if each.marker and each.marker.evaluate({"extra": extra}):
                extras[extra].append(f"{each.name}{each.specifier}")
    assert extras["plot"] == ["matplotlib"]
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert extras["dev"] == [line for line in lines if line and line[0] != "#"]
    assert description["License-Expression"] == "BSD-3-Clause"
    assert not [c for c in description.get_all("Classifier") if c.startswith("License")]


def test_description_has_no_link_that_leads_nowhere(description):
    text = description.get_payload(decode=True).decode()
    readme = (ROOT / "README.md").read_text("utf-8")
    code = re.compile("```.*?```", re.S)
    assert code.findall(text) == code.findall(readme)
    assert set(re.findall(r"\]\((?!https://).*?\)", code.sub("", text))) == set()
    for path in re.findall(r"(?<!!)\[[^]]*\]\((docs/.*?)\)", readme):
        assert path in text
    # Pictures and brackets apart, no word is lost.
    words = re.sub(r"!\[.*?\]\(.*?\)", "", readme, flags=re.S)
    assert len(text.split()) >= len(words.split())


def test_citation_has_the_version():
    version = f"version: {fusedconvbn.__version__}"
    assert version in (ROOT / "CITATION.cff").read_text().splitlines()


@pytest.mark.parametrize(("platform", "name"), [("darwin", "Darwin"), ("win32", "Windows")])
def test_other_platforms_are_refused_in_one_sentence(platform, name, sources):
    before = f"import platform, setuptools; sys.platform = {platform!r}; "
    before += f"platform.system = lambda: {name!r}; sys.meta_path.insert(0, NoTorch)"
    result = python("-c", SETUP.format(before=before), "bdist_wheel", cwd=sources)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(f"fusedconvbn: .* Linux only, .*; found {name}, .*\n", result.stderr)


def test_a_build_without_torch_is_refused(sources):
    before = "import setuptools, sysconfig; sysconfig.get_path = lambda _: '/nowhere'; "
    before += "sys.path = [p for p in sys.path if 'site-packages' not in p]"
    result = python("-c", SETUP.format(before=before), "dist_info", cwd=sources)
    assert result.returncode == 1
    assert "torch and pybind11 and ninja not found. Install torch first" in result.stderr


@pytest.fixture(scope="module")
def hollow_wheel(sources, tmp_path_factory):
    """As of `make wheels`, but for the compiled parts."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ("setup.py", "--quiet", "bdist_wheel", "--skip-build", "--dist-dir", folder)
    environment = {**os.environ, "FUSEDCONVBN_LABEL": "1", "FORCE_CUDA": "0"}
    result = python(*command, cwd=sources, env=environment)
    assert result.returncode == 0, result.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def another_torch(tmp_path_factory):
    """The Python of an environment in which pip finds torch 1.0."""
    folder = tmp_path_factory.mktemp("another_torch")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    info = packages / "torch-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    (info / "RECORD").touch()
    return folder / "bin/python"


def pip_would(interpreter, wheel, extra=""):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull}
    command = ("-m", "pip", "--python", interpreter, "install", "--dry-run", "--no-index")
    return python(*command, f"{wheel}{extra}", env=environment)


def test_the_name_of_a_wheel_has_its_torch(hollow_wheel):
    version = f"{fusedconvbn.__version__}+torch{MINOR}"
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert hollow_wheel.name.startswith(f"fusedconvbn-{version}-{python_tag}-{python_tag}-linux_")


def test_pip_keeps_the_torch_that_is_there(hollow_wheel, another_torch):
    result = pip_would(another_torch, hollow_wheel)
    assert result.returncode == 0, result.stderr
    would = re.search("^Would install (.*)$", result.stdout, re.M)[1]
    assert would == f"fusedconvbn-{fusedconvbn.__version__}+torch{MINOR}"


def test_pip_takes_the_torch_of_the_wheel_if_asked_to(hollow_wheel, another_torch):
    result = pip_would(another_torch, hollow_wheel, "[torch]")
    assert result.returncode == 1
    assert (
        f"fusedconvbn[torch] {fusedconvbn.__version__}+torch{MINOR} depends on torch=={MINOR}.*"
        in result.stdout + result.stderr
    )


@pytest.mark.slow
def test_wheel_and_tests_work_from_the_sdist(sdist, tmp_path):
    """What `make wheels` does, with the torch of this environment."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    environment = {**os.environ, "FUSEDCONVBN_LABEL": "1", "FORCE_CUDA": "0"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    build = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path)
    result = python(*build, unpacked, env=environment)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    assert {"fusedconvbn/_ops.so", "fusedconvbn/_C.so"} <= {*files}
    assert all(f.startswith(("fusedconvbn/", "fusedconvbn-")) for f in files)

    venv.create(tmp_path / "new", symlinks=True)
    (packages,) = (tmp_path / "new").glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "torch.pth").write_text("".join(lines))
    new = tmp_path / "new/bin/python"
    environment.pop("PYTHONPATH", None)
    run = {"cwd": unpacked, "check": True, "env": environment}
    install = ("--no-index", "--no-deps", "--ignore-installed", wheel)
    subprocess.run([sys.executable, "-m", "pip", "--python", new, "install", *install], **run)
    subprocess.run([new, "tests/deploy/smoke.py", torch.__version__.split("+")[0]], **run)
    # Not `-m pytest`, which would import the sources of this folder.
    pytest_alone = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    tests = ("tests/operator/test_memory_contract.py", "tests/deploy/test_package.py")
    subprocess.run([new, "-c", pytest_alone, "-q", "-m", "not slow", *tests], **run)
