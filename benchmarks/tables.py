"""Writes the tables of README.md and docs, and the plots, from the files in benchmarks/results.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. --check writes nothing, and fails
where a page differs from the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import compilers
from common import RESULTS, ROOT, Row
from growth import MOST
from kernels import AIM, LARGE, REQUIRED, slowest
from rivals import COMPILED
from targets import REQUIRED_COLUMNS, faster_compiled, required_rows, required_rows_on_gpu
from workloads import ON_CPU

PAGES = (ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NETWORK = "resnet50"
FULL = "float32, channels last, 2 threads"
# The order of the rows; variants that are not here come after "fuse 1.0".
SHOWN = ["fuse auto", "fuse min", "fuse 1.0", "checkpoint", "Python reference", *COMPILED]
SHOWN += ["In-Place ABN", "floor: convolutions alone"]
WITH_RIVALS = {str(configuration) for configuration in ON_CPU if configuration.rivals}
NOT_MEASURED = "Not measured.\n"
STAGES = ("smoke", "memcheck", "racecheck")  # of tests/gpu/run.sh: they pass or fail


def load(name: str) -> Row:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in (columns, rule, *rows))
    return lines.replace("1 threads", "1 thread")


def label(variant: str) -> str:
    name, _, memory = variant.partition(" ")
    if name != "fuse":
        return variant
    return f'`fuse`, `memory="{memory}"`' if memory in ("auto", "min") else f"`fuse`, {memory}"


def network_table() -> str:
    """The experiment's network and its rivals, as ratios to the unfused network."""
    results = load("conv_bn-cpu")
    shown = {
        "fused": "**fused**",
        "checkpoint": "`torch.utils.checkpoint` per block",
        "tutorial, Python reference": "the tutorial, in Python",
    }
    rows = [
        [
            f"{title}, {format.replace('_', ' ')}",
            *(f"{nets[net][key] / nets['unfused'][key]:.2f}" for key in ("saved", "peak")),
            *(f"{results['network'][n][format][net]['ratio']:.2f}" for n in results["network"]),
        ]
        for format, nets in results["memory"].items()
        for net, title in shown.items()
    ]
    return markdown(
        ["", "saved for backward", "peak", *(f"time, {n}" for n in results["network"])], rows
    )


def experiment_table() -> str:
    """The experiment of examples/mnist.py, which `make demo` runs."""
    found = load("experiment-cpu")
    machine, difference = found["machine"], found["difference of the losses"]
    facts = f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, commit "
    facts += f"{machine['commit']}; {found['title']}. The losses of the first ten steps differ by "
    facts += f"at most {difference:.1e}, relative.\n\n"
    rows = [
        [name, form.format(a), form.format(b), f"{b / a:.2f}"]
        for name, form, a, b in found["figures"]
    ]
    return facts + markdown(["", "unfused", "fused", "ratio"], rows)


def layers_table() -> str:
    """Layers with ReLU, as ratios to the unfused layers."""
    layers = load("conv_bn-cpu")["layers"]
    variants = ("fused", "checkpoint")
    names = [name for name in next(iter(layers.values())) if name.endswith("²")]
    rows = [
        [name, *(f"{layers[n][name][v]['ratio']:.2f}" for v in variants for n in layers)]
        for name in names
    ]
    return markdown(["", *(f"{v}, {n}" for v in variants for n in layers)], rows)


def avx2_table() -> str:
    """Layers with SiLU and with a residual, in two types."""
    layers = load("layers-cpu-avx2")["layers"]["2 threads"]
    ends = [f"{tail}{dtype}" for dtype in ("", ", bfloat16") for tail in ("SiLU", "add, ReLU")]
    names = [name.removesuffix(", SiLU") for name in layers if name.endswith(", SiLU")]
    rows = [[n, *(f"{layers[f'{n}, {end}']['fused']['ratio']:.2f}" for end in ends)] for n in names]
    return markdown(["", *ends], rows)


def model_rows(model: str, variants: dict[str, Row]) -> list[list[str]]:
    """All variants of a model, and below them eager's own figures."""
    rows = []
    for variant in sorted(variants, key=lambda v: SHOWN.index(v) if v in SHOWN else 2.5):
        if variant != "eager":
            row, bold = variants[variant], "**" if variant.startswith("fuse") else ""
            rows.append(
                [
                    f"{model}, {label(variant)}",
                    *(f"{bold}{row['of_eager'][key]:.2f}{bold}" for key in ("saved", "peak")),
                    f"{bold}{row['ratio']:.2f}{bold}",
                    f"{row['spread']:.0%}",
                ]
            )
    eager = variants["eager"]
    memory = [f"{eager[key] / 2**20:.0f} MiB" for key in ("saved", "peak")]
    time = [f"{eager['milliseconds']:.0f} ms", f"{eager['spread']:.0%}"]
    return [*rows, [f"{model}, eager", *memory, *time]]


