"""The setup stage of run.sh: finds a build of the package that runs here, or makes one, and says
what machine this is.

    python tests/gpu/prepare.py WORK DEVICE

Leaves in WORK: site/fusedconvbn, these sources with the compiled parts, unless the installed
package is used; libkernels.so, the kernels alone for this GPU; and machine.json.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "gpu"
sys.path.insert(0, str(ROOT / "tests/kernels"))
import build_cuda

# A build for another GPU loads, and fails at its first kernel.
PROBE = """
import sys, torch, fusedconvbn
x = torch.randn(2, 4, 5, 5, device=sys.argv[1])
fusedconvbn.conv_bn(x, torch.randn(3, 4, 3, 3, device=sys.argv[1])).sum().item()
print(fusedconvbn.__file__)
"""


def runs(site: Path | None, device: str, work: Path) -> bool:
    """Whether the package in `site`, or else the installed one, does a step on the device."""
    path = {} if site is None else {"PYTHONPATH": str(site)}
    probe = [sys.executable, "-c", PROBE, device]
    options = {"cwd": work, "env": {**os.environ, **path}, "text": True, "timeout": 60}
    try:
        found = subprocess.run(probe, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as error:
        print(error)
        return False
    print(found.stdout.strip() or f"no word, status {found.returncode}")
    return found.returncode == 0


def lay_bundle(site: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fusedconvbn", site / "fusedconvbn", ignore=ignored)
    for name in ("_ops.so", "_C.py"):
        shutil.copy2(BUNDLE / name, site / "fusedconvbn")


def find_package(work: Path, device: str) -> str:
    """Which of the bundle, a build made here and the installed package it is."""
    site = work / "site"
    if BUNDLE.exists():
        lay_bundle(site)
        if runs(site, device, work):
            if device == "cuda":
                shutil.copy2(BUNDLE / "libkernels.so", work)
            return "the bundle"
        shutil.rmtree(site)
    if device == "cpu":
        if runs(None, device, work):
            return "the installed package"
        sys.exit("neither the bundle nor an installed package runs here: `make build` first")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(build_cuda.build_package, site, work / "objects", capability),
            pool.submit(build_cuda.build_kernels, work / "libkernels.so", capability),
        ]
        for job in jobs:
            job.result()
    if not runs(site, device, work):
        sys.exit("what was built here does not run")
    return f"built here for compute capability {capability}"


def main() -> None:
    work, device = Path(sys.argv[1]), sys.argv[2]
    if device == "cuda":
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["nvidia-smi"])
        if not torch.cuda.is_available():
            sys.exit(f"torch {torch.__version__} finds no GPU")
    used = find_package(work, device)
    facts = work / "machine.json"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/machine.py", "--device", device, "--output", facts],
        env={**os.environ, "PYTHONPATH": str(work / "site")},
        cwd=work,
        check=True,
    )
    described = {"package": used, **json.loads(facts.read_text("utf-8"))}
    facts.write_text(json.dumps(described), "utf-8")
    rates = f"copy {described['copy GB/s']} GB/s, bf16 product {described['bf16 TFLOP/s']} TFLOP/s"
    print(f"{described['device']}, torch {torch.__version__}, {used}; {rates}")


if __name__ == "__main__":
    main()
