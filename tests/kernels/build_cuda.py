"""Everything that compiles the CUDA sources; none of it needs a GPU.

    python tests/kernels/build_cuda.py check           # compiles the kernels and their wrappers
    python tests/kernels/build_cuda.py resources       # the same, and lists every kernel
    python tests/kernels/build_cuda.py install         # the package, into this environment
    python tests/kernels/build_cuda.py bundle FOLDER   # what tests/gpu/run.sh carries along

`check` takes the headers of any torch, and fails where a kernel spills. `resources` writes down
registers, stack, spills and loads in flight. `install` (but with FORCE_CUDA=0, which leaves the
kernels out) and `bundle`, for one architecture, need a CUDA build of torch. TORCH_CUDA_ARCH_LIST
chooses other architectures, CUDA_HOME the toolkit.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cuda_resources import Resources, find_disassembler, resources

ROOT = Path(__file__).parents[2]
CHECKED = ("8.0", "9.0", "10.0")
CARRIED = "9.0"  # of the machines that are lent: H100 and H200
MOST_CARRIED = 40 << 20  # bytes
KERNELS = (*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/kernels/cuda_shim/library.cpp")
RESULTS = ROOT / "benchmarks/results/cuda-kernels.json"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
TORCH_HEADERS = Path(torch.__file__).parent / "include"


def find_toolkit() -> Path | None:
    """The folder with bin/nvcc and include/cuda_runtime.h; nvcc on PATH may be a wrapper."""
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


def required_toolkit() -> Path:
    toolkit = find_toolkit()
    if toolkit is None:
        sys.exit("nvcc was not found: set CUDA_HOME")
    return toolkit


def architecture_flags(architectures: Sequence[str]) -> list[str]:
    numbers = [a.replace(".", "") for a in architectures]
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]


def build_kernels(output: Path, architecture: str | None) -> None:
    """The kernels alone, behind C functions: for the GPUs of an `architecture`, or, with None, for
    the CPU, through cuda_shim."""
    command: list[str | Path] = ["-std=c++20", "-shared", "-o", output, "-isystem", TORCH_HEADERS]
    if architecture is None:
        build_through_shim([*command, "-x", "c++", *KERNELS])
    else:
        command = [required_toolkit() / "bin/nvcc", *command, "-O3", "-lineinfo", "-x", "cu"]
        command += [*architecture_flags([architecture]), "-Xcompiler", "-fPIC,-Wall,-Wextra"]
        subprocess.run([*command, *KERNELS], check=True, cwd=ROOT)


def build_through_shim(arguments: Sequence[str | Path]) -> None:
    command: list[str | Path] = ["g++", "-O1", "-fPIC", "-pthread", *WARNINGS]
    command += ["-Wno-unknown-pragmas", f"-I{ROOT}/tests/kernels/cuda_shim"]
    environment = dict(os.environ)
    if environment.pop("LD_PRELOAD", ""):  # `make sanitize`; the compiler itself runs without
        command += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    subprocess.run([*command, *arguments], check=True, cwd=ROOT, env=environment)


def build_device(output: Path) -> None:
    """The device of tests/kernels/cuda_shim/device.cpp with all CUDA sources, for the operators of
    the installed package."""
    package = importlib.util.find_spec("fusedconvbn")
    assert package is not None and package.origin is not None
    sources = sorted([*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
    command: list[str | Path] = ["-std=c++20", "-shared", "-fvisibility=hidden", "-o", output]
    command += ["-Wl,-z,defs", "-DAT_PER_OPERATOR_HEADERS", "-isystem", TORCH_HEADERS]
    command += ["-x", "c++", *sources, "tests/kernels/cuda_shim/device.cpp", "-x", "none"]
    # Found again where they were loaded from.
    command += [Path(package.origin).with_name("_ops.so"), f"-L{TORCH_HEADERS.parent}/lib"]
    build_through_shim([*command, "-ltorch_cpu", "-lc10"])


def build_package(target: Path, objects: Path, architectures: str) -> None:
    """The package with CUDA kernels as `target`/fusedconvbn; writes nothing among the sources."""
    subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet", "build"),
            *("--build-base", objects, "--build-lib", target),
        ],
        check=True,
        cwd=ROOT,
        env=cuda_environment(architectures),
    )


def build_environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    return {**os.environ, "PATH": path}


def cuda_environment(architectures: str) -> dict[str, str]:
    return {
        **build_environment(),
        "CUDA_HOME": str(required_toolkit()),
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architectures,
    }


def install() -> None:
    """From a copy of the sources: the objects and libraries of another build stay as they are."""
    sources = Path(sys.prefix) / "sources"
    for name in ("csrc", "fusedconvbn"):
        shutil.rmtree(sources / name, ignore_errors=True)
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "requirements-dev.txt"):
        shutil.copy2(ROOT / name, sources)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(CHECKED))
    without = os.environ.get("FORCE_CUDA") == "0"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall"),
            *("--no-build-isolation", "--no-deps", sources),
        ],
        check=True,
        env=build_environment() if without else cuda_environment(architectures),
    )


def bundle(folder: Path) -> None:
    """_ops.so, which any Python loads; _C.py, the build's facts for any Python; libkernels.so."""
    architecture = os.environ.get("TORCH_CUDA_ARCH_LIST", CARRIED)
    built = folder.with_name(folder.name + "-build")
    build_package(built / "lib", built, architecture)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy2(built / "lib/fusedconvbn/_ops.so", folder)
    build_kernels(folder / "libkernels.so", architecture)
    facts = subprocess.run(
        [sys.executable, "-c", "import _C; print(_C.build_info())"],
        cwd=built / "lib/fusedconvbn",
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (folder / "_C.py").write_text(f"def build_info():\n    return {facts}\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MOST_CARRIED:
        sys.exit(f"{folder}: {size >> 20} MiB, at most {MOST_CARRIED >> 20} can be carried")
    print(f"{folder}: {size / 2**20:.1f} MiB for compute capability {architecture}")


def compile_kernels(toolkit: Path, architecture: str, folder: Path) -> Resources | None:
    """What nvcc makes of the kernels; None where it fails or warns."""
    reports, code = "", ""
    disassembler = find_disassembler(toolkit)
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        output = folder / f"{source.stem}-{architecture}.cubin"
        command: list[str | Path] = [toolkit / "bin/nvcc", "-cubin", source, "-o", output]
        command += ["-std=c++20", "-O3", "-Werror", "all-warnings", "--resource-usage"]
        command += ["-Xcompiler", "-fPIC,-Wall,-Wextra", "-isystem", TORCH_HEADERS]
        command += [f"-arch=sm_{architecture.replace('.', '')}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr)
            return None
        reports += done.stdout + done.stderr
        if disassembler:
            shown = subprocess.run(
                [disassembler, "-sass", output], capture_output=True, text=True, check=True
            )
            code += shown.stdout
    return resources(reports, architecture, code)


def compile_wrappers(toolkit: Path, folder: Path) -> bool:
    for source in sorted(ROOT.glob("csrc/cuda/*.cpp")):
        wrapper: list[str | Path] = ["g++", "-c", source, "-o", folder / f"{source.stem}.o"]
        wrapper += ["-std=c++20", "-fPIC", *WARNINGS, "-DAT_PER_OPERATOR_HEADERS"]
        wrapper += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # a CPU build of torch lacks that file
        torch_api = TORCH_HEADERS / "torch/csrc/api/include"
        for path in (TORCH_HEADERS, torch_api, toolkit / "include"):
            wrapper += ["-isystem", path]
        if subprocess.run(wrapper, cwd=ROOT).returncode:
            return False
    return True


def check(*, every_kernel: bool = False) -> None:
    toolkit = find_toolkit()
    if toolkit is None:
        print("CUDA sources not compiled: nvcc was not found")
        return
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_kernels, toolkit, a, Path(out)) for a in reversed(CHECKED)]
        compiled = compile_wrappers(toolkit, Path(out))
        found = [job.result() for job in reversed(jobs)]
    if not compiled or None in found:
        sys.exit("CUDA sources do not compile")
    known = [r for r in found if r is not None]
    for each in known:
        print(each.summary())
        if every_kernel:
            print("\n".join(map(str, each.kernels)))
    if every_kernel:
        rows = [f'"{r.architecture}": [\n{r.as_json()}\n]' for r in known]
        RESULTS.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    if any(r.spills for r in known):
        sys.exit("kernels that must not spill do")


def main() -> None:
    match sys.argv[1:]:
        case ["check"]:
            check()
        case ["resources"]:
            check(every_kernel=True)
        case ["install"]:
            install()
        case ["bundle", folder]:
            bundle(Path(folder).resolve())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
