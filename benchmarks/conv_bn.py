"""The layer and the experiment's network against their rivals, on one device and in one process.

    python benchmarks/conv_bn.py [--device cuda] [--threads 1 2] [--part layers] [--quick]

Every variant of a comparison does the same work on the same data. The variants take turns, step by step, and the ratio of
their medians is what counts: on a shared machine the times themselves drift. Prints tables and writes
benchmarks/results/conv_bn-<device>.json.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import FusedConvBN, FusedConvBN2d, reference, track_memory

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))

import mnist

Step = Callable[[], None]
LONGEST = 12.0  # seconds after which a comparison ends, if it has five rounds
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(inplace=True),
}


@dataclass(frozen=True)
class Layer:
    """Sizes of a convolution at batch 16, channels_last, and what follows it."""

    channels_in: int
    channels_out: int
    kernel: int
    size: int
    groups: int = 1
    activation: str = "relu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    frozen: bool = False


# Of a bottleneck of ResNet-50; then, with SiLU and with a residual, a wide, a depthwise and a compute-bound one.
LAYERS = {
    "64→256 1×1, 56²": Layer(64, 256, 1, 56),
    "64→64 3×3, 56²": Layer(64, 64, 3, 56),
    "512→128 1×1, 28²": Layer(512, 128, 1, 28),
} | {
    f"{name}, {tail}{', bfloat16' if dtype == torch.bfloat16 else ''}": Layer(
        *sizes, activation=activation, residual=residual, dtype=dtype
    )
    for dtype in (torch.float32, torch.bfloat16)
    for name, sizes in {
        "64→256 1×1, 56²": (64, 256, 1, 56),
        "32→32 depthwise 3×3, 112²": (32, 32, 3, 112, 32),
        "128→128 3×3, 28²": (128, 128, 3, 28),
    }.items()
    for tail, activation, residual in (("SiLU", "silu", False), ("add, ReLU", "relu", True))
}
LAYERS |= {
    "64→256 1×1, 56², frozen": Layer(64, 256, 1, 56, activation="none", frozen=True),
    "128→128 3×3, 28², frozen": Layer(128, 128, 3, 28, activation="none", frozen=True),
    "128→128 3×3, 28², frozen, ReLU": Layer(128, 128, 3, 28, frozen=True),
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    steps: dict[str, Step], device: torch.device, rounds: int, label: str
) -> dict[str, list[float]]:
    """Seconds of each step of each variant; which one begins a round moves on."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    deadline = math.inf
    for i in tqdm(range(rounds + 2), desc=label, leave=False):
        if i == 2:
            deadline = time.perf_counter() + LONGEST
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
        low, _, high = statistics.quantiles(t, n=4)
        rows[name] = {
            "milliseconds": 1e3 * medians[name],
            "spread": (high - low) / medians[name],
            "ratio": medians[name] / medians[baseline],
        }
    return rows


def layer_steps(sizes: Layer, device: torch.device) -> dict[str, Step]:
    format = torch.channels_last
    options = {"device": device, "dtype": sizes.dtype}
    conv = nn.Conv2d(
        sizes.channels_in,
        sizes.channels_out,
        sizes.kernel,
        padding=sizes.kernel // 2,
        groups=sizes.groups,
        bias=sizes.frozen,  # which has a shift to add: so has the convolution that it is compared with
        **options,
    ).to(memory_format=format)
    bn = nn.BatchNorm2d(sizes.channels_out, **options).train(not sizes.frozen)
    act = ACTIVATIONS[sizes.activation]
    layer = FusedConvBN2d.from_modules(copy.deepcopy(conv), copy.deepcopy(bn), act)

    def draw(channels: int) -> Tensor:
        t = torch.randn(16, channels, sizes.size, sizes.size, **options)
        return t.to(memory_format=format)

    x, dout = draw(sizes.channels_in).requires_grad_(), draw(sizes.channels_out)
    residual = draw(sizes.channels_out).requires_grad_() if sizes.residual else None

    def unfused(x: Tensor) -> Tensor:
        out = bn(conv(x))
        return act(out if residual is None else out + residual)

    forwards = {
        "unfused": unfused,
        "fused": lambda x: layer(x, residual),
        "checkpoint": lambda x: checkpoint(unfused, x, use_reentrant=False),
        "convolution alone": conv,
    }

    def step(forward: Callable[[Tensor], Tensor]) -> Step:
        def run() -> None:
            x.grad = None
            if residual is not None:
                residual.grad = None
            forward(x).backward(dout)

        return run

    return {name: step(forward) for name, forward in forwards.items()}


