"""Bytes and time of a training step of whole models: eager, fused at several budgets, and rivals.

    python benchmarks/models.py [--models resnet50 ...] [--only CONFIGURATION] [--resume]
    python benchmarks/models.py --device cuda --models resnet50 --batch 128 --seconds 90
    python benchmarks/models.py --check    # whether the promises hold (promises.py); takes no times
    python benchmarks/models.py --count    # what fuse finds in many models (counts.py)

A CONFIGURATION is a text such as "float32, channels last, 2 threads". A step is forward, sum and
backward on random images. The variants of a model take turns in one process, and several processes
are pooled: where the memory of a process lies changes its times by 10 % and more, for all of its
life. Each compiled variant takes turns with eager in a process of its own. For each memory budget
of the compiler there is a fused variant that saves no more. Every ratio is to eager in the same
processes. The Python reference has the tutorial's layer for pairs without stride and groups, which
that layer does not support, and PyTorch's layers for the others.

Prints tables and writes benchmarks/results/models-cpu.json or gpu-models.json after each
measurement. Each row names its commit. --resume adds what the file lacks. benchmarks/tables.py
makes tables and plots of the file. Needs torchvision.

With --seconds a model is measured in this process alone: eager and the fused variants, then one
compiled variant after another while time is left. --variants names those to measure.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import Row, argument_parser, begin, output_path, print_table, save, summarise
from counts import count
from promises import check
from rivals import COMPILED, checkpointed, compiled, floor, inplace_abn, python_reference
from targets import REQUIRED_COLUMNS, TARGETS, required_rows
from tqdm import tqdm
from workloads import MODELS, ON_CPU, ON_GPU, Budget, Configuration, Workload, ratios

QUICK: list[Budget] = [1.0, "auto", 0.55, "min", 0.2, 0.1]  # in two minutes on a GPU
PROCESSES = 3  # which share the rounds; without rivals there is one process
ROUNDS_WITHOUT_RIVALS = 5
TOGETHER = "together"  # a --variant: all of them but the compiled ones


def pooled(runs: list[dict[str, Row]]) -> dict[str, Row]:
    """The rows of several processes as one, with ratios to eager's."""
    times = {name: [s for run in runs for s in run[name].pop("seconds")] for name in runs[0]}
    first = runs[0]
    return {
        name: {**first[name], "of_eager": ratios(first[name], first["eager"]), **row}
        for name, row in summarise(times, "eager").items()
    }


def budgets(name: str, configuration: Configuration, beside: list[float]) -> list[Budget]:
    """The budgets to measure: those with a target in some configuration, and those `beside`."""
    targets = {t.saved for t in TARGETS if (t.model, t.dtype) == (name, configuration.dtype)}
    return ["auto", "min", 1.0, *sorted({*targets, *beside} - {1.0}, reverse=True)]


def shares_of_compiled(rows: dict[str, Row]) -> list[float]:
    """The share of eager's bytes that each budget of the compiler saved, rounded down."""
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
    if configuration.rivals:
        rounds = math.ceil(arguments.rounds / PROCESSES)
    else:
        rounds = min(arguments.rounds, ROUNDS_WITHOUT_RIVALS)
    rows = load.rows(nets, rounds)
    for variant, row in facts.items():
        rows[variant] |= row
    return rows


def measure_here(
    name: str, configuration: Configuration, arguments: argparse.Namespace, have: dict[str, Row]
) -> Iterator[dict[str, Row]]:
    """The rows of --variants that we do not `have`, in parts, until --seconds are over.

    Eager takes turns with every part; the first part has eager's row too.
    """
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
    """Runs in a process of its own: a compiled variant in turns with eager, or all others."""
    if arguments.variant == TOGETHER:
        return measure(name, configuration, arguments)
    load, variant = Workload.of(name, arguments, configuration), arguments.variant
    nets = {"eager": load.model, variant: compiled(load.model, COMPILED[variant])}
    return load.rows(nets, arguments.rounds)


