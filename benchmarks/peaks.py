"""Whether a training step stays below its promised peak: `fuse(model, images, memory="peak ...")`.

    python benchmarks/peaks.py [--models resnet50 ...]
    python benchmarks/peaks.py --device cuda --batch 64

A step of SGD with momentum holds parameters, buffers, images and momenta all the time. The budgets
are these and shares of what a step of eager needs beyond them, in float32 and under autocast,
channels last. The measured peak is what the allocator counts of all of it. It should be at most
what was promised, and at least 0.95 of what the planner estimates for its plan, which is less than
was promised where no plan in between is faster.

Prints a table and writes benchmarks/results/peaks-cpu.json or gpu-peaks.json.
"""

import gc
from dataclasses import asdict, dataclass

import torch
from common import argument_parser, begin, output_path, print_table, save
from torch import nn
from tqdm import tqdm
from workloads import Configuration, Workload

from fusedconvbn import fuse, track_memory
from fusedconvbn.fusion.plan import OutOfReach

MODELS = [
    *("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vgg11_bn"),
    *("resnext50_32x4d", "shufflenet_v2_x1_0", "regnet_y_400mf", "mnasnet1_0", "densenet121"),
]
SHARES = (0.75, 0.5, 0.35)


@dataclass
class Promise:
    """A budget, the planner's estimate and the peak of a step, in bytes; `share` is of eager's peak
    without what is held, `saved` of the bytes that eager saves."""

    model: str
    dtype: str
    share: float
    promised: int
    planned: int
    measured: int
    saved: float


@dataclass
class Use:
    """Bytes that are held all the time, the most that are live in a whole step, and those that are
    saved for backward."""

    held: int
    peak: int
    saved: int

    @classmethod
    def of(cls, load: Workload, net: nn.Module) -> "Use":
        device = load.images.device
        optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)
        step = load.step(net)

        def whole_step() -> None:
            step()
            optimizer.step()

        for _ in range(2):
            whole_step()
        net.zero_grad()
        momenta = [t for state in optimizer.state.values() for t in state.values()]
        held = sum(t.nbytes for t in (*net.parameters(), *net.buffers(), load.images, *momenta))
        with track_memory(device) as memory:
            whole_step()
        peak = held + memory.peak
        if device.type == "cuda":  # what cuBLAS holds too
            net.zero_grad()
            torch.cuda.reset_peak_memory_stats(device)
            whole_step()
            peak = torch.cuda.max_memory_allocated(device)
        net.zero_grad()
        return cls(held, peak, memory.saved)


def promises(load: Workload, dtype: str) -> list[Promise]:
    eager, found = Use.of(load, load.model), []
    for share in SHARES:
        promised = eager.held + int(share * (eager.peak - eager.held))
        try:
            with load.autocast():
                net = fuse(load.model, load.images, memory=f"peak {promised}B", optimizer="sgd")
        except OutOfReach as error:
            tqdm.write(f"{load.name}, {dtype}: {error}")
            continue
        use = Use.of(load, net)
        planned, saved = net._fusion.plan.peak, use.saved / eager.saved
        row = (load.name, dtype, share, promised, planned, use.peak, saved)
        found.append(Promise(*row))
        tqdm.write(f"{row}")
    return found


def main() -> None:
    parser = argument_parser(__doc__, rounds=1)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, help="names that torchvision knows, or timm:NAME")
    add("--batch", type=int, default=8)
    add("--size", type=int, default=224, help="of an image")
    arguments = parser.parse_args()
    results = begin(arguments) | {"batch": arguments.batch, "size": arguments.size, "rows": []}
    output, lines = output_path(arguments), []
    for name in arguments.models:
        for dtype in ("float32", "bfloat16"):
            load = Workload.of(name, arguments, Configuration(dtype, "channels last", None))
            found = promises(load, dtype)
            results["rows"] += map(asdict, found)
            save(results, output)
            for p in found:
                cells = [f"{p.share:.2f}", f"{p.promised / 2**20:.0f} MiB"]
                cells += [f"{p.measured / of:.3f}" for of in (p.promised, p.planned)]
                cells.append(f"{p.saved:.2f}")
                lines.append([f"{p.model}, {p.dtype}", *cells])
            del load
            gc.collect()
    columns = ["", "of eager's peak", "promised", "measured / promised", "/ planned", "saved"]
    print_table(f"Peak of a whole step, batch {arguments.batch}", columns, lines)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
