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
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import Row, argument_parser, begin, output_path, print_table, save, summarise
from counts import count
from promises import check
from rivals import COMPILED, checkpointed, compiled, floor, inplace_abn, python_reference
from targets import REQUIRED_COLUMNS, TARGETS, required_rows
from tqdm import tqdm
from workloads import MODELS, ON_CPU, ON_GPU, Budget, Configuration, Workload, ratios

QUICK: list[Budget] = [1.0, "auto", 0.55, "min"]  # in a minute and a half on a GPU
PROCESSES = 3  # which share the rounds; one, of this many rounds, where rivals are left out
ROUNDS_ELSEWHERE = 5
TOGETHER = "together"  # the variant that is all of them but the compiled ones


def pooled(runs: list[dict[str, Row]]) -> dict[str, Row]:
    """What processes have measured as one, with ratios to eager's."""
    times = {name: [s for run in runs for s in run[name].pop("seconds")] for name in runs[0]}
    first = runs[0]
    return {
        name: {**first[name], "of_eager": ratios(first[name], first["eager"]), **row}
        for name, row in summarise(times, "eager").items()
    }


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