MODEL_COLUMNS = ["", "saved for backward", "peak", "time", "spread"]


def models_table() -> str:
    """Each model with all rivals."""
    models = load("models-cpu")["models"]
    rows = [
        r
        for model, found in models.items()
        if FULL in found
        for r in model_rows(model, found[FULL])
    ]
    return markdown(MODEL_COLUMNS, rows)


def gpu_models() -> list[Path]:
    return sorted(RESULTS.glob("gpu-models*.json"))


def gpu_models_table() -> str:
    """The same on a GPU: for each batch, with and without cuDNN's benchmark mode."""
    rows = []
    for path in gpu_models():
        results = load(path.stem)
        tuned = ", cuDNN benchmark" if results["cudnn_benchmark"] else ""
        for model, configurations in results["models"].items():
            for configuration, variants in configurations.items():
                title = f"{model}, {configuration}, batch {results['batch']}{tuned}"
                rows += model_rows(title, variants)
    return markdown(MODEL_COLUMNS, rows) if rows else NOT_MEASURED


def gpu_table() -> str:
    """What tests/gpu/run.sh found: the GPU, what passed, speeds beside their targets; a picture."""
    summary, kernels = load("gpu-summary"), load("gpu-kernels")
    machine = summary.get("machine")
    if not machine:  # the setup stage failed
        return NOT_MEASURED
    measured = {
        r["commit"]
        for p in gpu_models()
        for m in load(p.stem)["models"].values()
        for rows in m.values()
        for r in rows.values()
        if "commit" in r
    }
    commits = ", ".join(sorted({machine["commit"], *measured}))
    facts = f"{machine['device']}, torch {machine['torch']}, commits {commits}"
    rates = f"copy {machine['copy GB/s']} GB/s, bf16 product {machine['bf16 TFLOP/s']} TFLOP/s"
    ended = {s["stage"]: s for s in summary["stages"]}
    rows = [
        [f"{name}: {ended[name]['said']}", "passed", "", ended[name]["status"], ""]
        for name in STAGES
        if name in ended
    ]
    if tests := load("gpu-tests"):
        counts = f"{len(tests['failed'])} failed, {len(tests['not reached'])} not reached"
        rows.append(["tests", "passed", "", f"{tests['passed']} passed, {counts}", ""])
    large = [r for r in kernels.get("maps", {}).values() if r["copy"]["bytes"] >= 2 * LARGE]
    if large:
        kernel, row = min((slowest(r) for r in large), key=lambda item: item[1]["of_copy"])
        missed = "" if row["of_copy"] >= REQUIRED else " MISSED"
        reached = f"{kernel}, {row['of_copy']:.2f}{missed}"
        what = f"bandwidth of the slowest kernel, maps ≥ {LARGE >> 20} MiB, of a copy's"
        rows.append([what, f"≥ {REQUIRED}", f"{AIM:.2f}", reached, ""])
    for path in gpu_models():
        rows += required_rows_on_gpu(load(path.stem))
    table = f"{facts}; {rates}.\n\n{markdown(REQUIRED_COLUMNS, rows)}"
    names = [f"{path.stem}-{NETWORK}" for path in gpu_models()]
    pictures = [f"![{name}](../benchmarks/results/{name}.png)\n" for name in names]
    return "\n".join([table, *pictures[:1]])


def rescue_table() -> str:
    """What `rescue` costs where memory suffices, and what it does where it does not."""
    found = load("gpu-rescue")
    machine, limited = found["machine"], found["limited"]
    facts = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}: resnet50, "
    facts += f"bfloat16, channels last, Adam, {found['size']}×{found['size']}.\n\n"
    rows = [
        [f"a step with `rescue`, {batch}", f"{row['rescue']['ratio']:.3f} of that without"]
        for batch, row in found["cost"].items()
    ]
    where = f"batch {limited['batch']} in {limited['GiB']:.0f} GiB"
    rows += [
        [f"{where}: eager", limited["eager"]],
        [f"{where}: `fuse`, 1.0, with `rescue`", f"{limited['plans']} other plans"],
        ["the last of them saves, of eager's bytes", f"{limited['saved']:.2f}"],
        ["its first step, with the search", f"{limited['first step']:.1f} s"],
        ["each step from then on", f"{1e3 * limited['step']:.0f} ms"],
    ]
    return facts + markdown(["", ""], rows)


