"""The picture of a report."""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._style import EAGER, FUSED, STYLE, WIDTH
from ..memory import MIB

if TYPE_CHECKING:
    from .report import Report

_MOST_ROWS = 20
_LONGEST = 56  # letters of a name, which leave half of the width to the bars


def draw(report: Report, path: str | Path) -> None:
    """Draws what each budget costs, and below it the bytes of the chains that save most."""
    # Without pyplot, which would change the backend of the process.
    import matplotlib
    from matplotlib.figure import Figure

    rows = _rows(report)
    heights = [4.0, 1.2 + 0.25 * len(rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)))
        costs, chains = (part.subplots() for part in figure.subfigures(2, height_ratios=heights))
        figure.suptitle(
            f"{report.model}: {report.eager / MIB:.2f} → {report.saved / MIB:.2f} MiB "
            "saved for backward",
            weight="bold",
        )
        _draw_costs(costs, report)
        _draw_rows(chains, rows)
        figure.savefig(path)


def _draw_costs(ax: Any, report: Report) -> None:
    eager = max(report.eager, 1)
    ax.plot(
        [p.saved / eager for p in report.front],
        [1e3 * p.added_seconds for p in report.front],
        ".-",
        color=EAGER,
    )
    here = report.saved / eager, 1e3 * report.added_seconds
    ax.plot(*here, "o", color=FUSED, markersize=10, clip_on=False)
    ax.annotate(
        f"this plan: {here[0]:.2f}, {here[1]:.2f} ms",
        here,
        (9 if here[0] < 0.7 else -9, 9),
        textcoords="offset points",
        ha="left" if here[0] < 0.7 else "right",
        color=FUSED,
        weight="bold",
    )
    least = report.least / eager
    ax.axvline(least, color=EAGER, linewidth=0.8, linestyle=":", zorder=0)
    ax.annotate(
        ' memory="min"; to the left, parts of the model run again ',
        (least, 1),
        xycoords=("data", "axes fraction"),
        ha="left" if least < 0.5 else "right",
        va="top",
        color=EAGER,
    )
    ax.set(
        title="The fastest plan for each budget",
        xlabel="bytes saved for backward, of eager's",
        ylabel="ms that recomputing adds,\nas estimated",
        xlim=(0, 1),
    )
    ax.set_ylim(0, 1.2 * max(1e3 * p.added_seconds for p in report.front) or 1)
    ax.grid(alpha=0.3)


def _draw_rows(ax: Any, rows: list[tuple[str, int, int]]) -> None:
    """A bar of eager's bytes with one of the fused model's inside, and both as numbers."""
    places = range(len(rows))
    ax.barh(places, [before / MIB for _, before, _ in rows], 0.72, color=EAGER, alpha=0.45)
    ax.barh(places, [after / MIB for *_, after in rows], 0.36, color=FUSED)
    for column, color, values in (
        (0.9, EAGER, ["eager", *(f"{before / MIB:.2f}" for _, before, _ in rows)]),
        (0.99, FUSED, ["fused", *(f"{after / MIB:.2f}" for *_, after in rows)]),
    ):
        for place, value in enumerate(values, -1):
            ax.annotate(
                value,
                (column, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                color=color,
                weight="bold" if place < 0 else "normal",
            )
    ax.set_yticks(places, [name for name, *_ in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.4, -1.4)
    ax.set_xlim(right=1.25 * max(max(row[1:]) for row in rows) / MIB)  # the numbers stand there
    ax.set(title="Where they are", xlabel="MiB saved for backward")
    ax.tick_params(axis="y", length=0)


def _rows(report: Report) -> list[tuple[str, int, int]]:
    """Names with the bytes before and after: of the chains that save most, of all smaller ones
    together, and of the rest of the model."""
    chains = sorted(report.chains, key=lambda c: -c.before)
    few = len(chains) if len(chains) <= _MOST_ROWS else _MOST_ROWS - 1
    names = _short([c.name for c in chains[:few]])
    rows = [(name, c.before, c.after) for name, c in zip(names, chains, strict=False)]
    if smaller := chains[few:]:
        sums = sum(c.before for c in smaller), sum(c.after for c in smaller)
        rows.append((f"{len(smaller)} smaller chains", *sums))
    before, after = (sum(getattr(c, key) for c in chains) for key in ("before", "after"))
    return [*rows, ("outside of chains", report.eager - before, report.saved - after)]


def _short(names: list[str]) -> list[str]:
    """The names without the modules in front that all have in common; of a long chain the first and
    the last calls alone."""
    parts = [name.split(": ")[0].split(".") if ": " in name else [""] for name in names]
    common = ".".join(commonprefix(parts)) if len(names) > 1 else ""
    return [_with_ends(name.removeprefix(common).lstrip(".: ")) for name in names]


def _with_ends(name: str) -> str:
    calls = name.split(" → ")
    if len(name) <= _LONGEST or len(calls) < 4:
        return name
    return f"{calls[0]} → {calls[1]} … {calls[-1]} ({len(calls)} calls)"