def in_process(name: str, configuration: Configuration, variant: str, *options: str) -> Row | None:
    """What `measure_variant` returns in a new process, or None where it fails."""
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
    whole = f"{saved:.0f} MiB saved, {peak:.0f} MiB peak, {eager['milliseconds']:.0f} ms"
    columns = ["", "saved", "forward", "peak", "time", "spread", "faults"]
    columns += ["conv FLOPs", "fuse", "pairs"]
    print_table(f"{title}, of eager's {whole}", columns, lines)


def resumed(results: Row, path: Path) -> dict[str, dict[str, dict[str, Row]]]:
    """The models in `path`, each row with its commit; an error if measured differently."""
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


def arguments_given() -> argparse.Namespace:
    parser = argument_parser(__doc__, rounds=9)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, help="names that torchvision knows, or timm:NAME")
    add("--batch", type=int, default=8)
    add("--size", type=int, default=224, help="of an image")
    names = [str(c) for c in (*ON_CPU, *ON_GPU)]
    add("--only", nargs="+", choices=names, metavar="CONFIGURATION", help="default: all")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--seconds", type=float, help="for each model, all in this process")
    names = [f"fuse {memory}" for memory in QUICK] + list(COMPILED)
    add("--variants", nargs="+", choices=names, help="with --seconds; default: all")
    add("--variant", help=argparse.SUPPRESS)
    add("--beside", nargs="*", type=float, default=[], help="more budgets")
    add("--resume", action="store_true", help="keep the rows that --output has")
    add("--check", action="store_true", help="only say whether the promises hold")
    add("--count", action="store_true", help="only say what is found in many models")
    arguments = parser.parse_args()
    arguments.configurations = [
        configuration
        for configuration in (ON_GPU if arguments.device.type == "cuda" else ON_CPU)
        if arguments.only is None or str(configuration) in arguments.only
    ]
    if not arguments.configurations:
        parser.error("--only: no such configuration on this device")
    return arguments


def missing_rows(
    name: str, configuration: Configuration, arguments: argparse.Namespace, have: dict[str, Row]
) -> Iterator[dict[str, Row]]:
    """The rows that we do not `have`, in parts: first each compiled variant, then all others."""
    measured: dict[str, Row] = {}
    for variant in COMPILED if configuration.rivals and arguments.compile else ():
        if variant not in have and (row := measure_compiled(name, configuration, variant)):
            measured[variant] = row
            yield {variant: row}
    if "eager" not in have:
        beside = shares_of_compiled({**have, **measured}) + arguments.beside
        yield measure_together(name, configuration, beside)


def main() -> None:
    arguments = arguments_given()
    if arguments.count:
        return count(arguments.batch, arguments.size)
    if arguments.check:
        sys.exit(not check(arguments))

    results: Row = {
        **begin(arguments),
        **{key: getattr(arguments, key) for key in ("batch", "size", "rounds")},
        "models": {},
    }
    commit = results["machine"].pop("commit")  # goes into each row: rows can differ in it
    output = output_path(arguments)
    if arguments.variant:
        load = (*arguments.models, *arguments.configurations)  # one of each
        return save(measure_variant(*load, arguments), output)
    if arguments.resume and output.exists():
        results["models"] = resumed(results, output)
    here = arguments.seconds is not None
    for configuration, name in itertools.product(arguments.configurations, arguments.models):
        rows = results["models"].setdefault(name, {}).setdefault(str(configuration), {})
        parts = (measure_here if here else missing_rows)(name, configuration, arguments, dict(rows))
        for part in parts:
            rows |= {variant: {**row, "commit": commit} for variant, row in part.items()}
            save(results, output)
            if here:  # time may be over before the next part
                show(f"{name}, {configuration}", rows)
        if "eager" in rows and not here:
            show(f"{name}, {configuration}", rows)
    if lines := required_rows(results["models"]):
        print_table("Required, of eager's time", REQUIRED_COLUMNS, lines)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
