"""How time and memory grow with batch, image and depth, and the overhead of one call of conv_bn.

    python benchmarks/growth.py [--device cuda] [--threads 2] [--quick]

Eager and `fuse` take turns in one process, float32, channels last. Prints tables and writes
benchmarks/results/growth-cpu.json or gpu-growth.json, which benchmarks/tables.py draws. Needs
torchvision.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Row,
    argument_parser,
    begin,
    measure_memory,
    output_path,
    print_table,
    save,
    summarise,
    time_interleaved,
)
from torch import Tensor, nn

import fusedconvbn
from fusedconvbn import FusedConvBN2d, _torchvision, conv_bn

# For each curve: the values of what grows, and (model, batch, size) for each value.
CURVES: dict[str, dict[int, tuple[str, int, int]]] = {
    "batch": {n: ("resnet18", n, 112) for n in (1, 2, 4, 8, 16, 32, 64)},
    "size": {n: ("resnet18", 2, n) for n in (64, 128, 192, 256, 384, 512)},
    "depth": {n: (f"resnet{n}", 4, 112) for n in (18, 34, 50, 101, 152)},
}
MOST = 1.3  # the time of a conv_bn call, of the two eager calls; required on the CPU only
CALLS = 100  # in a round: one alone is too short for the clock


def point(name: str, batch: int, size: int, device: torch.device, rounds: int) -> dict[str, Row]:
    torch.manual_seed(0)
    model = _torchvision.models().get_model(name, weights=None)
    images = torch.randn(batch, 3, size, size)
    model, images = (t.to(device, memory_format=torch.channels_last) for t in (model, images))
    nets = {"eager": model, "fused": fusedconvbn.fuse(model, images)}

    def step(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            net(images).sum().backward()

        return run

    steps = {variant: step(net) for variant, net in nets.items()}
    memory = {variant: measure_memory(steps[variant], nets[variant], device) for variant in nets}
    times = time_interleaved(steps, device, rounds, f"{name}, {batch} × {size}²", math.inf)
    rows = summarise(times, "eager")
    return {variant: {**memory[variant], **rows[variant]} for variant in nets}


def calls(device: torch.device) -> dict[str, dict[str, Callable[[], Any]]]:
    """One call on a 1×8×8×8 input, unfused and fused, of the functions and of the modules."""
    options = {"device": device}
    x, weight = torch.randn(1, 8, 8, 8, **options), torch.randn(8, 8, 3, 3, **options)
    gamma, beta = torch.ones(8, **options), torch.zeros(8, **options)
    mean, var = torch.zeros(8, **options), torch.ones(8, **options)
    conv, bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    conv, bn = conv.to(device), bn.to(device)
    layer = FusedConvBN2d.from_modules(conv, bn)

    def unfused(*t: Tensor) -> Tensor:
        y = F.conv2d(t[0], t[1], padding=1)
        return F.batch_norm(y, mean, var, t[2], t[3], training=True)

    def fused(*t: Tensor) -> Tensor:
        return conv_bn(t[0], t[1], None, t[2], t[3], mean, var, padding=1)

    def operator(*t: Tensor) -> Tensor:
        return torch.ops.fusedconvbn.conv_bn(t[0], t[1], None, t[2], t[3], mean, var, padding=1)

    plain = (x, weight, gamma, beta)
    leaves = tuple(t.clone().requires_grad_() for t in plain)
    functions = {"eager": unfused, "conv_bn": fused, "operator": operator}
    modules = {"eager": lambda t: bn(conv(t)), "FusedConvBN2d": layer}
    return {
        "forward": {name: lambda f=f: f(*plain) for name, f in functions.items()},
        "forward, for backward": {name: lambda f=f: f(*leaves) for name, f in functions.items()},
        "forward and backward": {
            name: lambda f=f: f(*leaves).sum().backward() for name, f in functions.items()
        },
        "modules, forward, for backward": {
            name: lambda m=m: m(leaves[0]) for name, m in modules.items()
        },
    }


def overhead(device: torch.device, rounds: int) -> dict[str, dict[str, Row]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    rows = {}
    for name, variants in calls(device).items():
        steps = {variant: repeated(call) for variant, call in variants.items()}
        found = summarise(time_interleaved(steps, device, 5 * rounds, name, math.inf), "eager")
        rows[name] = {
            variant: {
                "microseconds": 1e3 * row["milliseconds"] / CALLS,
                "ratio": row["ratio"],
                "spread": row["spread"],
            }
            for variant, row in found.items()
        }
        print_table(
            f"One call on 1×8×8×8, one thread, {name}"
            + (f" (conv_bn: ≤ {MOST})" if device.type == "cpu" else ""),
            ["", "µs", "ratio"],
            [[v, f"{r['microseconds']:.1f}", f"{r['ratio']:.2f}"] for v, r in rows[name].items()],
        )
    torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the first two points of each curve")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, arguments.rounds
    results: Row = {**begin(arguments), "threads": arguments.threads}
    results["overhead"] = overhead(device, rounds)
    results["curves"] = {}
    for curve, points in CURVES.items():
        results["curves"][curve] = rows = {}
        for value, where in list(points.items())[: 2 if arguments.quick else None]:
            rows[value] = point(*where, device, rounds)
        print_table(
            f"Growth with the {curve}",
            ["", "eager ms", "fused ms", "ratio", "eager peak MiB", "fused peak MiB", "ratio"],
            [
                [
                    str(value),
                    f"{row['eager']['milliseconds']:.0f}",
                    f"{row['fused']['milliseconds']:.0f}",
                    f"{row['fused']['ratio']:.2f}",
                    f"{row['eager']['peak'] / 2**20:.0f}",
                    f"{row['fused']['peak'] / 2**20:.0f}",
                    f"{row['fused']['peak'] / row['eager']['peak']:.2f}",
                ]
                for value, row in rows.items()
            ],
        )
    if not arguments.quick or arguments.output:
        save(results, output_path(arguments))


if __name__ == "__main__":
    main()
