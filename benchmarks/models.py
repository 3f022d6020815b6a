"""Whole models: fused at several budgets, as they are, with checkpoints, and compiled.

    python benchmarks/models.py [--models resnet50 ...] [--budgets 0.36,0.45] [--compile]
    python benchmarks/models.py --check       # memory and added FLOPs against what is promised, without times
    python benchmarks/models.py --count       # what fuse finds in many models, and the bytes it predicts
    python benchmarks/models.py --plot PATH   # draws the results that are there, measures nothing

A step is forward, sum and backward on random images. The variants of a model take turns in one process; a compiled one has a
process of its own, where it takes turns with eager. Every ratio is to eager in the same process. Prints tables and
writes benchmarks/results/models-<device>.json. Needs torchvision.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    Checkpointed,
    Step,
    machine,
    measure_memory,
    print_table,
    summarise,
    time_interleaved,
    torchvision_models,
)
from torch import Tensor, nn
from tqdm import tqdm

import fusedconvbn

Row = dict[str, Any]
Budget = str | float

MODELS = ["resnet50", "resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0"]
COMPILED = {"compile": 1.0, "compile, budget 0.5": 0.5, "compile, budget 0.3": 0.3}
NORMS = nn.modules.batchnorm._BatchNorm

# At most, of eager's: live at the end of forward, peak; and added convolution FLOPs. Batch 8, 224², channels_last, float32.
PROMISED = {
    ("resnet50", "auto"): (0.53, 0.62, 0.11),
    ("resnet50", "min"): (0.36, 0.48, 0.34),
    ("mobilenet_v2", "auto"): (0.53, 0.60, 0.15),
    ("mobilenet_v2", "min"): (0.16, 0.32, 0.40),
    ("densenet121", "auto"): (0.25, 0.38, 0.12),
    ("efficientnet_b0", "auto"): (0.26, 0.32, 0.15),
}
FUSE_SECONDS = {"resnet50": 5.0}


@dataclass
class Workload:
    """A model as it is and the images of a step."""

    name: str
    model: nn.Module
    images: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, arguments: argparse.Namespace) -> "Workload":
        torch.manual_seed(0)
        format = torch.contiguous_format if arguments.contiguous else torch.channels_last
        model = torchvision_models().get_model(name, weights=None)
        images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        model, images = (t.to(arguments.device, memory_format=format) for t in (model, images))
        return cls(name, model, images, getattr(torch, arguments.dtype))

    def autocast(self) -> AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.images.device.type, self.dtype, enabled=enabled)

    def step(self, net: nn.Module) -> Step:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            with self.autocast():
                loss = net(self.images).sum()
            loss.backward()

        return run

    def memory(self, net: nn.Module) -> dict[str, int]:
        return measure_memory(self.step(net), net, self.images.device)

    def fused(self, memory: Budget) -> tuple[nn.Module, Row]:
        """The fused model, and what fusing took and did."""
        with self.autocast():
            start = time.perf_counter()
            net = fusedconvbn.fuse(self.model, self.images, memory=memory)
            seconds = time.perf_counter() - start
            report = fusedconvbn.explain(self.model, self.images, memory=memory)
        return net, {
            "fuse_seconds": seconds,
            "added_flops": report.added_share,
            "pairs": [report.fused_pairs, report.pairs],
        }

    def rows(self, nets: dict[str, nn.Module], rounds: int) -> dict[str, Row]:
        """Memory and time of each, and their ratios to eager's."""
        memory = {name: self.memory(net) for name, net in nets.items()}
        steps = {name: self.step(net) for name, net in nets.items()}
        times = time_interleaved(steps, self.images.device, rounds, self.name, math.inf)
        return {
            name: {**memory[name], "of_eager": ratios(memory[name], memory["eager"]), **row}
            for name, row in summarise(times, "eager").items()
        }


def ratios(memory: dict[str, int], eager: dict[str, int]) -> dict[str, float]:
    return {key: memory[key] / eager[key] for key in eager}


