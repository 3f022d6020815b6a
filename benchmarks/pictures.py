"""Draws the pictures of the files in benchmarks/results, for tables.py."""

import json
from pathlib import Path

from common import Row
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fusedconvbn._style import CHECKPOINTS, COMPILED, EAGER, FUSED, IN_PLACE, STYLE, WIDTH

# How the variants of a picture begin, what they are called in it, and how they look.
FAMILIES = {
    "fuse": ("fuse", FUSED, "o-"),
    "compile": ("torch.compile", COMPILED, "^-"),
    "checkpoint": ("checkpoint", CHECKPOINTS, "D"),
    "In-Place ABN": ("In-Place ABN", IN_PLACE, "v"),
    "eager": ("eager", EAGER, "s"),
}
# Where a label may stand beside its point: points to the right and up, and how it is aligned.
PLACES = [
    ((7, 0), "left", "center"),
    ((0, -6), "center", "top"),
    ((0, 6), "center", "bottom"),
    ((-5, -5), "right", "top"),
    ((5, 5), "left", "bottom"),
    ((5, -5), "left", "top"),
    ((-7, 0), "right", "center"),
]


Label = tuple[int, str, tuple[float, float], str]  # its rank, text, point and colour


def plot_model(ax: Axes, variants: dict[str, Row]) -> list[Label]:
    """Draws time against saved bytes, as shares of eager's: a curve for each family. Returns the
    names of the curves and the budgets of their points, for `write_labels`."""
    labels: list[Label] = []
    for start, (name, color, style) in FAMILIES.items():
        found = {v: row for v, row in variants.items() if v.startswith(start)}
        points = sorted((row["of_eager"]["saved"], row["ratio"], v) for v, row in found.items())
        if not points:
            continue
        saved, times, _ = zip(*points, strict=True)
        ax.plot(saved, times, style, color=color)
        labels.append((0, name, (saved[-1], times[-1]), color))
        for *point, variant in points:
            if budget := variant.removeprefix(start).removeprefix(", budget").strip():
                rank = 1 if budget in ("auto", "min") else 2
                labels.append((rank, budget, tuple(point), color))
    ax.axhline(1, color=EAGER, linewidth=0.8, zorder=0)
    ax.set(xlim=(0, 1.3), xlabel="bytes saved for backward, of eager's")
    ax.margins(y=0.14)
    return labels


def write_labels(ax: Axes, labels: list[Label]) -> None:
    """Writes each label beside its point, by rank, where it covers no curve and no other label;
    leaves out a budget for which there is no such place."""
    curves = [line.get_path().transformed(line.get_transform()) for line in ax.get_lines()]
    points = [ax.transData.transform(label[2]) for label in labels]
    taken: list[Bbox] = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for rank, text, point, color in sorted(labels, key=lambda label: label[0]):
        for offset, horizontal, vertical in PLACES:
            written = ax.annotate(
                text,
                point,
                offset,
                textcoords="offset points",
                color=color,
                ha=horizontal,
                va=vertical,
                fontsize=9,
                weight="bold" if rank == 0 else "normal",
            )
            box = written.get_window_extent()
            if not (
                any(box.overlaps(other) for other in taken)
                or any(curve.intersects_bbox(box, filled=False) for curve in curves)
                or box.x0 < ax.bbox.x0
            ):
                taken.append(box)
                break
            written.remove()


def plot_models(results: Path, configuration: str, alone: str) -> None:
    """A picture of all models, and one of the model `alone`."""
    found = json.loads(results.read_text("utf-8"))
    title = f"{found['machine']['device']}, batch {found['batch']} at {found['size']}², "
    title += configuration
    models = {
        name: model[configuration]
        for name, model in found["models"].items()
        if configuration in model
    }
    single = {name: variants for name, variants in models.items() if name == alone}
    draw_models(models, title, results.with_suffix(".png"))
    draw_models(single, title, results.with_name(f"{results.stem}-{alone}.png"))


def draw_models(models: dict[str, dict[str, Row]], title: str, path: Path) -> None:
    if not models:
        return
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + (4 if columns > 1 else 5) * rows))
        axes = figure.subplots(rows, columns, squeeze=False)
        labels = {}
        for ax, (name, variants) in zip(axes.flat, models.items(), strict=False):
            labels[ax] = plot_model(ax, variants)
            ax.set_title(name.split(":")[-1])
        for ax in axes.flat[len(models) :]:
            ax.remove()
        for row in axes:
            row[0].set_ylabel("time of a step, of eager's")
        figure.suptitle(title)
        figure.draw_without_rendering()  # lays out the axes, which labels do not move
        figure.set_layout_engine("none")
        for ax, of_ax in labels.items():
            write_labels(ax, of_ax)
        figure.savefig(path)


def plot_growth(results: Path) -> None:
    """Time and peak memory of a step against batch, size and depth."""
    curves = json.loads(results.read_text("utf-8"))["curves"]
    quantities = {"time of a step, ms": ("milliseconds", 1), "peak memory, MiB": ("peak", 2**20)}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6))
        axes = figure.subplots(2, len(curves), sharex="col")
        for column, (curve, points) in zip(axes.T, curves.items(), strict=True):
            values = [int(v) for v in points]
            for ax, (key, unit) in zip(column, quantities.values(), strict=True):
                for variant, color, side in (("eager", EAGER, "bottom"), ("fused", FUSED, "top")):
                    heights = [p[variant][key] / unit for p in points.values()]
                    ax.plot(values, heights, "o-", color=color)
                    ax.annotate(
                        variant,
                        (values[-2], heights[-2]),
                        (-4, 4) if side == "bottom" else (4, -4),
                        textcoords="offset points",
                        ha="right" if side == "bottom" else "left",
                        va=side,
                        color=color,
                        weight="bold",
                    )
                ax.set_ylim(bottom=0)
                ax.grid(alpha=0.3)
            column[-1].set_xlabel({"size": "height and width of an image"}.get(curve, curve))
        for ax, title in zip(axes[:, 0], quantities, strict=True):
            ax.set_ylabel(title)
        figure.savefig(results.with_suffix(".png"))
