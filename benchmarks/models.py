"""Whole models: fused at several budgets, as they are, with checkpoints, compiled, and without what is fused (the floor).

    python benchmarks/models.py [--models resnet50 ...] [--only "float32, channels last, 2 threads"] [--resume]
    python benchmarks/models.py --device cuda --models resnet50 --only "bfloat16, channels last" --batch 128 --seconds 90
    python benchmarks/models.py --check       # memory and added FLOPs against what is promised, without times
    python benchmarks/models.py --count       # what fuse finds in many models, and the bytes it predicts

A step is forward, sum and backward on random images. The variants of a model take turns in one process, of which there are a few:
where the memory of a process happens to lie makes 10 % and more, for all of its life. A compiled variant has a process of its own,
where it takes turns with eager; of each memory budget of the compiler there is a fused variant that saves no more. Every ratio is to
eager in the same processes. Prints tables and writes benchmarks/results/models-cpu.json or gpu-models.json after each measurement; --resume adds what
is missing there, and each row says of which commit it is. benchmarks/tables.py makes tables and plots of it. Needs torchvision. The tutorial's layer knows no stride and no
groups: the Python reference has it where a pair has neither, and eager's elsewhere.

With --seconds a model is measured in this process alone: eager and the fused variants, then one compiled variant after another
until so many seconds are over; what does not fit is left out. --variants names those that are wanted.
"""

import argparse
import copy
import importlib
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    FORMATS,
    Checkpointed,
    PythonConvBN,
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
from torch import Tensor, nn
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import _torchvision

Budget = str | float

QUICK: list[Budget] = [1.0, "auto", 0.55, "min"]  # in a minute and a half on a GPU
MODELS = ["resnet50", "resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0"]
COMPILED = {"compile": 1.0, "compile, budget 0.5": 0.5, "compile, budget 0.3": 0.3}
PROCESSES = 3  # which share the rounds; one, of this many rounds, where rivals are left out
ROUNDS_ELSEWHERE = 5
TOGETHER = "together"  # the variant that is all of them but the compiled ones
NORMS = nn.modules.batchnorm._BatchNorm
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)


@dataclass(frozen=True)
class Configuration:
    dtype: str  # bfloat16: autocast
    format: str
    threads: int | None  # None on a GPU
    rivals: bool = False  # whether all of them are measured, or only eager and fused

    def __str__(self) -> str:
        threads = [] if self.threads is None else [f"{self.threads} threads"]
        return ", ".join([self.dtype, self.format, *threads])


