"""The bandwidth of the four channel kernels, beside that of a copy and of PyTorch's batch norm.

    python benchmarks/kernels.py [--device cuda] [--mebibytes 256]

Bytes are those that must be moved: channel_stats reads a map, channel_apply_ reads one and writes
one, channel_grad_stats reads two, channel_grad_apply_ reads two and writes one. PyTorch's batch
norm moves in forward what the first two move, in backward what the other two move. The copy reads a
map and writes one. All variants take turns in one process.

A GPU gets maps of 2 GiB in every layout and type, whose time hides the launches, and the maps of a
ResNet-50 at batch 128, whose time does not. There each variant is a CUDA graph over as many maps as
exceed the cache, and is replayed. Writes benchmarks/results/kernels-cpu.json or gpu-kernels.json
after each map.
"""

import math
from collections.abc import Sequence

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

from fusedconvbn.chain import Norm, pack

REQUIRED, AIM = 0.75, 0.9  # of the copy's bandwidth, on a GPU, for maps of LARGE bytes or more
LARGE = 256 << 20
OF_RESNET50 = (
    (64, 56),
    (256, 56),
    (512, 28),
    (1024, 14),
    (2048, 7),
)  # channels and size, at batch 128
BEYOND_THE_CACHE = 256 << 20  # bytes of all maps of a CUDA graph
DTYPES = (torch.float32, torch.bfloat16)


def steps_and_maps(y: torch.Tensor) -> dict[str, tuple[Step, int]]:
    """Each variant, and how many maps it moves.

    channel_grad_apply_ runs after channel_grad_stats here; `measure` subtracts the time of that.
    """
    channels = y.size(1)
    gamma, beta = torch.rand(2, channels, device=y.device)
    statistics = torch.ops.fusedconvbn._channel_stats(y, "")
    dout, target = torch.randn_like(y), torch.empty_like(y)
    forward = pack(y, [Norm(gamma, beta, statistics=statistics, arithmetic="running")])
    training = pack(y, [Norm(gamma, beta)])
    norm = (gamma, beta, None, None, True, 0.1, 1e-5, True)  # what F.batch_norm calls
    _, mean, inverse_std, reserved, which = torch._batch_norm_impl_index(y, *norm)
    backward_of_norm = (which, y, dout, gamma, None, None, mean, inverse_std, True, 1e-5)

    def backward(needs_grad: list[int]) -> Step:
        arguments = (training.tensors, [], [statistics], *training.options, [], needs_grad)
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
        "batch norm": (lambda: torch._batch_norm_impl_index(y, *norm), 3),
        "its backward": (
            lambda: torch.ops.aten._batch_norm_impl_index_backward(
                *backward_of_norm, [True] * 3, reserved
            ),
            5,
        ),
    }


def one_after_another(steps: Sequence[Step], device: torch.device) -> Step:
    """All steps as one; on a GPU as a CUDA graph, so that the time is the device's alone."""

    def run() -> None:
        for step in steps:
            step()

    if device.type == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(y: torch.Tensor, rounds: int, label: str) -> dict[str, dict[str, float]]:
    nbytes = y.numel() * y.element_size()
    count = math.ceil(BEYOND_THE_CACHE / nbytes) if y.is_cuda else 1
    maps = [y, *(torch.empty_like(y).copy_(y) for _ in range(count - 1))]
    every = [steps_and_maps(each) for each in maps]
    steps = {name: one_after_another([e[name][0] for e in every], y.device) for name in every[0]}
    times = time_interleaved(steps, y.device, rounds, label, math.inf)
    milliseconds = {
        name: row["milliseconds"] / count for name, row in summarise(times, "copy").items()
    }
    milliseconds["channel_grad_apply_"] -= milliseconds["channel_grad_stats"]
    rates = {
        name: moved * nbytes / milliseconds[name] / 1e6 for name, (_, moved) in every[0].items()
    }
    return {
        name: {
            "milliseconds": milliseconds[name],
            "bytes": every[0][name][1] * nbytes,
            "GB/s": rate,
            "of_copy": rate / rates["copy"],
        }
        for name, rate in rates.items()
    }


def shapes(on_gpu: bool, mebibytes: int | None) -> list[tuple[torch.dtype, str, tuple[int, ...]]]:
    """Type, format and sizes of each map."""
    nbytes = (mebibytes or (2048 if on_gpu else 256)) << 20
    large = [
        (dtype, format, (max(nbytes // (256 * 56 * 56 * dtype.itemsize), 1), 256, 56, 56))
        for dtype in DTYPES
        for format in FORMATS
    ]
    of_network = [
        (torch.bfloat16, format, (128, channels, size, size))
        for format in reversed(FORMATS)
        for channels, size in OF_RESNET50
    ]
    return large + (of_network if on_gpu else [])


def main() -> None:
    parser = argument_parser(__doc__, rounds=21)
    parser.add_argument("--mebibytes", type=int, help="of a large map; default: 256, on a GPU 2048")
    arguments = parser.parse_args()
    device, on_gpu = arguments.device, arguments.device.type == "cuda"
    results: Row = {**begin(arguments), "maps": {}}
    for dtype, format, shape in shapes(on_gpu, arguments.mebibytes):
        y = torch.randn(shape, dtype=dtype, device=device).to(memory_format=FORMATS[format])
        samples, channels, size, _ = shape
        label = f"{samples}×{channels}×{size}², {str(dtype).removeprefix('torch.')}, {format}"
        results["maps"][label] = rows = measure(y, arguments.rounds, label)
        save(results, output_path(arguments))
        print_table(
            label,
            ["", "ms", "GB/s", "of the copy"],
            [
                [n, f"{r['milliseconds']:.3f}", f"{r['GB/s']:.0f}", f"{r['of_copy']:.2f}"]
                for n, r in rows.items()
            ],
        )
        if on_gpu and y.numel() * y.element_size() >= LARGE:
            kernel, row = slowest(rows)
            print(f"slowest: {kernel}, {row['of_copy']:.2f} (required {REQUIRED}, aim {AIM})")


def slowest(rows: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """The one of our kernels that has the least bandwidth."""
    ours = {name: row for name, row in rows.items() if name.startswith("channel_")}
    return min(ours.items(), key=lambda item: item[1]["of_copy"])


if __name__ == "__main__":
    main()
