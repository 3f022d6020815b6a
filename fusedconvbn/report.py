"""What fusing a model does, layer by layer, and what other budgets would give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .fusion import Findings, convolution_flops, fused_with_findings
from .links import Chain
from .memory import MIB
from .planning import OutOfReach, best


@dataclass
class MapReport:
    """An inner map: the module whose result it is, its bytes, whether it is kept, and, if it is not, the floating point
    operations that remaking it adds to a step."""

    path: str
    nbytes: int
    kept: bool
    added_flops: int


@dataclass
class ChainReport:
    """A chain: its modules, the bytes that they save for backward unfused and that the chain saves."""

    name: str
    before: int
    after: int
    maps: list[MapReport]


@dataclass
class Report:
    """The result of :func:`explain`; ``print`` shows it as a table.

    Attributes:
        chains: each chain, in order.
        refused: path of a module in no chain, and why.
        untraceable: path of a module that runs its own ``forward``, and why; what is inside it may be fused.
        pairs: batch norms that stand right behind a convolution.
        fused_pairs: those of them that are in a chain.
        eager: bytes that the model saves for backward as it is.
        saved: bytes that the fused model saves.
        least: the least that a plan can reach.
        step_flops: floating point operations of the convolutions in a training step as it is.
        added_flops: those that remaking adds.
        front: (bytes saved, added FLOPs, added seconds as the planner estimates them) of the plans for budgets from least to
            most.
        out_of_reach: why the plan is that of ``"min"``, where the budget that was asked for cannot be reached.
    """

    model: str
    chains: list[ChainReport]
    refused: dict[str, str]
    untraceable: dict[str, str]
    pairs: int
    fused_pairs: int
    eager: int
    saved: int
    least: int
    step_flops: int
    added_flops: int
    front: list[tuple[int, int, float]]
    out_of_reach: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, as for JSON."""
        chains = [
            {**vars(chain), "maps": [dict(vars(m)) for m in chain.maps]} for chain in self.chains
        ]
        front = [
            {"saved": saved, "added_flops": flops, "added_seconds": seconds}
            for saved, flops, seconds in self.front
        ]
        return {**vars(self), "chains": chains, "front": front}

    def __str__(self) -> str:
        width = max([len(c.name) for c in self.chains] + [len("elsewhere")])
        width = min(width, 78)
        lines = [f"{'chain':{width}}  {'before':>9} {'after':>9}  (MiB saved for backward)"]

        def row(name: str, before: int, after: int) -> str:
            name = name if len(name) <= width else name[: width - 1] + "…"
            return f"{name:{width}}  {before / MIB:9.2f} {after / MIB:9.2f}"

        for chain in self.chains:
            lines.append(row(chain.name, chain.before, chain.after))
            for m in chain.maps:
                state = "kept" if m.kept else "remade"
                flops = f", {m.added_flops / 1e9:.2f} GFLOP" if m.added_flops else ""
                lines.append(f"    {m.path}: {m.nbytes / MIB:.2f} MiB {state}{flops}")
        before = self.eager - sum(c.before for c in self.chains)
        after = self.saved - sum(c.after for c in self.chains)
        lines.append(row("elsewhere", before, after))
        lines.append(row("total", self.eager, self.saved))
        lines.append(
            f"{self.model}: {self.saved / max(self.eager, 1):.3f} of eager's {self.eager / MIB:.1f} MiB, at least "
            f"{self.least / max(self.eager, 1):.3f}; {100 * self.added_share:.1f} % more convolution FLOPs in a step; "
            f"{self.fused_pairs} of {self.pairs} pairs of convolution and batch norm fused"
        )
        if self.out_of_reach:
            lines.append(f"the plan is that of memory='min': {self.out_of_reach}")
        for path, reason in self.refused.items():
            lines.append(f"not fused: {path}: {reason}")
        for path, reason in self.untraceable.items():
            lines.append(f"not traced: {path or self.model}: {reason}")
        return "\n".join(lines)

    @property
    def added_share(self) -> float:
        """The added FLOPs as a fraction of those of the convolutions in a step."""
        return self.added_flops / max(self.step_flops, 1)

    def plot(self, path: str | Path) -> None:
        """Draws the bytes of each chain before and after, and what other budgets would cost.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (bars, front) = pyplot.subplots(
            1, 2, figsize=(13, max(4, 0.22 * len(self.chains))), layout="constrained"
        )
        names = [c.name if len(c.name) <= 48 else c.name[:47] + "…" for c in self.chains]
        places = range(len(names))
        bars.barh([p - 0.2 for p in places], [c.before / MIB for c in self.chains], 0.4)
        bars.barh([p + 0.2 for p in places], [c.after / MIB for c in self.chains], 0.4)
        bars.set_yticks(places, names, fontsize=6)
        bars.invert_yaxis()
        bars.set_xlabel("MiB saved for backward")
        bars.legend(["eager", "fused"])
        bars.set_title(f"{self.model}: {self.eager / MIB:.0f} → {self.saved / MIB:.0f} MiB")

        shares = [saved / max(self.eager, 1) for saved, _, _ in self.front]
        front.plot(shares, [100 * f / max(self.step_flops, 1) for _, f, _ in self.front], ".-")
        front.plot([self.saved / max(self.eager, 1)], [100 * self.added_share], "o")
        front.set_xlabel("bytes saved for backward, of eager's")
        front.set_ylabel("added convolution FLOPs of a step, %")
        front.set_title("plans for other budgets")
        front.legend(["fastest plan within", "this plan"])
        front.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def explain(
    model: nn.Module,
    example_inputs: Any,
    *,
    memory: float | int | str = "auto",
    calibrate: bool = False,
) -> Report:
    """What :func:`fusedconvbn.fuse` does to a model, and why it leaves alone what it leaves alone.

    Args:
        model: not changed. A model that is fused already is fused anew with ``memory``.
        example_inputs, memory, calibrate: as for :func:`fusedconvbn.fuse`; ``example_inputs`` must be there. Where a
            budget is out of reach the report is that of ``"min"`` and says so.

    Returns:
        Report: can be printed, drawn with ``plot(path)``, and turned into a dict with ``to_dict()``.

    Raises:
        ValueError, TypeError: as for :func:`fusedconvbn.fuse`.
    """
    if example_inputs is None:
        raise ValueError("explain: expected example_inputs, got None")
    reason = ""
    try:
        fused, found = fused_with_findings(model, example_inputs, memory, False, calibrate)
    except OutOfReach as error:
        reason = str(error)
        fused, found = fused_with_findings(model, example_inputs, "min", False, calibrate)
    report = _report(fused, found)
    report.out_of_reach = reason
    return report


def _report(model: nn.Module, found: Findings) -> Report:
    maps = {m.path: m for m in found.maps}
    eager, least = found.eager, found.least
    chains: list[ChainReport] = []
    unclaimed = dict(eager.by_module)  # an activation may be called in several chains
    for owner, chain in found.chains:
        inner = [maps[_below(owner, path)] for path in chain.maps()]
        kept = sum(m.nbytes for m in inner if m.path in found.kept)
        name = _below(owner, (chain.name,))
        chains.append(
            ChainReport(
                _title(owner, chain),
                sum(unclaimed.pop(_below(owner, (m,)), 0) for m in chain.modules),
                least.by_module.get(name, 0) + kept,
                [
                    MapReport(
                        m.path,
                        m.nbytes,
                        m.path in found.kept,
                        0 if m.path in found.kept else m.flops,
                    )
                    for m in inner
                ],
            )
        )
    in_chains = {_below(owner, link.path) for owner, chain in found.chains for link in chain.links}
    return Report(
        type(model).__name__,
        chains,
        found.refused,
        found.untraceable,
        len(found.pairs),
        sum(in_chains.issuperset(pair) for pair in found.pairs),
        eager.saved,
        least.saved + sum(maps[path].nbytes for path in found.kept),
        least.saved,
        convolution_flops(found, dict(model.named_modules())),
        sum(m.flops for m in found.maps if m.path not in found.kept),
        _front(found),
    )


def _front(found: Findings, points: int = 32) -> list[tuple[int, int, float]]:
    total = sum(m.nbytes for m in found.maps)
    front = []
    for i in range(points + 1):
        kept = best(found.maps, total * i // points)
        remade = [m for m in found.maps if m.path not in kept]
        saved = found.least.saved + total - sum(m.nbytes for m in remade)
        front.append((saved, sum(m.flops for m in remade), sum(m.seconds for m in remade)))
    return front


def _below(owner: str, path: tuple[str, ...]) -> str:
    return ".".join(filter(None, (owner, *path)))


def _title(owner: str, chain: Chain) -> str:
    """The modules of a chain, without what their paths begin with alike."""
    paths = [_below(owner, link.path) for link in chain.links]
    common = paths[0].rsplit(".", 1)[0] + "." if "." in paths[0] else ""
    while common and not all(p.startswith(common) for p in paths):
        common = common[:-1].rsplit(".", 1)[0] + "." if "." in common[:-1] else ""
    names = " → ".join(p[len(common) :] for p in paths)
    return f"{common[:-1]}: {names}" if common else names