def kernels_table(name: str = "kernels-cpu") -> str:
    """Each kernel's bandwidth, and its share of a copy's."""
    maps = load(name).get("maps", {})
    if not maps:
        return NOT_MEASURED
    rows = [
        [title, *(f"{row['GB/s']:.0f} ({row['of_copy']:.2f})" for row in found.values())]
        for title, found in maps.items()
    ]
    return markdown(["GB/s (of the copy)", *next(iter(maps.values()))], rows)


KERNEL = re.compile(
    r"\w+?_(?P<walk>contiguous|channels_last)"
    r"<(?P<name>\w+)<(?P<type>BFloat16|float)(?P<of>.*)>, (?P<V>[48])>"
)


def cuda_kernels_table() -> str:
    """The CUDA kernels for ReLU on whole vectors, compiled for an H100."""
    rows = []
    for kernel in load("cuda-kernels").get("9.0", []):
        found = KERNEL.fullmatch(kernel["name"])
        if not found or re.search("Activation|Identity", found["of"]):
            continue
        of = (
            found["of"]
            .removeprefix(", Relu")
            .replace(", false", "")
            .replace(", true", ", residual")
        )
        in_flight = kernel["in_flight"] * kernel["width"]
        rows.append(
            [
                f"{found['name']}{of}, {found['type'].lower()}, {found['walk'].replace('_', ' ')}",
                found["V"],
                str(kernel["registers"]),
                f"{kernel['in_flight']} × {kernel['width']}",
                str(in_flight),  # 1024 threads: as many KiB
            ]
        )
    return markdown(["", "values of a vector", "registers", "loads × bytes", "KiB"], rows)


def peaks_table(name: str = "peaks-cpu") -> str:
    """How much of its promised peak each step took."""
    found = load(name)
    shares = sorted({row["share"] for row in found.get("rows", [])}, reverse=True)
    lines: dict[str, dict[float, str]] = {}
    for row in found.get("rows", []):
        cell = f"{row['measured'] / row['promised']:.3f} ({row['saved']:.2f})"
        lines.setdefault(f"{row['model']}, {row['dtype']}", {})[row["share"]] = cell
    cells = [[name, *(line.get(share, "") for share in shares)] for name, line in lines.items()]
    return markdown(["", *map(str, shares)], cells) if cells else NOT_MEASURED


def rival_table(rival: str) -> str:
    """Each variant of a rival, and the fastest fused one that saves no more; shares of eager's."""
    columns = [
        "",
        *(f"{whose}{of}" for whose in ("", "`fuse`: ") for of in ("saved", "peak", "time")),
    ]
    rows = []
    for model, configurations in load("models-cpu")["models"].items():
        variants = configurations.get(FULL, {})
        for variant in (v for v in variants if v.startswith(rival)):
            theirs = variants[variant]
            within = theirs["of_eager"]["saved"] + 0.0005
            ours = [r for v, r in variants.items() if v.startswith("fuse")]
            ours = [r for r in ours if r["of_eager"]["saved"] <= within]
            pair = [theirs, *sorted(ours, key=lambda r: r["ratio"])[:1]]
            cells = [
                f"{value:.2f}"
                for r in pair
                for value in (r["of_eager"]["saved"], r["of_eager"]["peak"], r["ratio"])
            ]
            rows.append([f"{model}, {variant}", *cells, *["—"] * (6 - len(cells))])
    return markdown(columns, rows)


def summary_table(name: str, configuration: str) -> str:
    """Each model at two budgets, as ratios to eager; and what was measured where."""
    results, rows = load(name), []
    if not results:
        return NOT_MEASURED
    commits = set()
    for model, configurations in results["models"].items():
        found = configurations.get(configuration, {})
        ours = [found[v] for v in ("fuse auto", "fuse min") if v in found]
        if len(ours) == 2:
            cells = [(*map(row["of_eager"].get, ("saved", "peak")), row["ratio"]) for row in ours]
            rows.append([model.split(":")[-1], *(f"{n:.2f}" for three in cells for n in three)])
            commits |= {row["commit"] for row in ours}
    machine, size = results["machine"], results["size"]
    facts = f"{machine['device']}, torch {machine['torch']}, {configuration}, batch "
    facts += f"{results['batch']} at {size}×{size}, commits {', '.join(sorted(commits))}.\n\n"
    columns = [
        f"{budget}: {what}" for budget in ("auto", "min") for what in ("saved", "peak", "time")
    ]
    return facts + markdown(["of eager's", *columns], rows)


