"""The bandwidth of the four channel kernels beside that of a copy; on a GPU also whether a training step can be captured.

    python benchmarks/kernels.py [--device cuda] [--mebibytes 256]

On a GPU the maps are larger, so that the launches and the arithmetic on one value per channel around a kernel do not count. Bytes
are those that must be moved: channel_stats reads a map, channel_apply_ reads one and writes one, channel_grad_stats reads two,
channel_grad_apply_ reads two and writes one; the copy reads and writes. All take turns in one process. Writes
benchmarks/results/kernels-<device>.json.
"""

import math

import torch
from common import (
    FORMATS,
    Row,
    Step,
    argument_parser,
    begin,
    output_path,
    print_table,
    save,
    summarise,
    time_interleaved,
)

from fusedconvbn import FusedConvBN2d
from fusedconvbn.chain import Norm, pack

REQUIRED, AIM = 0.75, 0.9  # of the copy's bandwidth, on a GPU


def steps_and_maps(y: torch.Tensor) -> dict[str, tuple[Step, int]]:
    """Each kernel, and how many maps it moves. The gradient's second kernel runs behind the first: see `measure`."""
    channels = y.size(1)
    gamma, beta = torch.rand(channels, device=y.device), torch.rand(channels, device=y.device)
    statistics = torch.ops.fusedconvbn._channel_stats(y, "")
    dout, target = torch.randn_like(y), torch.empty_like(y)
    forward = pack(y, [Norm(gamma, beta, statistics=statistics, arithmetic="running")])
    training = pack(y, [Norm(gamma, beta)])

    def backward(wanted: list[int]) -> Step:
        arguments = (training.tensors, [], [statistics], *training.options, [], wanted)
        return lambda: torch.ops.fusedconvbn._chain_backward(dout, *arguments)

    return {
        "copy": (lambda: target.copy_(y), 2),
        "channel_stats": (lambda: torch.ops.fusedconvbn._channel_stats(y, ""), 1),
        "channel_apply_": (
            lambda: torch.ops.fusedconvbn._chain_forward(forward.tensors, *forward.options, []),
            2,
        ),
        "channel_grad_stats": (backward([1, 2]), 2),
        "channel_grad_apply_": (backward([0, 1, 2]), 3),
    }


def measure(y: torch.Tensor, rounds: int, label: str) -> dict[str, dict[str, float]]:
    steps = steps_and_maps(y)
    times = time_interleaved(
        {name: step for name, (step, _) in steps.items()}, y.device, rounds, label, math.inf
    )
    milliseconds = {name: r["milliseconds"] for name, r in summarise(times, "copy").items()}
    milliseconds["channel_grad_apply_"] -= milliseconds["channel_grad_stats"]
    nbytes = y.numel() * y.element_size()
    rates = {name: maps * nbytes / milliseconds[name] / 1e6 for name, (_, maps) in steps.items()}
    return {
        name: {"milliseconds": milliseconds[name], "GB/s": rate, "of_copy": rate / rates["copy"]}
        for name, rate in rates.items()
    }


def captured_step(device: torch.device) -> bool:
    """Whether a training step in a CUDA graph gives the gradients of one outside."""
    torch.manual_seed(0)
    layer = FusedConvBN2d(64, 128, 3, padding=1, activation="relu", device=device)
    x = torch.randn(8, 64, 32, 32, device=device)

    def step() -> None:
        layer.zero_grad(set_to_none=False)
        layer(x).square().sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in layer.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return all(
        torch.allclose(p.grad, e, rtol=1e-4, atol=1e-4)
        for p, e in zip(layer.parameters(), expected, strict=True)
    )


def main() -> None:
    parser = argument_parser(__doc__, rounds=21)
    parser.add_argument("--mebibytes", type=int, help="of a map; default: 256, on a GPU 2048")
    arguments = parser.parse_args()
    device = arguments.device
    mebibytes = arguments.mebibytes or (2048 if device.type == "cuda" else 256)
    results: Row = {**begin(arguments), "maps": {}}
    for dtype in (torch.float32, torch.bfloat16):
        for format_name, format in FORMATS.items():
            samples = mebibytes * 2**20 // (256 * 56 * 56 * dtype.itemsize)
            y = torch.randn(max(samples, 1), 256, 56, 56, dtype=dtype, device=device)
            label = f"{y.size(0)}×256×56², {str(dtype).removeprefix('torch.')}, {format_name}"
            rows = measure(y.to(memory_format=format), arguments.rounds, label)
            results["maps"][label] = rows
            print_table(
                label,
                ["", "ms", "GB/s", "of the copy"],
                [
                    [n, f"{r['milliseconds']:.2f}", f"{r['GB/s']:.0f}", f"{r['of_copy']:.2f}"]
                    for n, r in rows.items()
                ],
            )
    if device.type == "cuda":
        try:
            results["captured_step"] = captured_step(device)
        except RuntimeError as error:  # is an answer too
            results["captured_step"] = str(error)
        print(f"\na captured training step gives the same gradients: {results['captured_step']}")
        worst = min(r["of_copy"] for rows in results["maps"].values() for r in rows.values())
        print(f"slowest kernel {worst:.2f} of the copy (required {REQUIRED}, aim {AIM})")
    save(results, output_path(arguments))


if __name__ == "__main__":
    main()
