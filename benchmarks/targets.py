"""How fast a step must be at how few saved bytes, and whether the measured rows reach that."""

import math
from dataclasses import dataclass

from common import Row
from rivals import COMPILED
from workloads import Configuration


@dataclass(frozen=True)
class Target:
    """The time that a step may take when it saves at most `saved`, and its peak; all are shares of
    eager's. Channels last, two threads."""

    model: str
    saved: float
    most: float
    aim: float
    dtype: str = "float32"
    peak: float = math.inf

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
    # Below what every chain's input takes.
    Target("resnet50", 0.20, 1.05, 0.95, peak=0.35),
    Target("resnet50", 0.10, 1.18, 1.05, peak=0.33),
    Target("resnet50", 0.20, 1.15, 1.05, "bfloat16", peak=0.36),
    Target("resnet18", 0.13, 1.18, 1.10, "bfloat16"),
    Target("densenet121", 0.05, 1.15, 1.00),
    Target("mobilenet_v2", 0.05, 1.15, 1.00),
    Target("efficientnet_b0", 0.05, 1.15, 1.00),
    Target("segmentation_models_pytorch:unet", 0.20, 1.20, 1.05),
]

# On a GPU, in bfloat16: the time that is allowed and the time aimed at, as shares of eager's.
REQUIRED_ON_GPU = {
    ("resnet50", "fuse 1.0"): (0.85, 0.70),
    ("resnet50", "fuse 0.55"): (0.95, 0.80),
    ("resnet50", "fuse min"): (1.10, 0.95),
    ("mobilenet_v2", "fuse auto"): (1.00, 0.80),
    ("efficientnet_b0", "fuse auto"): (1.00, 0.80),
    ("densenet121", "fuse auto"): (1.00, 0.80),
}
REQUIRED_COLUMNS = ["", "time, required", "aim", "reached", "torch.compile"]


def reached(target: Target, rows: dict[str, Row]) -> Row | None:
    """The fastest fused variant within the target's bytes, if possible also within its peak."""
    fused = [
        row
        for variant, row in rows.items()
        if variant.startswith("fuse") and row["of_eager"]["saved"] <= target.saved + 0.0005
    ]
    within = [row for row in fused if row["of_eager"]["peak"] <= target.peak]
    return min(within or fused, key=lambda row: row["ratio"], default=None)


def time_and_bytes(row: Row) -> str:
    of = row["of_eager"]
    return f"{row['ratio']:.3f} at {of['saved']:.2f} (peak {of['peak']:.2f})"


def compiled_within(rows: dict[str, Row], saved: float) -> str:
    """The fastest compiled variant that saves at most `saved`."""
    compiled = [row for variant, row in rows.items() if variant in COMPILED]
    within = [row for row in compiled if row["of_eager"]["saved"] <= saved + 0.0005]
    if not within:
        return "nothing as small" if compiled else "not measured"
    return time_and_bytes(min(within, key=lambda row: row["ratio"]))


def required_rows(models: dict[str, dict[str, dict[str, Row]]]) -> list[list[str]]:
    """For each target: what is required, what fuse reaches, what the compiler reaches."""
    lines = []
    for target in TARGETS:
        rows = models.get(target.model, {}).get(target.configuration, {})
        best = reached(target, rows)
        kept = best and best["ratio"] <= target.most and best["of_eager"]["peak"] <= target.peak
        missed = "" if kept else " MISSED"
        within = "" if target.peak == math.inf else f", peak ≤ {target.peak:.2f}"
        lines.append(
            [
                f"{target.model}, {target.dtype}, ≤ {target.saved:.2f} saved{within}",
                f"≤ {target.most:.2f}",
                f"{target.aim:.2f}",
                (time_and_bytes(best) if best else "not measured") + missed,
                compiled_within(rows, target.saved),
            ]
        )
    return lines


def required_rows_on_gpu(results: Row) -> list[list[str]]:
    """The same on a GPU, where a variant has a target.

    torch.compile is compared at the bytes that the variant saves.
    """
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


def faster_compiled(rows: dict[str, Row]) -> list[tuple[str, str | None]]:
    """Each compiled variant that is faster than all fused variants which save no more than it.

    With the fastest of those fused variants, or None where there is none.
    """
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