ON_GPU = [
    Configuration(dtype, "channels last", None, rivals=True) for dtype in ("float32", "bfloat16")
]
ON_CPU = [
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

# On a GPU, bfloat16: time of eager's, at most and aimed at.
REQUIRED_ON_GPU = {
    ("resnet50", "fuse 1.0"): (0.85, 0.70),
    ("resnet50", "fuse 0.55"): (0.95, 0.80),
    ("resnet50", "fuse min"): (1.10, 0.95),
    ("mobilenet_v2", "fuse auto"): (1.00, 0.80),
    ("efficientnet_b0", "fuse auto"): (1.00, 0.80),
    ("densenet121", "fuse auto"): (1.00, 0.80),
}


def definition(name: str) -> nn.Module:
    """torchvision's, or timm's of timm:NAME, which is not installed for this."""
    models = _torchvision.models()
    library, _, own = name.rpartition(":")
    return (
        importlib.import_module(library).create_model(own)
        if library
        else models.get_model(name, weights=None)
    )


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
        if configuration.threads is not None:
            torch.set_num_threads(configuration.threads)
        format = FORMATS[configuration.format]
        model = definition(name)
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

    def all_fused(self, memories: Sequence[Budget]) -> tuple[dict[str, nn.Module], dict[str, Row]]:
        """The fused model at each budget that can be reached, and what is known of each."""
        nets, facts = {}, {}
        for memory in memories:
            try:
                nets[f"fuse {memory}"], facts[f"fuse {memory}"] = self.fused(memory)
            except ValueError as error:  # less than what can be reached
                tqdm.write(f"{self.name}: left out: {error}")
        return nets, facts

    def rows(self, nets: dict[str, nn.Module], rounds: int) -> dict[str, Row]:
        """Memory, page faults and the seconds of each round."""
        steps = {name: self.step(net) for name, net in nets.items()}
        memory = {
            name: {**self.memory(net), "faults": page_faults(steps[name])}
            for name, net in nets.items()
        }
        times = time_interleaved(steps, self.images.device, rounds, self.name, math.inf)
        return {name: {**memory[name], "seconds": times[name]} for name in nets}


def pooled(runs: list[dict[str, Row]]) -> dict[str, Row]:
    """What processes have measured as one, with ratios to eager's."""
    times = {name: [s for run in runs for s in run[name].pop("seconds")] for name in runs[0]}
    first = runs[0]
    return {
        name: {**first[name], "of_eager": ratios(first[name], first["eager"]), **row}
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
    """With a backend of its own, so that another budget's code for the same model is not taken."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        with config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return torch.compile(model, backend=backend)


def floor(model: nn.Module) -> nn.Module:
    """A copy without batch norm and activations: what no fusion can be faster than with the same convolutions."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NORMS, *ACTIVATIONS)):
                setattr(module, name, nn.Identity())
    return model


def python_reference(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy with the tutorial's layer in the place of each pair that it can do, and how many those are."""
    model = copy.deepcopy(model)
    replaced = 0
    for module in list(model.modules()):
        for (name, conv), (next_name, bn) in itertools.pairwise(list(module.named_children())):
            if (
                isinstance(conv, nn.Conv2d)
                and isinstance(bn, nn.BatchNorm2d)
                and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
                and conv.bias is None
                and conv.out_channels == bn.num_features
            ):
                layer = PythonConvBN(conv.weight, bn.eps, conv.padding, bn)
                setattr(module, name, layer)
                setattr(module, next_name, nn.Identity())
                replaced += 1
    return model, replaced


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


def budgets(name: str, configuration: Configuration, beside: list[float]) -> list[Budget]:
    """In every layout and number of threads those that something is required of in one, and those `beside` a rival."""
    wanted = {t.saved for t in TARGETS if (t.model, t.dtype) == (name, configuration.dtype)}
    return ["auto", "min", 1.0, *sorted({*wanted, *beside} - {1.0}, reverse=True)]


def shares_of_compiled(rows: dict[str, Row]) -> list[float]:
    """What was saved under each memory budget of the compiler, rounded down."""
    saved = [rows[v]["of_eager"]["saved"] for v in COMPILED if COMPILED[v] < 1 and v in rows]
    return [math.floor(100 * share) / 100 for share in saved]


def measure(name: str, configuration: Configuration, arguments: argparse.Namespace) -> Row:
    load = Workload.of(name, arguments, configuration)
    fused, facts = load.all_fused(budgets(name, configuration, arguments.beside))
    nets = {"eager": load.model, **fused}
    if configuration.rivals:
        net, blocks = checkpointed(load.model)
        if blocks:
            nets["checkpoint"] = net
        if configuration.dtype == "float32":  # the tutorial's backward knows no autocast
            net, replaced = python_reference(load.model)
            if replaced:
                nets["Python reference"], facts["Python reference"] = net, {"replaced": replaced}
        if net := inplace_abn(load.model):
            nets["In-Place ABN"] = net
        nets["floor: convolutions alone"] = floor(load.model)
    shared, elsewhere = (
        math.ceil(arguments.rounds / PROCESSES),
        min(arguments.rounds, ROUNDS_ELSEWHERE),
    )
    rows = load.rows(nets, shared if configuration.rivals else elsewhere)
    for variant, row in facts.items():
        rows[variant] |= row
    return rows


def measure_here(
    name: str, configuration: Configuration, arguments: argparse.Namespace, have: Sequence[str]
) -> Iterator[dict[str, Row]]:
    """Rows of the variants that are wanted and that we do not `have` yet, in parts, until the seconds are over. Each part has
    turns of eager's; the first has its row too."""
    deadline = time.perf_counter() + arguments.seconds

    def missing(variant: str) -> bool:
        return variant not in have and variant in (arguments.variants or [variant])

    load = Workload.of(name, arguments, configuration)
    fused, facts = load.all_fused([m for m in QUICK if missing(f"fuse {m}")])
    if fused or "eager" not in have:
        rows = pooled([load.rows({"eager": load.model, **fused}, arguments.rounds)])
        yield {v: {**row, **facts.get(v, {})} for v, row in rows.items() if v not in have}
    for variant, budget in COMPILED.items():
        if missing(variant) and time.perf_counter() < deadline:
            nets = {"eager": load.model, variant: compiled(load.model, budget)}
            rows = pooled([load.rows(nets, arguments.rounds)])
            yield {variant: {**rows[variant], "eager_milliseconds": rows["eager"]["milliseconds"]}}


def measure_variant(name: str, configuration: Configuration, arguments: argparse.Namespace) -> Row:
    """In a process of its own: a compiled variant in turns with eager, or all others."""
    if arguments.variant == TOGETHER:
        return measure(name, configuration, arguments)
    load, variant = Workload.of(name, arguments, configuration), arguments.variant
    nets = {"eager": load.model, variant: compiled(load.model, COMPILED[variant])}
    return load.rows(nets, arguments.rounds)


def in_process(name: str, configuration: Configuration, variant: str, *options: str) -> Row | None:
    """What `measure_variant` returns there."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        chosen = ["--models", name, "--only", str(configuration), "--variant", variant]
        command = [sys.executable, *sys.argv, *chosen, *options, "--output", str(output)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            tqdm.write(f"{name}: {variant} failed")
            return None
        return json.loads(output.read_text("utf-8"))


def measure_compiled(name: str, configuration: Configuration, variant: str) -> Row | None:
    if run := in_process(name, configuration, variant):
        rows = pooled([run])
        return {**rows[variant], "eager_milliseconds": rows["eager"]["milliseconds"]}
    return None


def measure_together(
    name: str, configuration: Configuration, beside: list[float]
) -> dict[str, Row]:
    runs = [
        in_process(name, configuration, TOGETHER, "--beside", *map(str, beside))
        for _ in range(PROCESSES if configuration.rivals else 1)
    ]
    return pooled(runs) if all(runs) else {}


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
        [
            "",
            "saved",
            "forward",
            "peak",
            "time",
            "spread",
            "faults",
            "conv FLOPs",
            "fuse",
            "pairs",
        ],
        lines,
    )


def reached(target: Target, rows: dict[str, Row]) -> Row | None:
    """The fastest fused variant within the target's bytes."""
    fused = [
        row
        for variant, row in rows.items()
        if variant.startswith("fuse") and row["of_eager"]["saved"] <= target.saved + 0.0005
    ]
    return min(fused, key=lambda row: row["ratio"], default=None)


def time_and_bytes(row: Row) -> str:
    of = row["of_eager"]
    return f"{row['ratio']:.3f} at {of['saved']:.2f} (peak {of['peak']:.2f})"


def compiled_within(rows: dict[str, Row], saved: float) -> str:
    """The fastest compiled variant of those that save no more."""
    compiled = [row for variant, row in rows.items() if variant in COMPILED]
    within = [row for row in compiled if row["of_eager"]["saved"] <= saved + 0.0005]
    if not within:
        return "nothing as small" if compiled else "not measured"
    return time_and_bytes(min(within, key=lambda row: row["ratio"]))


def required_rows(models: dict[str, dict[str, dict[str, Row]]]) -> list[list[str]]:
    """What is required, reached, and compiled at most at that memory, of what has been measured."""
    lines = []
    for target in TARGETS:
        rows = models.get(target.model, {}).get(target.configuration)
        if not rows:
            continue
        best = reached(target, rows)
        missed = "" if best and best["ratio"] <= target.most else " MISSED"
        lines.append(
            [
                f"{target.model}, {target.dtype}, ≤ {target.saved:.2f} saved",
                f"≤ {target.most:.2f}",
                f"{target.aim:.2f}",
                (time_and_bytes(best) if best else "out of reach") + missed,
                compiled_within(rows, target.saved),
            ]
        )
    return lines


def required_rows_on_gpu(results: Row) -> list[list[str]]:
    """The same of a GPU, where it is required of variants, and torch.compile is to be no faster at the memory that each of
    them really takes."""
    lines = []
    for (model, variant), (most, aim) in REQUIRED_ON_GPU.items():
        for configuration, rows in results["models"].get(model, {}).items():
            if variant in rows and configuration.startswith("bfloat16"):
                row = rows[variant]
                missed = "" if row["ratio"] <= most else " MISSED"
                lines.append(
                    [
                        f"{model}, {variant}, batch {results['batch']}",
                        f"≤ {most:.2f}",
                        f"{aim:.2f}",
                        time_and_bytes(row) + missed,
                        compiled_within(rows, row["of_eager"]["saved"]),
                    ]
                )
    return lines


REQUIRED_COLUMNS = ["", "time, required", "aim", "reached", "torch.compile"]


def faster_compiled(rows: dict[str, Row]) -> list[tuple[str, str | None]]:
    """Each compiled variant that is faster than every fused one with at most its bytes, and the fastest of those, if any."""
    behind = []
    for variant in (v for v in COMPILED if v in rows):
        theirs = rows[variant]
        others = [
            (row["ratio"], name)
            for name, row in rows.items()
            if name.startswith("fuse") and row["of_eager"]["saved"] <= theirs["of_eager"]["saved"]
        ]
        ratio, name = min(others, default=(math.inf, None))
        if ratio > theirs["ratio"]:
            behind.append((variant, name))
    return behind


def check(arguments: argparse.Namespace) -> bool:
    """Whether everything promised about the chosen models is kept; prints it side by side."""
    lines, kept = [], True
    for name in tqdm([m for m in arguments.models if any(m == p for p, _ in PROMISED)]):
        load = Workload.of(name, arguments, ON_CPU[0])
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
        model = _torchvision.models().get_model(name, **options)
        image = (16, 112, 112) if name == "r3d_18" else 2 * (299 if "inception" in name else size,)
        reports = [
            fusedconvbn.explain(model, torch.empty(batch, 3, *image), memory=memory)
            for memory in ("auto", "min")
        ]
        shares = " | ".join(f"{r.saved / r.eager:.2f}" for r in reports)
        report = reports[0]
        pairs = f"{report.fused_pairs} / {report.pairs}"
        print(f"| {name} | {pairs} | {len(report.chains)} | {shares} |", flush=True)


def resumed(results: Row, path: Path) -> dict[str, dict[str, dict[str, Row]]]:
    """The models in `path`, each row with the commit that it is of; an error where they were measured in another way."""
    old = json.loads(path.read_text("utf-8"))
    keys = ("batch", "size", "rounds", "cudnn_benchmark")
    machine = ("device", "cores", "capability", "torch", "compiler")
    differ = [key for key in keys if key in old and old[key] != results[key]]
    differ += [key for key in machine if old["machine"][key] != results["machine"][key]]
    if differ:
        sys.exit(f"--resume: {path} has another {', '.join(differ)}")
    for configurations in old["models"].values():
        for rows in configurations.values():
            for row in rows.values():
                row.setdefault("commit", old["machine"].get("commit", "unknown"))
    return old["models"]


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="names that torchvision knows, or timm:NAME"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of an image")
    names = [str(c) for c in (*ON_CPU, *ON_GPU)]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CONFIGURATION", help="default: all"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="for a model, all in this process; what does not fit is left out",
    )
    names = [f"fuse {memory}" for memory in QUICK] + list(COMPILED)
    parser.add_argument("--variants", nargs="+", choices=names, help="with --seconds; default: all")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--beside", nargs="*", type=float, default=[], help="more budgets")
    parser.add_argument("--resume", action="store_true", help="keep what --output has")
    parser.add_argument("--check", action="store_true", help="only see whether promises are kept")
    parser.add_argument(
        "--count", action="store_true", help="only say what is found in many models"
    )
    arguments = parser.parse_args()
    if arguments.count:
        return count(arguments.batch, arguments.size)
    if arguments.check:
        sys.exit(not check(arguments))

    results: Row = {
        **begin(arguments),
        **{key: getattr(arguments, key) for key in ("batch", "size", "rounds")},
        "models": {},
    }
    commit = results["machine"].pop("commit")  # each row's own: they can be of several
    output = output_path(arguments)
    configurations = [
        configuration
        for configuration in (ON_GPU if arguments.device.type == "cuda" else ON_CPU)
        if arguments.only is None or str(configuration) in arguments.only
    ]
    if not configurations:
        parser.error("--only: none of these is for this device")
    if arguments.variant:
        return save(measure_variant(*arguments.models, *configurations, arguments), output)
    if arguments.resume and output.exists():
        results["models"] = resumed(results, output)
    for configuration, name in itertools.product(configurations, arguments.models):
        key = str(configuration)
        rows = results["models"].setdefault(name, {}).setdefault(key, {})
        if arguments.seconds is not None:
            for found in measure_here(name, configuration, arguments, list(rows)):
                rows |= {variant: {**row, "commit": commit} for variant, row in found.items()}
                save(results, output)
                show(f"{name}, {key}", rows)
            continue
        for variant in COMPILED if configuration.rivals and arguments.compile else ():
            if variant not in rows and (row := measure_compiled(name, configuration, variant)):
                rows[variant] = {**row, "commit": commit}
                save(results, output)
        if "eager" not in rows:
            beside = shares_of_compiled(rows) + arguments.beside
            measured = measure_together(name, configuration, beside)
            rows |= {variant: {**row, "commit": commit} for variant, row in measured.items()}
            save(results, output)
        if "eager" in rows:
            show(f"{name}, {key}", rows)
    if lines := required_rows(results["models"]):
        print_table("Required, of eager's time", REQUIRED_COLUMNS, lines)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
