"""Whole models: fused at several budgets, as they are, with checkpoints, compiled, and without what is fused (the floor).

    python benchmarks/models.py [--models resnet50 ...] [--only "float32, channels last, 2 threads"] [--resume]
    python benchmarks/models.py --check       # memory and added FLOPs against what is promised, without times
    python benchmarks/models.py --count       # what fuse finds in many models, and the bytes it predicts

A step is forward, sum and backward on random images. The variants of a model take turns in one process; a compiled one has a
process of its own, where it takes turns with eager. Every ratio is to eager in the same process. Prints tables and
writes benchmarks/results/models-<device>.json after each model and configuration; benchmarks/tables.py makes tables and plots of it.
Needs torchvision. The tutorial's layer knows no stride and no padding, so no model here can be made of it: it is compared in
conv_bn.py.
"""

import argparse
import copy
import itertools
import json
import math
import os
import resource
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
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)


@dataclass(frozen=True)
class Configuration:
    dtype: str  # bfloat16: autocast
    format: str
    threads: int
    rivals: bool = False  # whether all of them are measured, or only eager and fused

    def __str__(self) -> str:
        return f"{self.dtype}, {self.format}, {self.threads} threads"


CONFIGURATIONS = [
    Configuration(dtype, format, threads, rivals=(format, threads) == ("channels last", 2))
    for threads in (2, 1)
    for format in ("channels last", "contiguous")
    for dtype in ("float32", "bfloat16")
]

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


@dataclass(frozen=True)
class Target:
    """A step's time, of eager's, that is to be reached with so many of its saved bytes; channels last, two threads."""

    model: str
    saved: float
    most: float
    aim: float
    dtype: str = "float32"

    @property
    def configuration(self) -> str:
        return str(Configuration(self.dtype, "channels last", 2))


TARGETS = [
    Target("resnet50", 0.52, 0.95, 0.88),
    Target("resnet50", 0.36, 1.05, 0.98),
    Target("resnet50", 1.00, 0.90, 0.82),
    Target("resnet50", 0.40, 0.95, 0.80, "bfloat16"),
    Target("mobilenet_v2", 0.35, 0.90, 0.75),
    Target("densenet121", 0.25, 1.00, 0.85),
    Target("efficientnet_b0", 0.26, 0.82, 0.72),
]


@dataclass
class Workload:
    """A model as it is and the images of a step."""

    name: str
    model: nn.Module
    images: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls, name: str, arguments: argparse.Namespace, configuration: Configuration
    ) -> "Workload":
        torch.manual_seed(0)
        formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
        format = formats[configuration.format]
        model = torchvision_models().get_model(name, weights=None)
        images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        model, images = (t.to(arguments.device, memory_format=format) for t in (model, images))
        return cls(name, model, images, getattr(torch, configuration.dtype))

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
        """Memory, page faults and time of each, and their ratios to eager's."""
        steps = {name: self.step(net) for name, net in nets.items()}
        memory = {
            name: {**self.memory(net), "faults": page_faults(steps[name])}
            for name, net in nets.items()
        }
        times = time_interleaved(steps, self.images.device, rounds, self.name, math.inf)
        return {
            name: {**memory[name], "of_eager": ratios(memory[name], memory["eager"]), **row}
            for name, row in summarise(times, "eager").items()
        }


def page_faults(step: Step) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def ratios(memory: dict[str, int], eager: dict[str, int]) -> dict[str, float]:
    return {key: memory[key] / eager[key] for key in ("saved", "end_of_forward", "peak")}


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


def floor(model: nn.Module) -> nn.Module:
    """A copy without batch norm and activations: what no fusion can be faster than with the same convolutions."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NORMS, *ACTIVATIONS)):
                setattr(module, name, nn.Identity())
    return model


def inplace_abn(model: nn.Module) -> nn.Module | None:
    """A copy with In-Place ABN where a batch norm and a leaky ReLU, which stands for ReLU, follow each other; None where the
    package is missing."""
    try:
        from inplace_abn import InPlaceABN
    except ImportError:
        return None
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, norm), (next_name, act) in itertools.pairwise(children):
            if isinstance(norm, NORMS) and isinstance(act, ACTIVATIONS):
                setattr(module, name, InPlaceABN(norm.num_features))
                setattr(module, next_name, nn.Identity())
    return model


def budgets(name: str, configuration: Configuration) -> list[Budget]:
    targets = [t for t in TARGETS if (t.model, t.configuration) == (name, str(configuration))]
    return ["auto", "min", 1.0, *(t.saved for t in targets if t.saved < 1)]


def measure(name: str, configuration: Configuration, arguments: argparse.Namespace) -> Row:
    torch.set_num_threads(configuration.threads)
    load = Workload.of(name, arguments, configuration)
    nets = {"eager": load.model}
    if arguments.only_variant in COMPILED:
        nets[arguments.only_variant] = compiled(load.model, COMPILED[arguments.only_variant])
        return load.rows(nets, arguments.rounds)
    facts: dict[str, Row] = {}
    for memory in budgets(name, configuration) if configuration.rivals else ("auto", 1.0):
        try:
            nets[f"fuse {memory}"], facts[f"fuse {memory}"] = load.fused(memory)
        except ValueError as error:  # less than what can be reached
            tqdm.write(f"{name}: left out: {error}")
    if configuration.rivals:
        nets["checkpoint"], blocks = checkpointed(load.model)
        if not blocks:
            del nets["checkpoint"]
        if net := inplace_abn(load.model):
            nets["In-Place ABN"] = net
        nets["floor: convolutions alone"] = floor(load.model)
    rows = load.rows(nets, arguments.rounds)
    for variant, row in facts.items():
        rows[variant] |= row
    return rows


def measured_alone(name: str, configuration: Configuration, variant: str) -> Row | None:
    """The row of a variant that has a process of its own, with its ratios to eager there."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        options = ["--models", name, "--only", str(configuration), "--only-variant", variant]
        command = [sys.executable, *sys.argv, *options, "--output", str(output)]
        run = subprocess.run(command, stdout=subprocess.DEVNULL)
        if run.returncode:
            tqdm.write(f"{name}: {variant} failed")
            return None
        rows = json.loads(output.read_text())["models"][name][str(configuration)]
    return {**rows[variant], "eager_milliseconds": rows["eager"]["milliseconds"]}


