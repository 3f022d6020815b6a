"""`fuse` beside a compiler and inside of it: eager, fused, compiled, and fused and compiled.

    python benchmarks/compilers.py [--models NAME …] [--batch N] [--rounds N]

For each model and dtype (bfloat16 under autocast): the time of a training step, the bytes saved for
backward, and the seconds of the first step, which captures and compiles. The variants take turns in
one process. Writes benchmarks/results/compilers-cpu.json; benchmarks/tables.py writes the table of
docs/compile.md.
"""

import copy
import math
import time

import torch
from common import (
    FORMATS,
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
from torch import nn

import fusedconvbn
from fusedconvbn import _torchvision

MODELS = ("resnet50", "efficientnet_b0", "mobilenet_v2")
COLUMNS = ["", "time", "saved", "first step, s"]


def variants(model: nn.Module, images: torch.Tensor) -> dict[str, nn.Module]:
    def inner() -> nn.Module:
        options = {"memory": "auto", "inner": "inductor"}
        return torch.compile(copy.deepcopy(model), backend="fusedconvbn", options=options)

    return {
        "eager": model,
        "`fuse`": fusedconvbn.fuse(copy.deepcopy(model), images, inplace=True),
        "`torch.compile`": torch.compile(copy.deepcopy(model)),
        'backend `fusedconvbn`, inner `"inductor"`': inner(),
        "`torch.compile(fuse(model))`": torch.compile(
            fusedconvbn.fuse(copy.deepcopy(model), images, inplace=True)
        ),
    }


def measure(name: str, dtype: torch.dtype, batch: int, rounds: int) -> dict[str, Row]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    format = FORMATS["channels last"]
    model = _torchvision.models().get_model(name, weights=None).to(memory_format=format)
    images = torch.randn(batch, 3, 224, 224).to(memory_format=format)
    nets = variants(model, images)

    def step(net: nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = net(images).sum()
        loss.backward()

    rows: dict[str, Row] = {}
    for variant, net in nets.items():
        start = time.perf_counter()
        step(net)
        rows[variant] = {"first_seconds": time.perf_counter() - start}
        rows[variant] |= measure_memory(lambda net=net: step(net), net, images.device)
    steps = {variant: lambda net=net: step(net) for variant, net in nets.items()}
    times = time_interleaved(steps, images.device, rounds, f"{name} {dtype}", math.inf)
    for variant, row in summarise(times, "eager").items():
        rows[variant] |= row
    return rows


def table(results: Row) -> list[list[str]]:
    lines = []
    for name, by_dtype in results["models"].items():
        for dtype, rows in by_dtype.items():
            eager = rows["eager"]
            for variant, row in rows.items():
                if variant != "eager":
                    shares = (row["ratio"], row["saved"] / eager["saved"])
                    cells = [f"{share:.2f}" for share in shares]
                    title = f"{name}, {dtype}, {variant}"
                    lines.append([title, *cells, f"{row['first_seconds']:.0f}"])
    return lines


def main() -> None:
    parser = argument_parser(__doc__, rounds=8)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    results = {**begin(arguments), "batch": arguments.batch, "models": {}}
    for name in arguments.models:
        results["models"][name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            rows = measure(name, dtype, arguments.batch, arguments.rounds)
            results["models"][name][str(dtype).removeprefix("torch.")] = rows
            save(results, output_path(arguments))
    print_table("Beside and inside of a compiler, ratio to eager", COLUMNS, table(results))


if __name__ == "__main__":
    main()
