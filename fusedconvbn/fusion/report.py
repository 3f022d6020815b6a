"""Reports what fusing a model does to each chain, and what other budgets would cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..memory import MIB
from .api import args_and_kwargs, checked, uncompiled
from .match import Match
from .plan import OutOfReach, knapsack

if TYPE_CHECKING:
    from .find import Findings


@dataclass
class MapReport:
    """An inner map: the path of the call whose result it is, its bytes, whether it is saved
    (`kept`), and, if it is not, the floating point operations that recomputing it adds to a
    step."""

    path: str
    nbytes: int
    kept: bool
    added_flops: int


@dataclass
class ChainReport:
    """A chain: its calls, the bytes that these save for backward unfused, and the bytes that it
    saves."""

    name: str
    before: int
    after: int
    maps: list[MapReport]


@dataclass
class Report:
    """The result of :func:`explain`; ``print`` shows it as a table.

    Attributes:
        chains: each chain, in order.
        norms: the number of batch norms that ran.
        refused: by the name of a batch norm, why it is in no chain, or not in that of the
            convolution in front of it.
        untraceable: by the place of a graph break, its reason.
        pairs: the number of batch norms right behind a convolution.
        fused_pairs: of these in one chain with their convolution.
        eager: bytes that the unfused model saves for backward.
        saved: bytes that the fused model saves.
        least: bytes that it saves with no inner map saved.
        step_flops: floating point operations of the convolutions in an unfused training step.
        added_flops: floating point operations that recomputing adds.
        front: (bytes saved, added FLOPs, added seconds as the planner estimates them) of the
            fastest plans for budgets from least to most.
        out_of_reach: why the plan is that of ``"min"``, where the budget is too small.
    """

    model: str
    chains: list[ChainReport]
    norms: int
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
        """The report as numbers, strings, lists and dicts, for JSON."""
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
                state = "saved" if m.kept else "recomputed"
                flops = f", {m.added_flops / 1e9:.2f} GFLOP" if m.added_flops else ""
                lines.append(f"    {m.path}: {m.nbytes / MIB:.2f} MiB {state}{flops}")
        before = self.eager - sum(c.before for c in self.chains)
        after = self.saved - sum(c.after for c in self.chains)
        lines.append(row("elsewhere", before, after))
        lines.append(row("total", self.eager, self.saved))
        share, least = (nbytes / max(self.eager, 1) for nbytes in (self.saved, self.least))
        lines.append(
            f"{self.model}: {share:.3f} of eager's {self.eager / MIB:.1f} MiB, at least "
            f"{least:.3f}; {100 * self.added_share:.1f} % more convolution FLOPs in a step; "
            f"{self.fused_pairs} of {self.pairs} pairs of convolution and batch norm fused"
        )
        if self.out_of_reach:
            lines.append(f"the plan is that of memory='min': {self.out_of_reach}")
        lines += [f"not fused: {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"the graph breaks {where}: {why}" for where, why in self.untraceable.items()]
        return "\n".join(lines)

    @property
    def added_share(self) -> float:
        """The added FLOPs as a fraction of the convolutions' FLOPs in an unfused step."""
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
        rows = range(len(names))
        bars.barh([row - 0.2 for row in rows], [c.before / MIB for c in self.chains], 0.4)
        bars.barh([row + 0.2 for row in rows], [c.after / MIB for c in self.chains], 0.4)
        bars.set_yticks(rows, names, fontsize=6)
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
    """What :func:`fusedconvbn.fuse` would do to a model, and why it would leave some layers
    unfused.

    Args:
        model: not changed. A model that is already fused is planned anew, with ``memory``.
        example_inputs, memory, calibrate: as for :func:`fusedconvbn.fuse`; ``example_inputs`` are
            required. Where a budget is too small, the report is that of ``"min"`` and says so.

    Returns:
        Report: can be printed, drawn with ``plot(path)``, and converted with ``to_dict()``.

    Raises:
        ValueError, TypeError: as for :func:`fusedconvbn.fuse`.
    """
    if example_inputs is None:
        raise ValueError("explain: expected example_inputs, got None")
    memory = checked(model, example_inputs, memory, calibrate)
    model, reason = uncompiled(model), ""
    args, kwargs = args_and_kwargs(example_inputs)
    from .find import find

    try:
        found = find(model, args, kwargs, memory, calibrate)
    except OutOfReach as error:
        reason = str(error)
        found = find(model, args, kwargs, "min", calibrate)
    return _report(type(model).__name__, found, reason)


def _report(name: str, found: "Findings", out_of_reach: str) -> Report:
    chains: list[ChainReport] = []
    for graph in found.graphs:
        maps = {m.name: m for m in graph.maps}
        for call, match in graph.calls:
            inner = [maps[link.name] for link in match.inner()]
            saved = [m.name in found.plan.saved for m in inner]
            before = graph.runs * sum(graph.eager.by_node.get(n, 0) for n in match.stands_for)
            after = graph.runs * graph.least.by_node.get(call.name, 0)
            after += sum(m.nbytes for m, is_saved in zip(inner, saved, strict=True) if is_saved)
            of_maps = [
                MapReport(m.name, m.nbytes, is_saved, 0 if is_saved else m.flops)
                for m, is_saved in zip(inner, saved, strict=True)
            ]
            chains.append(ChainReport(_title(match), before, after, of_maps))
    graphs, maps = found.graphs, found.maps
    refused: dict[str, str] = {}
    for graph in graphs:
        refused |= graph.refused
    return Report(
        name,
        chains,
        sum(graph.norms * graph.runs for graph in graphs),
        refused,
        found.untraceable,
        sum(graph.pairs * graph.runs for graph in graphs),
        sum(graph.fused_pairs * graph.runs for graph in graphs),
        found.eager,
        found.saved,
        found.least,
        sum(graph.step_flops * graph.runs for graph in graphs),
        sum(m.flops for m in maps if m.name not in found.plan.saved),
        _front(found),
        out_of_reach,
    )


def _front(found: "Findings", points: int = 32) -> list[tuple[int, int, float]]:
    maps = found.maps
    total = sum(m.nbytes for m in maps)
    front = []
    for i in range(points + 1):
        saved = knapsack(maps, total * i // points)
        recomputed = [m for m in maps if m.name not in saved]
        nbytes = found.least + total - sum(m.nbytes for m in recomputed)
        front.append((nbytes, sum(m.flops for m in recomputed), sum(m.seconds for m in recomputed)))
    return front


def _title(match: Match) -> str:
    """The names of a chain's calls, with their common prefix written once."""
    paths = [link.name for link in match.links]
    common = paths[0].rsplit(".", 1)[0] + "." if "." in paths[0] else ""
    while common and not all(p.startswith(common) for p in paths):
        common = common[:-1].rsplit(".", 1)[0] + "." if "." in common[:-1] else ""
    names = " → ".join(p[len(common) :] for p in paths)
    return f"{common[:-1]}: {names}" if common else names
