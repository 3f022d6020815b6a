"""Builds the two compiled parts: `_ops` (the operators, free of Python) and `_C` (the build's
facts), with the torch that is already installed.

Environment: FORCE_CUDA=1/0 (default: where torch has CUDA and nvcc is found), TORCH_CUDA_ARCH_LIST,
MAX_JOBS, FUSEDCONVBN_SANITIZE=1 (AddressSanitizer and UBSan, for `make sanitize`).
"""

import importlib.util
import os
import site
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

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
        "setuptools, and add "
        "--no-build-isolation (uv) or --no-isolation (build)."
    )

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
build_cuda = force_cuda == "1" if force_cuda else bool(torch.version.cuda and CUDA_HOME is not None)
if build_cuda and not (torch.version.cuda and CUDA_HOME):
    sys.exit(
        "fusedconvbn: FORCE_CUDA=1 needs a CUDA build of torch and nvcc; found torch "
        f"{torch.__version__} (CUDA {torch.version.cuda}) and CUDA_HOME={CUDA_HOME}"
    )

# Headers of others are system headers, so that every warning is about our own code. The compiler
# ignores the -I of a folder that it is also given with -isystem.
headers = [
    *include_paths("cuda" if build_cuda else "cpu"),
    *(pybind11.get_include(), sysconfig.get_path("include")),
]
system_headers = [flag for path in headers for flag in ("-isystem", path)]
warnings = ["-Wall", "-Wextra", *system_headers]
# Without trapping mathematics a select becomes a masked vector operation, and without errno a root
# does; no value changes.
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

major, minor = torch.__version__.split(".")[:2]
setup(
    ext_modules=[ops, info],
    install_requires=[f"torch=={major}.{minor}.*"],  # C++ symbols differ between minor versions
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
