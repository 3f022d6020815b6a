"""What the benchmarks share: steps that take turns, their memory, tables, and facts about the machine."""

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import track_memory

ROOT = Path(__file__).parent.parent
Step = Callable[[], None]
LONGEST = 12.0  # seconds after which a comparison ends, if it has five rounds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    label: str,
    longest: float = LONGEST,
) -> dict[str, list[float]]:
    """Seconds of each step of each variant; which one begins a round moves on."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    deadline = math.inf
    for i in tqdm(range(rounds + 2), desc=label, leave=False):
        if i == 2:
            deadline = time.perf_counter() + longest
        if i >= 7 and time.perf_counter() > deadline:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
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
        }
    return rows


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = list(x) if isinstance(x, list) else x  # densenet's list grows until backward
        return checkpoint(self.block, x, use_reentrant=False)


def measure_memory(step: Step, net: nn.Module, device: torch.device) -> dict[str, int]:
    step()
    net.zero_grad()
    with track_memory(device) as memory:
        step()
    return {"saved": memory.saved, "end_of_forward": memory.end_of_forward, "peak": memory.peak}


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for first, *rest in (columns, *rows):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  " + "  ".join([first.ljust(widths[0]), *cells]))


def machine(device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = "unknown"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{key: str(value) for key, value in fusedconvbn.build_info().items()},
        "torch": torch.__version__,
        "fusedconvbn": fusedconvbn.__version__,
        "commit": commit,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def torchvision_models() -> ModuleType:
    """``torchvision.models``, also beside a torch that torchvision's own operators are not built for."""
    try:
        from torchvision import models
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        from torchvision import models
    return models