def show(title: str, rows: dict[str, Row]) -> None:
    lines = []
    for variant, row in rows.items():
        cells = [f"{share:.3f}" for share in row["of_eager"].values()]
        cells += [f"{row['ratio']:.3f}", f"{row['spread']:.0%}", f"{row['faults']:.0f}"]
        if "pairs" in row:
            cells += [f"{100 * row['added_flops']:.1f} %", f"{row['fuse_seconds']:.1f} s"]
            cells.append("{} / {}".format(*row["pairs"]))
        lines.append([variant, *cells, *[""] * (9 - len(cells))])
    eager = rows["eager"]
    saved, peak = (eager[key] / 2**20 for key in ("saved", "peak"))
    print_table(
        f"{title}, of eager's {saved:.0f} MiB saved, {peak:.0f} MiB peak, {eager['milliseconds']:.0f} ms",
        ["", "saved", "forward", "peak", "time", "spread", "faults", "conv FLOPs", "fuse", "pairs"],
        lines,
    )


def reached(target: Target, rows: dict[str, Row]) -> tuple[str, Row] | None:
    """The fastest fused variant within the target's bytes."""
    fused = {
        variant: row
        for variant, row in rows.items()
        if variant.startswith("fuse") and row["of_eager"]["saved"] <= target.saved + 0.0005
    }
    return min(fused.items(), key=lambda item: item[1]["ratio"], default=None)


def faster_compiled(rows: dict[str, Row]) -> list[tuple[str, str]]:
    """(compiled variant, fused variant) where the compiled one saves no less memory than the fused one, which is the fastest
    with at most its bytes, and is faster."""
    behind = []
    for variant in (v for v in COMPILED if v in rows):
        compiled_row = rows[variant]
        others = [
            (row["ratio"], name)
            for name, row in rows.items()
            if name.startswith("fuse")
            and row["of_eager"]["saved"] <= compiled_row["of_eager"]["saved"]
        ]
        if not others or min(others)[0] > compiled_row["ratio"]:
            behind.append((variant, min(others)[1] if others else "none"))
    return behind


def check(arguments: argparse.Namespace) -> bool:
    """Whether everything promised about the chosen models is kept; prints it side by side."""
    lines, kept = [], True
    for name in tqdm([m for m in arguments.models if any(m == p for p, _ in PROMISED)]):
        load = Workload.of(name, arguments, CONFIGURATIONS[0])
        eager = load.memory(load.model)
        for (of, memory), (forward, peak, flops) in PROMISED.items():
            if of != name:
                continue
            net, facts = load.fused(memory)
            share = ratios(load.memory(net), eager)
            found = {
                "end of forward": (forward, share["end_of_forward"]),
                "peak": (peak, share["peak"]),
                "added conv FLOPs": (flops, facts["added_flops"]),
            }
            if name in FUSE_SECONDS:
                found["seconds to fuse"] = (FUSE_SECONDS[name], facts["fuse_seconds"])
            for what, (most, value) in found.items():
                kept &= value <= most
                verdict = "" if value <= most else "MISSED"
                lines.append([f"{name} {memory}: {what}", f"{most:.2f}", f"{value:.3f}", verdict])
    print_table("Promised, of eager's", ["", "at most", "reached", ""], lines)
    return kept


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


def write(results: Row, output: Path) -> None:
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names that torchvision knows")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of an image")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant")
    names = [str(c) for c in CONFIGURATIONS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="CONFIGURATION", help="of them"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument("--only-variant", help=argparse.SUPPRESS)
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try algorithms")
    parser.add_argument("--resume", action="store_true", help="keep what --output has")
    parser.add_argument("--check", action="store_true", help="only see whether promises are kept")
    parser.add_argument(
        "--count", action="store_true", help="only say what is found in many models"
    )
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/models-<device>.json"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    if arguments.count:
        return count(arguments.batch, arguments.size)
    if arguments.check:
        sys.exit(not check(arguments))

    output = arguments.output or ROOT / f"benchmarks/results/models-{arguments.device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: Row = {
        "machine": machine(arguments.device),
        **{key: getattr(arguments, key) for key in ("batch", "size", "rounds")},
        "models": {},
    }
    if arguments.resume and output.exists():
        results["models"] = json.loads(output.read_text())["models"]
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items() if v))
    for configuration in CONFIGURATIONS:
        for name in arguments.models if str(configuration) in arguments.only else ():
            of_model = results["models"].setdefault(name, {})
            if str(configuration) not in of_model:
                of_model[str(configuration)] = measure(name, configuration, arguments)
            rows = of_model[str(configuration)]
            write(results, output)
            alone = configuration.rivals and arguments.compile and not arguments.only_variant
            for variant in (v for v in COMPILED if alone and v not in rows):
                if row := measured_alone(name, configuration, variant):
                    rows[variant] = row
                    write(results, output)
            show(f"{name}, {configuration}", rows)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
