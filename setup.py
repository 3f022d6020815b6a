"""Builds the two compiled parts: `_ops` (the operators, free of Python) and `_C` (the build's
facts), with the torch that is already installed. `sdist` and `egg_info` need no torch.

Environment: FORCE_CUDA=1/0 (default: where torch has CUDA and nvcc is found), TORCH_CUDA_ARCH_LIST,
MAX_JOBS, FUSEDCONVBN_SANITIZE=1 (AddressSanitizer and UBSan, for `make sanitize`),
FUSEDCONVBN_LABEL=1 (for `make wheels`: the version names the torch, as 0.2.0+torch2.13).
"""

import importlib.util
import os
import platform
import re
import site
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
VERSION = re.search('__version__ = "(.+)"', (ROOT / "fusedconvbn/__init__.py").read_text())[1]
EXTRAS = {
    "plot": ["matplotlib"],
    "dev": re.findall(r"^\w.*", (ROOT / "requirements-dev.txt").read_text(), re.M),
}
LINK = re.compile(
    r"(?P<code>```.*?```|`[^`]*`)|!\[[^]]*\]\([^)]*\)\n*|\[(?P<text>[^]]*)\]\((?P<path>[^)]*)\)",
    re.S,
)


def description() -> str:
    """README.md for where its paths lead nowhere: pictures are left out, and a link to a file is
    its text and the file's name."""

    def plain(found: re.Match[str]) -> str:
        text, path = found["text"], found["path"]
        if found["code"] or (path and path.startswith("https://")):
            return found[0]
        return "" if text is None else text if text == path else f"{text} ({path})"

    return LINK.sub(plain, (ROOT / "README.md").read_text("utf-8"))


def refuse() -> None:
    """Ends with a sentence, before anything is compiled, where nothing can be."""
    if sys.platform != "linux":
        sys.exit(
            "fusedconvbn: it is built and runs on Linux only, on x86-64 and, so far not tested, on "
            f"aarch64; found {platform.system()}, where a Linux container or WSL 2 can run it"
        )
    if importlib.util.find_spec("torch") is None:
        # pip builds in isolation but with the user's interpreter, whose packages have the torch.
        paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        if sys.prefix == sys.base_prefix:
            paths.append(site.getusersitepackages())
        sys.path.extend(dict.fromkeys(paths))  # behind the build's own packages
    if missing := [
        name for name in ("torch", "pybind11", "ninja") if importlib.util.find_spec(name) is None
    ]:
        sys.exit(
            f"fusedconvbn: {' and '.join(missing)} not found. Install torch first, then type "
            "`pip install .`; under uv or `python -m build`, install torch, ninja, pybind11 and "
            "setuptools, and add --no-build-isolation (uv) or --no-isolation (build)."
        )


def compiled() -> dict[str, Any]:
    """What `setup` is told of the two compiled parts, and of the torch that they are for."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        include_paths,
    )

    force_cuda = os.environ.get("FORCE_CUDA")
    build_cuda = (
        force_cuda == "1" if force_cuda else bool(torch.version.cuda and CUDA_HOME is not None)
    )
    if build_cuda and not (torch.version.cuda and CUDA_HOME):
        sys.exit(
            "fusedconvbn: FORCE_CUDA=1 needs a CUDA build of torch and nvcc; found torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) and CUDA_HOME={CUDA_HOME}"
        )

    # Headers of others are system headers, so that every warning is about our own code. The
    # compiler ignores the -I of a folder that it is also given with -isystem.
    headers = [
        *include_paths("cuda" if build_cuda else "cpu"),
        *(pybind11.get_include(), sysconfig.get_path("include")),
    ]
    system_headers = [flag for path in headers for flag in ("-isystem", path)]
    warnings = ["-Wall", "-Wextra", *system_headers]
    # Without trapping mathematics a select becomes a masked vector operation, and without errno a
    # root does; no value changes.
    cxx_flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fopenmp",
        "-fvisibility=hidden",
        *warnings,
    ]
    sanitizers = []
    if os.environ.get("FUSEDCONVBN_SANITIZE") == "1":
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        cxx_flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitizers]  # the last of two wins
    sources = sorted(
        glob("csrc/*.cpp")
        + [
            path
            for folder in ("chain", "kernels", "autograd", "autocast", "meta", "cpu")
            for path in glob(f"csrc/{folder}/*.cpp")
        ]
        + (glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu") if build_cuda else [])
    )
    ops = (CUDAExtension if build_cuda else CppExtension)(
        "fusedconvbn._ops",
        sources,
        define_macros=[("AT_PER_OPERATOR_HEADERS", None)],
        extra_compile_args={
            "cxx": cxx_flags,
            "nvcc": ["-std=c++20", "-O3", "-Xfatbin=-compress-all", *system_headers],
        },
        extra_link_args=["-fopenmp", *sanitizers],
        py_limited_api=True,  # does not link libtorch_python: a C++ program can load the library
    )

    facts = {
        "TORCH_VERSION": torch.__version__,
        "CUDA_VERSION": torch.version.cuda if build_cuda else "",
        "CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST", "of the devices present")
        if build_cuda
        else "",
    }
    info = Extension(
        "fusedconvbn._C",
        ["csrc/python/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"FUSEDCONVBN_{name}", f'"{value}"') for name, value in facts.items()],
        extra_compile_args={"cxx": ["-O1", "-g0", "-fvisibility=hidden", *warnings]},
        language="c++",
    )

    build: dict[str, Any] = {
        "ext_modules": [ops, info],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }
    if os.environ.get("FUSEDCONVBN_LABEL") == "1":
        minor = ".".join(torch.__version__.split(".")[:2])
        cuda = f".cu{torch.version.cuda.replace('.', '')}" if build_cuda else ""
        build["version"] = f"{VERSION}+torch{minor}{cuda}"
        # As a requirement of the package itself it would let pip replace another torch.
        build["extras_require"] = {**EXTRAS, "torch": [f"torch=={minor}.*"]}
    return build


arguments = {
    "version": VERSION,
    "extras_require": EXTRAS,
    "long_description": description(),
    "long_description_content_type": "text/markdown",
}
# Neither needs torch: an sdist is of the sources alone, and pip asks for egg_info before all else.
if not {"sdist", "egg_info"} & {*sys.argv} or "bdist_wheel" in sys.argv:
    refuse()
    arguments |= compiled()
setup(**arguments)
