"""What `fusedconvbn.rescue` costs, and what it does where memory runs out.

    python benchmarks/rescue.py --device cuda [--batch 512] [--gibibytes 12]

resnet50 in bfloat16 by autocast, channels last, Adam. First the time of a step with and without
`rescue`, where memory suffices, at a small and at a large batch. Then, on a GPU, a step of --batch
in an allocator of so many GiB: eager's, and that of the fastest plan with `rescue`; the time of the
first step has the search for a plan that fits. Writes benchmarks/results/gpu-rescue.json.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, argument_parser, begin, output_path, save, summarise, time_interleaved
from torch import Tensor, nn
from workloads import Configuration, Workload

import fusedconvbn

SMALL, LARGE = 32, 256
STEPS = 8


def step_of(load: Workload, net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = torch.optim.Adam(net.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with load.autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def load_of(arguments: argparse.Namespace, batch: int) -> tuple[Workload, tuple[Tensor, Tensor]]:
    arguments.batch = batch
    load = Workload.of("resnet50", arguments, Configuration("bfloat16", "channels last", None))
    return load, (load.images, torch.randint(1000, (batch,), device=arguments.device))


def cost(arguments: argparse.Namespace, batch: int) -> Row:
    """Of `rescue` where memory suffices."""
    load, data = load_of(arguments, batch)
    net, _ = load.fused("auto")
    step = step_of(load, net)
    rescued = fusedconvbn.rescue(net, step)
    steps = {"plain": lambda: step(*data), "rescue": lambda: rescued(*data)}
    times = time_interleaved(steps, arguments.device, arguments.rounds, f"batch {batch}")
    return summarise(times, "plain")


def limited(arguments: argparse.Namespace, batch: int) -> Row:
    """A step of eager, and rescued ones of the fastest plan, in a part of a GPU's memory."""
    free()
    load, data = load_of(arguments, batch)
    total = torch.cuda.get_device_properties(arguments.device).total_memory
    torch.cuda.set_per_process_memory_fraction(arguments.gibibytes * 2**30 / total)
    found: Row = {"batch": batch, "GiB": arguments.gibibytes, "eager": "fits"}
    try:
        step_of(load, load.model)(*data)
    except torch.OutOfMemoryError:
        found["eager"] = "out of memory"
    load.model.zero_grad()
    free()
    net, _ = load.fused(1.0)
    step = fusedconvbn.rescue(net, step_of(load, net))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        times = []
        for _ in range(1 + STEPS):
            begin = time.perf_counter()
            step(*data)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    found["plans"] = sum("rescue" in str(warning.message) for warning in said)
    found["saved"] = net._fusion.plan.share
    return found | {"first step": times[0], "step": statistics.median(times[1:])}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argument_parser(__doc__, rounds=8)
    parser.add_argument("--batch", type=int, default=512, help="in the limited memory")
    parser.add_argument("--gibibytes", type=float, default=12.0)
    parser.add_argument("--size", type=int, default=224, help="of an image")
    arguments = parser.parse_args()
    batch, results = arguments.batch, begin(arguments) | {"size": arguments.size}
    results["cost"] = {f"batch {n}": cost(arguments, n) for n in (SMALL, min(batch, LARGE))}
    save(results, output_path(arguments))
    if arguments.device.type == "cuda":
        results["limited"] = limited(arguments, batch)
    save(results, output_path(arguments))
    print({key: found for key, found in results.items() if key in ("cost", "limited")})


if __name__ == "__main__":
    main()