def checkpointed(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy with a checkpoint around each block, and the blocks' paths: what stands right in a Sequential of the model
    (ResNet's layerN[i], features[i] of others) or in one of DenseNet's dense blocks, and has a batch norm inside."""
    model = copy.deepcopy(model)
    stages = {p: m for p, m in model.named_children() if isinstance(m, nn.Sequential)}
    stages |= {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleDict)}
    blocks = []
    for path, stage in stages.items():
        for name, block in stage.named_children():
            has_norm = any(isinstance(m, NORMS) for m in block.modules())
            if has_norm and not isinstance(block, (NORMS, nn.ModuleDict)):
                stage.register_module(name, Checkpointed(block))
                blocks.append(f"{path}.{name}")
    return model, blocks


def compiled(model: nn.Module, budget: float) -> nn.Module:
    torch._functorch.config.activation_memory_budget = budget
    return torch.compile(model)


def measure(name: str, arguments: argparse.Namespace) -> Row:
    load = Workload.of(name, arguments)
    nets = {"eager": load.model}
    if arguments.only_compiled:
        nets[arguments.only_compiled] = compiled(load.model, COMPILED[arguments.only_compiled])
        return {"variants": load.rows(nets, arguments.rounds)}
    facts: dict[str, Row] = {}
    for memory in ("auto", "min", 1.0, *arguments.budgets):
        try:
            nets[f"fuse {memory}"], facts[f"fuse {memory}"] = load.fused(memory)
        except ValueError as error:  # less than what can be reached
            tqdm.write(f"{name}: left out: {error}")
    nets["checkpoint"], blocks = checkpointed(load.model)
    if not blocks:
        del nets["checkpoint"]
    rows = load.rows(nets, arguments.rounds)
    for variant, row in facts.items():
        rows[variant] |= row
    for variant in COMPILED if arguments.compile else ():
        if row := measured_alone(name, variant):
            rows[variant] = row
    return {"checkpointed": blocks, "variants": rows}


def measured_alone(name: str, variant: str) -> Row | None:
    """The row of a compiled variant, with its ratios to eager in the process in which it was compiled."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        options = ["--models", name, "--only-compiled", variant, "--output", str(output)]
        run = subprocess.run([sys.executable, *sys.argv, *options], stdout=subprocess.DEVNULL)
        if run.returncode:
            tqdm.write(f"{name}: {variant} failed")
            return None
        rows = json.loads(output.read_text())["models"][name]["variants"]
    return {**rows[variant], "eager_milliseconds": rows["eager"]["milliseconds"]}


def show(name: str, result: Row) -> None:
    rows, lines = result["variants"], []
    for variant, row in rows.items():
        cells = [f"{share:.3f}" for share in row["of_eager"].values()]
        cells += [f"{row['ratio']:.3f}", f"{row['spread']:.0%}"]
        if "pairs" in row:
            cells += [f"{100 * row['added_flops']:.1f} %", f"{row['fuse_seconds']:.1f} s"]
            cells.append("{} / {}".format(*row["pairs"]))
        lines.append([variant, *cells, *[""] * (8 - len(cells))])
    eager = rows["eager"]
    saved, peak = (eager[key] / 2**20 for key in ("saved", "peak"))
    print_table(
        f"{name}, of eager's {saved:.0f} MiB saved, {peak:.0f} MiB peak, {eager['milliseconds']:.0f} ms",
        ["", "saved", "forward", "peak", "time", "spread", "conv FLOPs", "fuse", "pairs"],
        lines,
    )


def check(arguments: argparse.Namespace) -> bool:
    """Whether everything promised about the chosen models is kept; prints it side by side."""
    lines, kept = [], True
    for name in tqdm([m for m in arguments.models if any(m == p for p, _ in PROMISED)]):
        load = Workload.of(name, arguments)
        eager = load.memory(load.model)
        for (of, memory), (forward, peak, flops) in PROMISED.items():
            if of != name:
                continue
            net, facts = load.fused(memory)
            share = ratios(load.memory(net), eager)
            reached = {
                "end of forward": (forward, share["end_of_forward"]),
                "peak": (peak, share["peak"]),
                "added conv FLOPs": (flops, facts["added_flops"]),
            }
            if name in FUSE_SECONDS:
                reached["seconds to fuse"] = (FUSE_SECONDS[name], facts["fuse_seconds"])
            for what, (most, value) in reached.items():
                kept &= value <= most
                verdict = "" if value <= most else "MISSED"
                lines.append([f"{name} {memory}: {what}", f"{most:.2f}", f"{value:.3f}", verdict])
    print_table("Promised, of eager's", ["", "at most", "reached", ""], lines)
    return kept


def plot(results: Row, path: Path) -> None:
    """Time against saved bytes of each variant, both as ratios to eager's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(1 + 3.6 * len(models), 4.2), squeeze=False, layout="constrained"
    )
    variants = list(dict.fromkeys(v for m in models.values() for v in m["variants"]))
    handles = {}
    for ax, (name, model) in zip(axes[0], models.items(), strict=True):
        for variant, row in model["variants"].items():
            i = variants.index(variant)
            marker = {"fuse": "o", "eager": "s"}.get(variant.split()[0], "^")
            handles[variant] = ax.scatter(
                row["of_eager"]["saved"], row["ratio"], color=f"C{i}", marker=marker, zorder=2
            )
        ax.set_title(name)
        ax.set_xlabel("bytes saved for backward, of eager's")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of a step, of eager's")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 * len(models))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


COUNTED = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "googlenet",
    "inception_v3",
    "mnasnet1_0",
    "vgg16_bn",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "r3d_18",
]


def count(batch: int, size: int) -> None:
    """What fuse finds in many models, and the bytes that it predicts; nothing is computed."""
    print(
        "| model | pairs fused / found | chains | saved, auto | saved, min |\n|---|---|---|---|---|"
    )
    for name in COUNTED:
        options = {"weights": None}
        if "_resnet50" in name and name[0] in "df":
            options |= {"weights_backbone": None, "aux_loss": True}
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": False}
        model = torchvision_models().get_model(name, **options)
        image = (16, 112, 112) if name == "r3d_18" else 2 * (299 if "inception" in name else size,)
        reports = [
            fusedconvbn.explain(model, torch.empty(batch, 3, *image), memory=memory)
            for memory in ("auto", "min")
        ]
        shares = " | ".join(f"{r.saved / r.eager:.2f}" for r in reports)
        report = reports[0]
        pairs = f"{report.fused_pairs} / {report.pairs}"
        print(f"| {name} | {pairs} | {len(report.chains)} | {shares} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names that torchvision knows")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of an image")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each variant")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast"
    )
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument(
        "--budgets",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[],
        help="more fractions for fuse, as in 0.36,0.45",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile at three budgets too")
    parser.add_argument("--only-compiled", choices=COMPILED, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="only see whether promises are kept")
    parser.add_argument(
        "--count", action="store_true", help="only say what is found in many models"
    )
    parser.add_argument("--plot", type=Path, help="only draw what --output has, to this file")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/models-<device>.json"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    output = arguments.output or ROOT / f"benchmarks/results/models-{arguments.device.type}.json"
    if arguments.plot:
        plot(json.loads(output.read_text()), arguments.plot)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.count:
        return count(arguments.batch, arguments.size)
    if arguments.check:
        sys.exit(not check(arguments))

    results: Row = {
        "machine": machine(arguments.device),
        **{key: getattr(arguments, key) for key in ("threads", "batch", "size", "rounds", "dtype")},
        "format": "contiguous" if arguments.contiguous else "channels_last",
        "models": {},
    }
    print(
        ", ".join(
            f"{k} {v}"
            for k, v in (results["machine"] | {"threads": arguments.threads}).items()
            if v
        )
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(arguments.models, disable=bool(arguments.only_compiled)):
        results["models"][name] = measure(name, arguments)
        show(name, results["models"][name])
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{output}")


if __name__ == "__main__":
    main()
