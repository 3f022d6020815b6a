"""The table and the picture of examples/train_folder.py, from the checkpoints of its runs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from mnist import MIB

from fusedconvbn._style import EAGER, FUSED, STYLE, WIDTH

Checkpoint = dict[str, Any]
CURVES = {
    "loss": "training loss (nats)",
    "validation loss": "validation loss (nats)",
    "accuracy": "validation accuracy",
}


def finished(folder: Path, settings: dict[str, str]) -> dict[str, Checkpoint]:
    """The checkpoints of a folder that were written with these settings, by kind of run."""
    paths = {kind: folder / f"{kind}.pt" for kind in ("unfused", "fused")}
    found = {
        kind: torch.load(path, map_location="cpu", mmap=True)
        for kind, path in paths.items()
        if path.exists()
    }
    return {kind: run for kind, run in found.items() if run["settings"] == settings}


def costs(run: Checkpoint) -> dict[str, float]:
    return {
        "saved for backward (MiB)": run["memory"]["saved"] / MIB,
        "peak of a step (MiB)": run["memory"]["peak"] / MIB,
        "images per second": statistics.median(e["images per second"] for e in run["history"]),
    }


def table(runs: dict[str, Checkpoint]) -> str:
    rows = {
        kind: {name: run["history"][-1][key] for key, name in CURVES.items()} | costs(run)
        for kind, run in runs.items()
    }
    lines = [f"{'':26}" + "".join(f"{kind:>10}" for kind in rows)]
    for name in next(iter(rows.values())):
        lines.append(f"{name:26}" + "".join(f"{row[name]:10.4g}" for row in rows.values()))
    return "\n".join(lines)


def plot(runs: dict[str, Checkpoint], title: str, path: Path) -> None:
    """Draws losses and accuracy of each epoch, and below them what the runs cost."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # The curves of two runs lie over each other.
    looks = {"unfused": (EAGER, 7, 0.4), "fused": (FUSED, 1.6, 1)}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6))
        curves, bars = figure.subplots(2, 3)
        figure.suptitle(title)
        for place, (kind, run) in enumerate(runs.items()):
            color, width, alpha = looks[kind]
            for ax, (key, name) in zip(curves, CURVES.items(), strict=True):
                values = [epoch[key] for epoch in run["history"]]
                epochs = range(1, len(values) + 1)
                ax.plot(epochs, values, "o-", color=color, linewidth=width, alpha=alpha)
                ax.set(title=name, xlabel="epoch")
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            label = {"color": color, "weight": "bold"}
            at = (0.97, 0.9 - 0.1 * place)
            curves[0].annotate(kind, at, xycoords="axes fraction", ha="right", **label)
            for ax, (name, value) in zip(bars, costs(run).items(), strict=True):
                bar = ax.bar(place, value, 0.7, color=color, alpha=min(alpha + 0.05, 1))
                ax.bar_label(bar, [f"{kind}\n{value:.0f}"], padding=3, **label)
                ax.set(title=name, xticks=[], xlim=(-0.6, len(runs) - 0.4))
                ax.margins(y=0.2)
        figure.savefig(path)
