"""Reports what fusing a model does to each chain, and what other budgets would cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..memory import MIB
from .api import args_and_kwargs, checked, uncompiled, with_static
from .match import Match
from .optimizers import Optimizer
from .plan import OutOfReach, knapsack
from .progress import progress
from .segments import boundaries

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
    saves: 0 in a segment."""

    name: str
    before: int
    after: int
    maps: list[MapReport]


@dataclass
class FrontPoint:
    """A plan: the bytes that it saves, the peak of its step in bytes, beside the parameters (0
    where the model breaks into several graphs), and what recomputing adds to a step."""

    saved: int
    peak: int
    added_flops: int
    added_seconds: float


@dataclass
class Report:
    """The result of :func:`fusedconvbn.explain`; ``print`` shows it as a table.

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
        added_seconds: that recomputing adds, as the planner estimates it.
        segments: before and behind which calls each part of the model begins and ends that saves
            its inputs alone and runs again in backward.
        front: the fastest plans, from the one that saves everything to the one that saves least.
        out_of_reach: why the plan is that of ``"min"``, where the budget is too small.
        unfused: why nothing is fused; empty if something is.
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
    added_seconds: float
    segments: list[str]
    front: list[FrontPoint]
    out_of_reach: str = ""
    unfused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, for JSON."""
        chains = [
            {**vars(chain), "maps": [dict(vars(m)) for m in chain.maps]} for chain in self.chains
        ]
        return {**vars(self), "chains": chains, "front": [dict(vars(p)) for p in self.front]}

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
        lines += [f"runs again in backward: {segment}" for segment in self.segments]
        if self.out_of_reach:
            lines.append(f"the plan is that of memory='min': {self.out_of_reach}")
        lines += [f"not fused: {name}: {reason}" for name, reason in self.refused.items()]
        for where, why in self.untraceable.items():
            lines.append(f"the graph breaks{f' {where}' if where else ''}: {why}")
        return "\n".join(lines)

    @property
    def added_share(self) -> float:
        """The added FLOPs as a fraction of the convolutions' FLOPs in an unfused step."""
        return self.added_flops / max(self.step_flops, 1)

    def plot(self, path: str | Path) -> None:
        """Draws what each budget costs, with this plan, and the bytes of the chains that save most
        unfused, before and after.

        Args:
            path: the file; its ending says which kind (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .picture import draw

        draw(self, path)


def explain(
    model: nn.Module,
    example_inputs: Any,
    *,
    memory: float | int | str = "auto",
    calibrate: bool = False,
    optimizer: Optimizer = "adam",
) -> Report:
    """What :func:`fusedconvbn.fuse` would do to a model, and why it would leave some layers
    unfused.

    Args:
        model: not changed. A model that is already fused is planned anew, with ``memory``.
        example_inputs, memory, calibrate, optimizer: as for :func:`fusedconvbn.fuse`;
            ``example_inputs`` are required. Where a budget is too small, the report is that of
            ``"min"`` and says so.

    Returns:
        Report: can be printed, drawn with ``plot(path)``, and converted with ``to_dict()``.

    Raises:
        ValueError, TypeError: as for :func:`fusedconvbn.fuse`.
    """
    if example_inputs is None:
        raise ValueError("explain: expected example_inputs, got None")
    asked = checked(model, example_inputs, memory, calibrate)
    model, reason = uncompiled(model), ""
    budget = with_static(asked, model, example_inputs, optimizer)
    args, kwargs = args_and_kwargs(example_inputs)
    from .find import find

    try:
        found = find(model, args, kwargs, budget, calibrate)
    except OutOfReach as error:
        reason = str(error)
        found = find(model, args, kwargs, "min", calibrate)
    name = type(model).__name__
    with progress(f"explain {name}", 1) as stage:
        stage("all budgets")
        return _report(name, found, reason)


def _report(name: str, found: "Findings", out_of_reach: str) -> Report:
    chains: list[ChainReport] = []
    segments: list[str] = []
    for graph in found.graphs:
        maps = {m.name: m for m in graph.maps}
        at = boundaries(list(graph.module.graph.nodes), graph.calls)
        rows = [(at[a], at[b]) for a, b in found.plan.segments if a in at and b in at]
        names = {index: f"{side} {name}" for (side, name), index in at.items()}
        segments += [f"{names[first]} … {names[last]}" for first, last in sorted(rows)]
        for call, match in graph.calls:
            index = at["before", match.links[0].name]
            again = any(first <= index < last for first, last in rows)
            inner = [maps[link.name] for link in match.inner() if link.name in maps]
            saved = [m.name in found.plan.saved and not again for m in inner]
            before = graph.runs * sum(graph.eager.by_node.get(n, 0) for n in match.stands_for)
            after = 0 if again else graph.runs * graph.least.by_node.get(call.name, 0)
            after += sum(m.nbytes for m, is_saved in zip(inner, saved, strict=True) if is_saved)
            of_maps = [
                MapReport(m.name, m.nbytes, is_saved, 0 if is_saved else m.flops)
                for m, is_saved in zip(inner, saved, strict=True)
            ]
            chains.append(ChainReport(_title(match), before, after, of_maps))
    graphs = found.graphs
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
        found.plan.added_flops,
        found.plan.added_seconds,
        segments,
        _front(found),
        out_of_reach,
        found.unfused,
    )


def _front(found: "Findings", points: int = 32) -> list[FrontPoint]:
    if found.curve is not None:
        return [FrontPoint(p.saved, p.peak, p.flops, p.seconds) for p in found.curve.front()]
    maps = found.maps
    total = sum(m.nbytes for m in maps)
    front = []
    for i in reversed(range(points + 1)):
        saved = knapsack(maps, total * i // points)
        again = [m for m in maps if m.name not in saved]
        nbytes = found.least + total - sum(m.nbytes for m in again)
        front.append(
            FrontPoint(nbytes, 0, sum(m.flops for m in again), sum(m.seconds for m in again))
        )
    return front


def _title(match: Match) -> str:
    """The names of a chain's calls, with their common prefix written once."""
    paths = [link.name for link in match.links]
    common = paths[0].rsplit(".", 1)[0] + "." if "." in paths[0] else ""
    while common and not all(p.startswith(common) for p in paths):
        common = common[:-1].rsplit(".", 1)[0] + "." if "." in common[:-1] else ""
    names = " → ".join(p[len(common) :] for p in paths)
    return f"{common[:-1]}: {names}" if common else names
