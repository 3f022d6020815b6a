"""What run.sh does: the stages, how long each may take, and with what sizes."""

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
KERNEL_TESTS = TESTS / "kernels/test_cuda_kernels.py"
Command = list[str | Path]


@dataclass
class Stage:
    name: str
    seconds: float  # at most
    command: Command


@dataclass(frozen=True)
class Sizes:
    """What is run on a device."""

    device: str
    network: str  # the one that everything is measured of
    others: Sequence[str]
    compiled: Sequence[str]
    models: Sequence[str]  # options of the benchmarks
    kernels: Sequence[str]
    peaks: Sequence[str]
    profile: Sequence[str]
    smoke: Sequence[str | Path]  # of pytest
    tests: Sequence[str | Path]
    sanitized: dict[str, Sequence[str]]  # for each tool
    patience: float = 1  # how many times its seconds a stage has


ON_GPU = Sizes(
    device="cuda",
    network="resnet50",
    others=("mobilenet_v2", "efficientnet_b0", "densenet121", "resnet18"),
    compiled=("compile", "compile, budget 0.5"),
    models=("--only", "bfloat16, channels last", "--rounds", "4"),
    kernels=("--rounds", "7"),
    peaks=("--batch", "64"),
    profile=(),
    smoke=(TESTS / "gpu", "-m", "gpu and smoke"),
    tests=(TESTS, "-m", "gpu and not smoke", "-k", "not compute_sanitizer"),
    sanitized={
        "memcheck": ("-k", "compute_sanitizer and memcheck"),
        "racecheck": ("-k", "compute_sanitizer and racecheck"),
    },
)

TESTS_ON_CPU = "cpu and (test_training or test_processes)"
REHEARSAL = Sizes(
    device="cpu",
    network="resnet18",
    others=("mobilenet_v2",),
    compiled=("compile, budget 0.5",),
    models=("--only", "bfloat16, channels last, 2 threads", "--rounds", "2", "--size", "32"),
    kernels=("--rounds", "2", "--mebibytes", "4"),
    peaks=("--models", "resnet18", "--batch", "2", "--size", "64"),
    profile=("--size", "32"),
    smoke=(TESTS / "gpu", "-m", "smoke", "-k", "cpu"),
    # Those for a GPU too, though they are skipped: that the processes agree on what there is.
    tests=(
        TESTS,
        "-m",
        "not smoke",
        "-k",
        f"(gpu or {TESTS_ON_CPU}) and not efficientnet and not densenet",
    ),
    sanitized={  # some of what runs under the tools
        "memcheck": ("-k", "shim and start_between"),
        "racecheck": ("-k", "shim and far_from_zero"),
    },
    patience=3,  # a processor may be busy with other things
)


def pytest(*arguments: str | Path, xml: Path | None = None, seconds: int = 60) -> Command:
    # Processes that each start a thread, or a compiler, for every core are slower than with a few.
    command: Command = ["env", "OMP_NUM_THREADS=2", "TORCHINDUCTOR_COMPILE_THREADS=4"]
    command += [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml"]
    command += ["--rootdir", ROOT, "-p", "no:cacheprovider", "-v", "--tb=short", "--maxfail=400"]
    command += ["--continue-on-collection-errors"]  # where a package of some other test is missing
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={seconds}"]
    if xml:
        command += ["--junitxml", xml]
    return [*command, *arguments]


def stages_of(out: Path, work: Path, rehearsal: bool) -> list[list[Stage]]:
    """What runs one after another, setup first, and last what is missed least if there is no time.
    The stages of one list, none of which is timed, run at the same time."""
    sizes = REHEARSAL if rehearsal else ON_GPU
    processes = ("-n", "2" if rehearsal else "10") if importlib.util.find_spec("xdist") else ()
    fused = ("fuse 1.0", "fuse auto", "fuse 0.55", "fuse min", "fuse 0.2", "fuse 0.1")

    def benchmark(script: str, output: Path, *options: str) -> Command:
        command: Command = [sys.executable, ROOT / "benchmarks" / f"{script}.py"]
        return [*command, "--device", sizes.device, "--output", output, *options]

    def models(
        output: Path,
        batch: int,
        names: Sequence[str],
        variants: Sequence[str],
        seconds: int = 0,
        *more: str,
    ) -> Command:
        options = [*sizes.models, "--batch", str(2 if rehearsal else batch), "--resume"]
        options += ["--seconds", str(seconds), "--models", *names, "--variants", *variants]
        return benchmark("models", output, *options, *more)

    only = (sizes.network,)
    warm, found = work / "warm.json", out / "gpu-models-256.json"
    profile = ("--models", sizes.network, "--batch", "2" if rehearsal else "256", *sizes.profile)
    tests = pytest(*sizes.tests, *processes, xml=out / "pytest.xml", seconds=90)
    stages = [
        [Stage("setup", 180, [sys.executable, TESTS / "gpu/prepare.py", work, sizes.device])],
        [Stage("smoke", 75, pytest(*sizes.smoke, *processes, xml=out / "smoke.xml"))],
        [
            Stage("tests", 160, tests),
            Stage("peaks", 160, benchmark("peaks", out / "gpu-peaks.json", *sizes.peaks)),
            *(
                Stage(tool, 125, pytest(KERNEL_TESTS, *which, seconds=110))
                for tool, which in sizes.sanitized.items()
            ),
            # What the compiler makes is kept on disk, for the stage that measures it.
            Stage("compile", 160, models(warm, 256, only, sizes.compiled, 100, "--rounds", "1")),
        ],
        [Stage("kernels", 45, benchmark("kernels", out / "gpu-kernels.json", *sizes.kernels))],
        [Stage("models", 120, models(found, 256, only, (*fused, *sizes.compiled), 105))],
        [Stage("others", 90, models(found, 256, sizes.others, ("fuse auto", "fuse min")))],
        [Stage("profile", 45, benchmark("profile_step", out / "profile.txt", *profile))],
    ]
    for stage in itertools.chain(*stages):
        stage.seconds *= sizes.patience
    return stages
