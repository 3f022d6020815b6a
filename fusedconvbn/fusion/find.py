"""Captures a whole model with its example inputs, and decides which of its maps are saved."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ..memory import saved_storages
from .calibration import measured_seconds
from .capture import capture_whole, captured, groups_of, paths_of
from .copies import copied, copy_of
from .curve import Curve
from .graph import Graph
from .model import original_forward
from .plan import InnerMap, Memory, Peak, Plan
from .progress import progress
from .random_states import random_states

_ADVICE = (
    "as its graph breaks, a copy has to run; "
    "without example_inputs the plan is made at the first call"
)


@dataclass
class Findings:
    """What was found in a model and decided about it; :class:`fusedconvbn.fusion.report.Report`
    puts it into words.

    Attributes:
        plan: which maps are saved.
        graphs: the captured graphs.
        untraceable: by the place of a graph break, its reason. With breaks there are several
            graphs, or a part of the model is in none.
        eager, least, saved: bytes that the model saves unfused, with no inner map saved, and fused.
    """

    plan: Plan
    graphs: list[Graph] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    eager: int = 0
    least: int = 0
    saved: int = 0

    @property
    def maps(self) -> list[InnerMap]:
        return [m for graph in self.graphs for m in graph.maps]

    @property
    def unfused(self) -> str:
        """Why nothing is fused; empty if something is."""
        if any(g.matches for g in self.graphs):
            return ""
        norms = sum(g.norms * g.runs for g in self.graphs)
        none = "no captured graph of it runs one" if self.untraceable else "it runs no batch norm"
        what = f"none of its {norms} batch norms can be" if norms else none
        reasons = {reason for g in self.graphs for reason in g.refused.values()}
        reasons |= set(self.untraceable.values())
        return f"{what}: {'; '.join(sorted(reasons)[:3])}" if reasons else what

    @functools.cached_property
    def curve(self) -> Curve | None:
        """The plans for all budgets. Segments are for a graph that is the whole model."""
        if self.untraceable or len(self.graphs) != 1:
            return None
        return Curve.of(self.graphs[0])


def find(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    memory: Memory,
    calibrate: bool,
) -> Findings:
    """Captures a model in training mode, and makes its plan. If the model is in training mode
    already, modules inside stay in the modes that they have.

    Raises:
        OutOfReach: the budget is below the least that is possible.
    """
    found = Findings(Plan(memory))
    with progress(f"fuse {type(model).__name__}", 3) as stage, _training(model) as trained:
        with torch.enable_grad():
            _capture(trained, args, kwargs, found, stage)
        stage("plan")
        if calibrate:
            for graph in found.graphs:
                graph.maps = measured_seconds(graph.maps, graph.links)
        decide(found)
    return found


def decide(found: Findings) -> None:
    """Makes the plan for the maps that were found.

    Raises:
        OutOfReach: the budget is below the least that is possible.
        ValueError: the budget is a peak, and the model is not one graph.
    """
    found.saved = found.least
    if isinstance(found.plan.memory, Peak) and found.curve is None:
        raise ValueError(
            "fuse: expected a model that is one graph for a peak as memory, got one that breaks, "
            "or needs values; fusedconvbn.explain says where"
        )
    if found.graphs:
        step_flops = sum(graph.step_flops * graph.runs for graph in found.graphs)
        device = found.graphs[0].device
        curve = found.curve if found.plan.has_budget else None
        found.plan.decide(found.maps, found.eager, found.least, step_flops, device, curve)
        found.saved = found.plan.spent
        found.plan.complete = True


@contextmanager
def _training(model: nn.Module) -> Iterator[nn.Module]:
    """A model in training mode: a copy where a module has a `train` of its own, which may do more
    than set the mode."""
    modes = {m: m.training for m in model.modules()}
    try:
        if not model.training:
            if any(type(m).train is not nn.Module.train for m in modes):
                advice = "as it has a train() of its own, which fuse must not call on the model"
                model, _ = copied(model, (), copy_of, advice)
            model.train()
        yield model
    finally:
        for m, mode in modes.items():
            m.training = mode


def _capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    found: Findings,
    stage: Callable[[str], None],
) -> None:
    stage("capture")
    whole = capture_whole(model, original_forward(model), args, kwargs)
    if not isinstance(whole, dict):
        stage("chains")
        graph = Graph.of(*whole, paths_of(model), groups_of(model))
        graph.runs = 1
        found.graphs, found.eager, found.least = [graph], graph.eager.saved, graph.least.saved
        return
    found.untraceable = whole
    stage("its parts")
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        _run_in_parts(model, args, kwargs, found, mode.from_tensor)
    except Exception:  # a branch depends on a value, say
        found.graphs = []
        _run_in_parts(model, args, kwargs, found, copy_of)
    found.graphs = [graph for graph in found.graphs if graph.runs]
    found.plan.parts = len(found.graphs)


def _run_in_parts(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    found: Findings,
    of_tensor: Callable[[Tensor], Tensor],
) -> None:
    """Runs two copies of a model whose graph breaks, with tensors of their own: one unfused, one
    fused."""
    totals = []
    for fused in (False, True):
        inputs = (tuple(args), dict(kwargs))
        other, (other_args, other_kwargs) = copied(model, inputs, of_tensor, _ADVICE)
        paths, groups = paths_of(other), groups_of(other)

        def backend(module: Any, example_inputs: Any) -> Any:
            if not fused:  # noqa: B023
                return module.forward
            graph = Graph.of(module, example_inputs, paths, groups)  # noqa: B023
            found.graphs.append(graph)

            def run(*given: Any) -> Any:
                graph.runs += 1  # several modules may share a graph
                return module.forward(*given)

            return run

        call = captured(backend, dynamic=False)
        tensors = [
            t for t in pytree.tree_leaves((other_args, other_kwargs)) if isinstance(t, Tensor)
        ]
        device = tensors[0].device if tensors else torch.device("cpu")
        restore = random_states([device])
        try:
            with saved_storages(device) as storages:
                result = call(other, "0", original_forward(other), other_args, other_kwargs)
                totals.append(sum(storages.values()))
                del result
        finally:
            restore()
    found.eager, found.least = totals
    for graph in found.graphs:
        graph.maps = [m.times(graph.runs) for m in graph.maps]