def networks(device: torch.device, format: torch.memory_format) -> dict[str, nn.Module]:
    """The experiment's network: as it is, fused, and with the tutorial's layer, in Python and as ours."""
    unfused = mnist.Net("batchnorm")
    tutorial = mnist.Net("tutorial")
    nets = {"unfused": unfused, "fused": unfused.fused()}
    nets["tutorial, fused"] = tutorial.fused()
    python = copy.deepcopy(tutorial.fused())
    for block in (python.block1, python.block2):
        block[0] = PythonConvBN(block[0])
    nets["tutorial, Python reference"] = python
    checkpointed = copy.deepcopy(unfused)
    for name in ("block1", "block2"):
        setattr(checkpointed, name, Checkpointed(getattr(checkpointed, name)))
    nets["checkpoint"] = checkpointed
    return {name: net.to(device, memory_format=format) for name, net in nets.items()}


class PythonConvBN(nn.Module):
    def __init__(self, layer: FusedConvBN) -> None:
        super().__init__()
        self.conv_weight, self.eps = layer.conv_weight, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.FusedConvBN2DFunction.apply(x, self.conv_weight, self.eps)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def network_step(net: nn.Module, images: Tensor, labels: Tensor) -> Step:
    def run() -> None:
        net.zero_grad()
        F.nll_loss(net(images), labels).backward()

    return run


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--batch", type=int, default=512, help="of the network")
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="steps of each network; three times as many of a layer",
    )
    parser.add_argument("--part", choices=("all", "network", "layers"), default="all")
    parser.add_argument("--quick", action="store_true", help="3 rounds, to see that it runs")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/conv_bn-<device>.json"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device, rounds = arguments.device, 3 if arguments.quick else arguments.rounds
    torch.manual_seed(0)
    results: dict = {
        "machine": machine(device),
        "batch": arguments.batch,
        "layers": {},
        "network": {},
        "memory": {},
    }
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items() if v))

    images = torch.randn(arguments.batch, 1, 28, 28, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)
    formats = FORMATS if arguments.part != "layers" else {}
    layers = LAYERS if arguments.part != "network" else {}
    for format_name, format in formats.items():
        nets = networks(device, format)
        steps = {name: network_step(net, images, labels) for name, net in nets.items()}
        memory = {name: measure_memory(steps[name], nets[name], device) for name in nets}
        results["memory"][format_name] = memory
        base = memory["unfused"]
        print_table(
            f"Memory of a training step, batch {arguments.batch}, {format_name} (ratio to unfused)",
            ["", "saved MiB", "", "end of forward", "", "peak", ""],
            [
                [
                    name,
                    *(
                        cell
                        for key in base
                        for cell in (f"{m[key] / 2**20:.1f}", f"{m[key] / base[key]:.3f}")
                    ),
                ]
                for name, m in memory.items()
            ],
        )

    for threads in arguments.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        key = f"{threads} threads"
        results["network"][key], results["layers"][key] = {}, {}
        for format_name, format in formats.items():
            nets = networks(device, format)
            steps = {name: network_step(net, images, labels) for name, net in nets.items()}
            rows = summarise(
                time_interleaved(steps, device, rounds, f"network, {format_name}"), "unfused"
            )
            results["network"][key][format_name] = rows
            show_times(f"Training step, batch {arguments.batch}, {format_name}, {key}", rows)
        for name, sizes in layers.items():
            rows = summarise(
                time_interleaved(layer_steps(sizes, device), device, 3 * rounds, name), "unfused"
            )
            results["layers"][key][name] = rows
            show_times(
                f"Forward and backward of one layer, {name}, batch 16, channels_last, {key}", rows
            )

    output = arguments.output or ROOT / f"benchmarks/results/conv_bn-{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{output}")


def show_times(title: str, rows: dict[str, dict[str, float]]) -> None:
    print_table(
        title,
        ["", "ms", "spread", "ratio"],
        [
            [n, f"{r['milliseconds']:.1f}", f"{r['spread']:.0%}", f"{r['ratio']:.2f}"]
            for n, r in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
