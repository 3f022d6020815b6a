"""The layer and the experiment's network against their rivals, on one device and in one process.

    python benchmarks/conv_bn.py [--device cuda] [--threads 1 2] [--part layers] [--quick]

All variants of a comparison do the same work on the same data. They take turns, step by step, and
the ratio of their medians is what counts: on a shared machine the times themselves drift. Prints
tables and writes benchmarks/results/conv_bn-cpu.json or gpu-conv_bn.json.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import (
    FORMATS,
    ROOT,
    Row,
    Step,
    argument_parser,
    begin,
    measure_memory,
    output_path,
    print_table,
    save,
    summarise,
    time_interleaved,
)
from rivals import Checkpointed, PythonConvBN
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedconvbn import FusedConvBN2d

sys.path.append(str(ROOT / "examples"))

import mnist

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


# Three of a bottleneck of ResNet-50; then, with SiLU and with a residual, a layer whose result is
# wide, a depthwise layer and one that is bound by arithmetic.
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


def layer_steps(sizes: Layer, device: torch.device) -> dict[str, Step]:
    format = torch.channels_last
    options = {"device": device, "dtype": sizes.dtype}
    conv = nn.Conv2d(
        sizes.channels_in,
        sizes.channels_out,
        sizes.kernel,
        padding=sizes.kernel // 2,
        groups=sizes.groups,
        bias=sizes.frozen,  # a folded batch norm is compared with a convolution that has a bias
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
    """The experiment's network: unfused, fused, and with the tutorial's layer, ours or Python's."""
    unfused = mnist.Net("batchnorm")
    tutorial = mnist.Net("tutorial")
    nets = {"unfused": unfused, "fused": unfused.fused()}
    nets["tutorial, fused"] = tutorial.fused()
    python = copy.deepcopy(tutorial.fused())
    for block in (python.block1, python.block2):
        block[0] = PythonConvBN(block[0].conv_weight, block[0].eps)
    nets["tutorial, Python reference"] = python
    checkpointed = copy.deepcopy(unfused)
    for name in ("block1", "block2"):
        setattr(checkpointed, name, Checkpointed(getattr(checkpointed, name)))
    nets["checkpoint"] = checkpointed
    return {name: net.to(device, memory_format=format) for name, net in nets.items()}


def network_step(net: nn.Module, images: Tensor, labels: Tensor) -> Step:
    def run() -> None:
        net.zero_grad()
        F.nll_loss(net(images), labels).backward()

    return run


def main() -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--batch", type=int, default=512, help="of the network")
    parser.add_argument("--part", choices=("all", "network", "layers"), default="all")
    parser.add_argument("--quick", action="store_true", help="3 rounds, to see that it runs")
    arguments = parser.parse_args()
    device, rounds = arguments.device, 3 if arguments.quick else arguments.rounds
    torch.manual_seed(0)
    results: Row = {
        **begin(arguments),
        "batch": arguments.batch,
        "layers": {},
        "network": {},
        "memory": {},
    }

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
                f"Forward and backward of one layer, {name}, batch 16, channels last, {key}", rows
            )

    if not arguments.quick or arguments.output:
        save(results, output_path(arguments))


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