def targets_table() -> str:
    return markdown(REQUIRED_COLUMNS, required_rows(load("models-cpu")["models"]))


def behind_table() -> str:
    """Where torch.compile is faster with the same or fewer bytes; and where that is not known."""
    rows, unknown = [], []
    for model, configurations in load("models-cpu")["models"].items():
        for configuration, variants in configurations.items():
            if configuration in WITH_RIVALS and not variants.keys() >= COMPILED.keys():
                unknown.append(f"{model} ({configuration})")
            for compiled, ours in faster_compiled(variants):
                pair = [variants[compiled], variants[ours] if ours else None]
                cells = [f"{r['ratio']:.2f} at {r['of_eager']['saved']:.2f}" for r in pair if r]
                fused = f"{label(ours)}: {cells[1]}" if ours else "nothing as small"
                rows.append([f"{model}, {configuration}", f"{compiled}: {cells[0]}", fused])
    table = (
        markdown(["", "`torch.compile`", "`fuse`"], rows) if rows else "Nowhere it was measured.\n"
    )
    return table + (
        f"\nNot measured, or not with every budget: {'; '.join(unknown)}.\n" if unknown else ""
    )


def configurations_table() -> str:
    """The budgets "auto" and 1.0 in all layouts, dtypes and numbers of threads."""
    models = load("models-cpu")["models"]
    names = list(dict.fromkeys(c for model in models.values() for c in model))
    rows = []
    for name in names:
        cells = []
        for model in models.values():
            variants = model.get(name, {})
            pair = [variants.get(f"fuse {memory}") for memory in ("auto", 1.0)]
            cells.append(" / ".join(f"{row['ratio']:.2f}" for row in pair if row) or "—")
        rows.append([name, *cells])
    return markdown(['time, `"auto"` / `1.0`', *models], rows)


def overhead_table() -> str:
    rows = [
        [
            f"{name}, {variant}",
            f"{row['microseconds']:.1f}",
            f"{row['ratio']:.2f}"
            + (f" MISSED (≤ {MOST})" if variant == "conv_bn" and row["ratio"] > MOST else ""),
        ]
        for name, variants in load("growth-cpu")["overhead"].items()
        for variant, row in variants.items()
    ]
    return markdown(["one call on 1×8×8×8", "µs", "of eager"], rows)


def compilers_table() -> str:
    """`fuse` and torch.compile, apart and together."""
    return markdown(compilers.COLUMNS, compilers.table(load("compilers-cpu")))


TABLES: dict[str, Callable[[], str]] = {
    "experiment": experiment_table,
    "rescue": rescue_table,
    "cuda-kernels": cuda_kernels_table,
    "peaks-cpu": peaks_table,
    "gpu-peaks": lambda: peaks_table("gpu-peaks"),
    "network": network_table,
    "layers": layers_table,
    "layers-avx2": avx2_table,
    "gpu": gpu_table,
    "gpu-models": gpu_models_table,
    "gpu-kernels": lambda: kernels_table("gpu-kernels"),
    "kernels": kernels_table,
    "models": models_table,
    "checkpoint": lambda: rival_table("checkpoint"),
    "memory-budget": lambda: rival_table("compile, budget"),
    "summary": lambda: summary_table("models-cpu", FULL),
    "gpu-summary": lambda: summary_table("gpu-models-256", "bfloat16, channels last"),
    "targets": targets_table,
    "behind-compile": behind_table,
    "configurations": configurations_table,
    "overhead": overhead_table,
    "compilers": compilers_table,
}


def filled(page: str) -> str:
    return TABLE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    if arguments.check:
        stale = [p.name for p in PAGES if filled(p.read_text("utf-8")) != p.read_text("utf-8")]
        sys.exit(f"not what the results say: {', '.join(stale)}" if stale else 0)
    import pictures  # needs matplotlib

    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    pictures.plot_models(RESULTS / "models-cpu.json", FULL, NETWORK)
    for path in gpu_models():
        pictures.plot_models(path, "bfloat16, channels last", NETWORK)
    for path in RESULTS.glob("*growth*.json"):
        pictures.plot_growth(path)


if __name__ == "__main__":
    main()
