"""What the benchmarks share: steps that take turns, their memory, tables, the machine's facts."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import track_memory

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
Row = dict[str, Any]
Step = Callable[[], None]
LONGEST = 12.0  # seconds after which a comparison of at least five rounds ends
STEPS = 10  # between two events on a GPU: a single step would include the wait for the device


def argument_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=rounds, help="in which all take turns")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try algorithms")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: benchmarks/results/<script>-cpu.json, gpu-<script>.json",
    )
    return parser


def begin(arguments: argparse.Namespace) -> Row:
    """Applies the options of all scripts; prints and returns the first entries of the results."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    facts = machine(arguments.device)
    facts |= rates(arguments.device) if arguments.device.type == "cuda" else {}
    print(", ".join(f"{k} {v}" for k, v in facts.items() if v))
    return {"machine": facts, "cudnn_benchmark": arguments.cudnn_benchmark}


def output_path(arguments: argparse.Namespace) -> Path:
    name = Path(sys.argv[0]).stem
    on_gpu = arguments.device.type == "cuda"
    return arguments.output or RESULTS / (f"gpu-{name}.json" if on_gpu else f"{name}-cpu.json")


def save(results: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def seconds(step: Step, device: torch.device) -> float:
    """Seconds of one step; on a GPU the mean of STEPS steps."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record(stream)
        for _ in range(STEPS):
            step()
        last.record(stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / STEPS
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_interleaved(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    label: str,
    longest: float = LONGEST,
) -> dict[str, list[float]]:
    """Seconds of each step of each variant. Another variant begins each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    deadline = math.inf
    warm_up = 1 if device.type == "cuda" else 2  # rounds; on a GPU a round has STEPS steps
    for i in tqdm(range(rounds + warm_up), desc=label, leave=False):
        if i == warm_up:
            deadline = time.perf_counter() + longest
        if i >= warm_up + 5 and time.perf_counter() > deadline:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = seconds(steps[name], device)
            if i >= warm_up:
                times[name].append(taken)
    return times


def summarise(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows = {}
    for name, t in times.items():
        low, _, high = statistics.quantiles(t, n=4) if len(t) > 1 else 3 * t
        rows[name] = {
            "milliseconds": 1e3 * medians[name],
            "spread": (high - low) / medians[name],
            "ratio": medians[name] / medians[baseline],
            "steps": len(t),
        }
    return rows


def measure_memory(step: Step, net: nn.Module, device: torch.device) -> dict[str, int]:
    step()
    net.zero_grad()
    with track_memory(device) as memory:
        step()
    found = {"saved": memory.saved, "end_of_forward": memory.end_of_forward, "peak": memory.peak}
    if device.type == "cuda":
        net.zero_grad()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found["peak"] = torch.cuda.max_memory_allocated(device) - before
    return found


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for first, *rest in (columns, *rows):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  " + "  ".join([first.ljust(widths[0]), *cells]))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{key: str(value) for key, value in fusedconvbn.build_info().items()},
        "torch": torch.__version__,
        "fusedconvbn": fusedconvbn.__version__,
        "commit": commit(),
    }


def rates(device: torch.device) -> dict[str, float]:
    """The bandwidth of a copy and the FLOP/s of a bfloat16 product: the device at its best."""
    nbytes, size = (2**31, 8192) if device.type == "cuda" else (2**24, 256)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    target, product = torch.empty_like(source), torch.empty_like(a)
    steps = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    times = time_interleaved(steps, device, 5, "rates")
    copy, multiply = (statistics.median(t) for t in times.values())
    return {
        "copy GB/s": float(f"{2 * nbytes / copy / 1e9:.3g}"),
        "bf16 TFLOP/s": float(f"{2 * size**3 / multiply / 1e12:.3g}"),
    }


def commit() -> str:
    """The commit of the code; without git, that of the bundle.

    Results and pages do not count as changes: the benchmarks write them.
    """

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    code = ["--", ".", ":!benchmarks/results", ":!*.md"]
    bundled = ROOT / "build" / "gpu" / "commit"
    if not (ROOT / ".git").exists() and bundled.exists():
        return bundled.read_text("utf-8").strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", *code)
        return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")
    except FileNotFoundError:
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
