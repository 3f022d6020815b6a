"""Writes the tables of README.md and docs/performance.md, and the plots, from the JSON files in benchmarks/results.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. --check writes nothing, and fails where a page differs.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT
from models import TARGETS, faster_compiled, reached

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FULL = "float32, channels last, 2 threads"
SHOWN = ("fuse auto", "fuse min", "fuse 1.0", "checkpoint", "compile", "compile, budget 0.5")
SHOWN = (*SHOWN, "compile, budget 0.3", "In-Place ABN", "floor: convolutions alone")


def load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, rule, *rows))


def label(variant: str) -> str:
    name, _, memory = variant.partition(" ")
    if name != "fuse":
        return variant
    return f'`fuse`, `memory="{memory}"`' if memory in ("auto", "min") else f"`fuse`, {memory}"


def models_table() -> str:
    """Each model with all rivals."""
    rows = []
    for model, configurations in load("models-cpu")["models"].items():
        variants = configurations[FULL]
        eager = variants["eager"]
        for variant in sorted(variants, key=lambda v: SHOWN.index(v) if v in SHOWN else 2.5):
            if variant == "eager":
                continue
            row = variants[variant]
            of = row["of_eager"]
            bold = "**" if variant.startswith("fuse") else ""
            rows.append(
                [
                    f"{model}, {label(variant)}",
                    *(f"{bold}{of[key]:.2f}{bold}" for key in ("saved", "peak")),
                    f"{bold}{row['ratio']:.2f}{bold}",
                    f"{row['spread']:.0%}",
                ]
            )
        rows.append(
            [
                f"{model}, eager",
                *(f"{eager[key] / 2**20:.0f} MiB" for key in ("saved", "peak")),
                f"{eager['milliseconds']:.0f} ms",
                f"{eager['spread']:.0%}",
            ]
        )
    return markdown(["", "saved for backward", "peak", "time", "spread"], rows)


def summary_table() -> str:
    """Each model at two budgets, in bytes and milliseconds."""
    rows = []
    for model, configurations in load("models-cpu")["models"].items():
        variants = configurations[FULL]
        eager = variants["eager"]
        for variant in ("fuse auto", "fuse min"):
            row = variants[variant]
            cells = [
                f"{eager[key] / 2**20:.0f} → {row[key] / 2**20:.0f} MiB ({row['of_eager'][key]:.2f})"
                for key in ("saved", "peak")
            ]
            ratio = row["ratio"]
            before = f"{eager['milliseconds']:.0f} → {row['milliseconds']:.0f} ms"
            rows.append([f"{model}, {label(variant)}", *cells, f"{before} ({ratio:.2f})"])
    return markdown(["", "saved for backward", "peak", "time"], rows)


def targets_table() -> str:
    """What was to be reached, what was, and torch.compile at most at that memory."""
    models = load("models-cpu")["models"]
    rows = []
    for t in TARGETS:
        variants = models.get(t.model, {}).get(t.configuration)
        if not variants:
            continue
        found = reached(t, variants)
        compiled = [
            f"{row['ratio']:.2f} at {row['of_eager']['saved']:.2f} (peak {row['of_eager']['peak']:.2f})"
            for variant, row in variants.items()
            if variant.startswith("compile")
        ]
        ours, missed = "out of reach", True
        if found:
            row = found[1]
            missed = row["ratio"] > t.most
            ours = f"{row['ratio']:.2f} at {row['of_eager']['saved']:.2f} (peak {row['of_eager']['peak']:.2f})"
        rows.append(
            [
                f"{t.model}, {t.dtype}, ≤ {t.saved:.2f} saved",
                f"≤ {t.most:.2f}",
                f"{t.aim:.2f}",
                f"**{ours}**" + (" MISSED" if missed else ""),
                "; ".join(compiled) or "not measured",
            ]
        )
    return markdown(["", "time, required", "aim", "reached", "`torch.compile`"], rows)


def behind_table() -> str:
    """Where torch.compile is faster at the same or smaller memory."""
    rows = []
    for model, configurations in load("models-cpu")["models"].items():
        for configuration, variants in configurations.items():
            for compiled, ours in faster_compiled(variants):
                theirs = variants[compiled]
                best = variants.get(ours)
                rows.append(
                    [
                        f"{model}, {configuration}",
                        f"{compiled}: {theirs['ratio']:.2f} at {theirs['of_eager']['saved']:.2f}",
                        f"{ours}: {best['ratio']:.2f} at {best['of_eager']['saved']:.2f}"
                        if best
                        else "nothing as small",
                    ]
                )
    return markdown(["", "`torch.compile`", "`fuse`"], rows) if rows else "Nowhere.\n"


def configurations_table() -> str:
    """auto and everything kept in the other layouts, dtypes and numbers of threads."""
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
    return markdown(["time, auto / all kept", *models], rows)


def overhead_table() -> str:
    rows = [
        [f"{name}, {variant}", f"{row['microseconds']:.1f}", f"{row['ratio']:.2f}"]
        for name, variants in load("growth-cpu")["overhead"].items()
        for variant, row in variants.items()
    ]
    return markdown(["one call on 1×8×8×8", "µs", "of eager"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "models": models_table,
    "summary": summary_table,
    "targets": targets_table,
    "behind-compile": behind_table,
    "configurations": configurations_table,
    "overhead": overhead_table,
}


def filled(page: str) -> str:
    return TABLE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], page)


def plot_models(path: Path) -> None:
    """Time against saved bytes of each variant, both of eager's."""
    from matplotlib import pyplot

    models = load("models-cpu")["models"]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(1 + 3.6 * len(models), 4.4), squeeze=False, layout="constrained"
    )
    variants = list(dict.fromkeys(v for m in models.values() for v in m[FULL]))
    handles = {}
    for ax, (name, model) in zip(axes[0], models.items(), strict=True):
        for variant, row in model[FULL].items():
            marker = {"fuse": "o", "eager": "s", "floor:": "_"}.get(variant.split()[0], "^")
            handles[variant] = ax.scatter(
                row["of_eager"]["saved"],
                row["ratio"],
                color=f"C{variants.index(variant)}",
                marker=marker,
                zorder=2,
            )
        ax.axhline(1, color="0.7", zorder=1)
        ax.set_title(name)
        ax.set_xlabel("bytes saved for backward, of eager's")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of a step, of eager's")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 * len(models))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_growth(path: Path) -> None:
    from matplotlib import pyplot

    curves = load("growth-cpu")["curves"]
    figure, axes = pyplot.subplots(2, len(curves), figsize=(11, 5.6), layout="constrained")
    for column, (curve, points) in enumerate(curves.items()):
        values = [int(v) for v in points]
        what = {
            "time of a step, ms": ("milliseconds", 1),
            "peak memory, MiB": ("peak", 2**20),
        }
        for row, (title, (key, unit)) in enumerate(what.items()):
            ax = axes[row][column]
            for variant in ("eager", "fused"):
                ax.plot(
                    values, [p[variant][key] / unit for p in points.values()], "o-", label=variant
                )
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            if column == 0:
                ax.set_ylabel(title)
            if row == 1:
                ax.set_xlabel({"size": "height and width of an image"}.get(curve, curve))
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    if arguments.check:
        stale = [p.name for p in PAGES if filled(p.read_text("utf-8")) != p.read_text("utf-8")]
        sys.exit(f"not what the results say: {', '.join(stale)}" if stale else 0)
    import matplotlib

    matplotlib.use("Agg")
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    plot_models(RESULTS / "models-cpu.png")
    plot_growth(RESULTS / "growth-cpu.png")


if __name__ == "__main__":
    main()
