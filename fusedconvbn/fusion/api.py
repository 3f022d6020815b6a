"""Whole models: one call that fuses, one that gives the original back."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ..memory import saved_storages
from ..options import refuse_lazy
from .plan import Plan, parse_memory
from .progress import progress


@dataclass
class Findings:
    """What was found in a model and decided about it; :class:`fusedconvbn.fusion.report.Report` says it in words.

    Attributes:
        graphs: that were captured.
        untraceable: where the graph breaks, so that there are several or a part of the model is in none, and why.
        eager, least: bytes that the model saves as it is, and with no inner map saved.
        plan: what is saved.
    """

    plan: Plan
    graphs: list[Any] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    eager: int = 0
    least: int = 0

    @property
    def maps(self) -> list[Any]:
        return [m for graph in self.graphs for m in graph.maps]

    @property
    def saved(self) -> int:
        return self.least + sum(m.nbytes for m in self.maps if m.name in self.plan.saved)


def fuse(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    memory: float | int | str = "auto",
    inplace: bool = False,
    calibrate: bool = False,
) -> nn.Module:
    r"""The same network with less memory: its convolutions, batch norms and activations run as chains that save some of their
    feature maps for backward and recompute the others.

    TorchDynamo, the front end of ``torch.compile``, captures what the model's ``forward`` computes. In the captured graphs
    are found: convolution → batch norm → activation, with a residual that is added before the activation, and batch norm →
    activation → convolution, in rows as long as each map has one reader; concatenations in front of them, whose parts alone
    are saved; and products with one value per sample and channel, as squeeze-and-excitation has. What it is written with
    does not matter: modules, subclasses of them, functions, methods. What is not fused is left as it is;
    :func:`fusedconvbn.explain` says why.

    Parameters, buffers, ``state_dict`` keys, modules and hooks stay. The model gets a subclass of its class, of the same name, whose
    ``forward`` runs the captured graphs; what they took for granted (modes, attributes, shapes, hooks inside) is
    looked at in every call, and where it has changed the model is captured again, which takes seconds. What Python does in
    the forward besides happens in every call.

    Args:
        model: not changed unless ``inplace``.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the size in which the model will be
            trained. The model is captured and the plan is made with their shapes; nothing is computed, unless the graph
            breaks at something that needs values: then a copy of the model runs. Without them that is done at the first call.
        memory: what may be saved for backward. A float is a fraction of what eager saves for ``example_inputs``, an
            int or a string like ``"6GiB"`` bytes; the plan is the fastest one within. ``"min"`` saves nothing that can be
            recomputed. ``"auto"`` gives up what is nearly free to recompute, and more until 0.53 of eager's bytes are reached
            or nothing is left.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and buffers.
        calibrate: measure on the model's device how long recomputing each map takes, instead of estimating it from its FLOPs
            and bytes. Needs ``example_inputs``.

    Returns:
        The fused model. ``print`` shows that it is one, and so does :func:`fusedconvbn.is_fused`.

    Raises:
        ValueError: ``memory`` breaks the rule above, needs ``example_inputs``, or is less than what can be reached;
            the message says how much that is.
        TypeError: ``model`` is scripted, no module, or cannot be copied and ``inplace`` is off.

    Warns:
        UserWarning: nothing was fused, or memory does not fall; and later, once, if a call of the model runs unfused.

    Example:
        >>> model = fusedconvbn.fuse(torchvision.models.resnet50(), torch.randn(64, 3, 224, 224), memory="auto")
        >>> model(images).sum().backward()
    """
    memory = _checked(model, example_inputs, memory, calibrate)
    model = _uncompiled(model)
    plan = Plan(memory)
    example = None
    if example_inputs is not None:
        found = find(model, example_inputs, memory, calibrate)
        plan, example = found.plan, _stand_ins(example_inputs)
        _warn_if_useless(type(model).__name__, found)
    from .model import fused

    return fused(unfuse(model, inplace=inplace), plan, example)


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before :func:`fuse`: it runs its own ``forward`` again, and so does every module inside.

    Args:
        model: with fused models anywhere in it.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and buffers.

    Returns:
        The model, of its own class.

    Raises:
        TypeError: the model's class was exchanged after it was fused, as by ``fully_shard``.
    """
    model = model if inplace else _sharing_copy(model)
    for module in model.modules():
        if hasattr(type(module), "_fusion"):
            if "_fusion" not in vars(type(module)):
                raise TypeError(
                    f"unfuse: expected a model as fuse made it, got a {type(module).__name__} whose class "
                    "was exchanged since; unfuse it before fully_shard"
                )
            module._fusion.take_off(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether a model was fused by :func:`fuse`."""
    return hasattr(type(model), "_fusion")


def _checked(
    model: nn.Module, example_inputs: Any, memory: Any, calibrate: bool
) -> float | int | str:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse: expected model to be an nn.Module that is not scripted, got {type(model).__name__}"
        )
    for name, module in model.named_modules():
        refuse_lazy("fuse", f"{name or 'model'!r}", module)
    memory = parse_memory(memory)
    if example_inputs is None and (calibrate or not isinstance(memory, str)):
        what = "calibrate=True" if calibrate else f"memory={memory!r}"
        raise ValueError(f"fuse: expected example_inputs with {what}, got None")
    return memory


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` was given: a captured graph cannot be captured again."""
    return getattr(model, "_orig_mod", model)


def _sharing_copy(model: nn.Module) -> nn.Module:
    # deepcopy takes what its memo has for an object as its copy. Besides parameters and buffers, which are shared, what
    # a hook made of them for the last call, as pruning does.
    shared = [
        t
        for m in model.modules()
        for t in (*m.__dict__.values(), *m._parameters.values(), *m._buffers.values())
    ]
    try:
        return copy.deepcopy(model, {id(t): t for t in shared if isinstance(t, Tensor)})
    except Exception as error:
        raise TypeError(
            f"fuse: expected a model that copy.deepcopy takes, got {type(error).__name__}: {error}; "
            "inplace=True makes no copy"
        ) from error


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a sequence of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _stand_ins(example_inputs: Any) -> Any:
    """The same without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map_only(Tensor, mode.from_tensor, arguments(example_inputs))


def _warn_if_useless(name: str, found: Findings) -> None:
    fused, norms = (
        sum(len(g.matches) for g in found.graphs),
        sum(g.norms * g.runs for g in found.graphs),
    )
    if not fused:
        what = f"none of its {norms} batch norms can be" if norms else "it runs no batch norm"
        reasons = {reason for g in found.graphs for reason in g.refused.values()} | set(
            found.untraceable.values()
        )
        said = f": {'; '.join(sorted(reasons)[:3])}" if reasons else ""
        warnings.warn(f"fuse: nothing of {name} is fused, {what}{said}", stacklevel=3)
    elif found.saved > 0.95 * found.eager:
        warnings.warn(
            f"fuse: {name} saves {found.saved / max(found.eager, 1):.2f} of eager's bytes for these inputs; "
            "fusedconvbn.explain says where they are",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------- finding


def find(
    model: nn.Module, example_inputs: Any, memory: float | int | str, calibrate: bool
) -> Findings:
    """Captures a model in training mode (in the modes its modules are in, if the model itself is in it) and plans.

    Raises:
        OutOfReach: the budget is less than what can be reached.
    """
    args, kwargs = arguments(example_inputs)
    found = Findings(Plan(memory))
    with progress(f"fuse {type(model).__name__}", 3) as stage, _training(model):
        with torch.enable_grad():
            _capture(model, args, kwargs, found, stage)
        stage("plan")
        if calibrate:
            from .calibration import measured_seconds

            for graph in found.graphs:
                graph.maps = measured_seconds(graph.maps, graph.links)
        _plan(found)
    return found


def _plan(found: Findings) -> None:
    if found.graphs:
        step_flops = sum(graph.step_flops * graph.runs for graph in found.graphs)
        found.plan.decide(found.maps, found.eager, found.least, step_flops, found.graphs[0].device)
        found.plan.complete = True


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    try:
        if not model.training:
            model.train()
        yield
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
    from .capture import capture_whole, groups_of, paths_of
    from .graph import Graph
    from .model import original_forward

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
        _run_in_parts(model, args, kwargs, found, _fake_copy)
    except Exception:  # a branch depends on a value, say
        found.graphs = []
        _run_in_parts(model, args, kwargs, found, _real_copy)
    found.graphs = [graph for graph in found.graphs if graph.runs]
    found.plan.parts = len(found.graphs)


def _run_in_parts(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    found: Findings,
    copied: Callable[..., tuple[nn.Module, Any]],
) -> None:
    """Runs copies of a model whose graph breaks, once as it is and once with its chains."""
    from .capture import captured, groups_of, paths_of
    from .graph import Graph
    from .model import original_forward

    totals = []
    for fused in (False, True):
        other, (other_args, other_kwargs) = copied(model, (tuple(args), dict(kwargs)))
        paths, groups = paths_of(other), groups_of(other)

        def backend(module: Any, example_inputs: Any) -> Any:
            if not fused:  # noqa: B023
                return module.forward
            graph = Graph.of(module, example_inputs, paths, groups)  # noqa: B023
            found.graphs.append(graph)

            def run(*inputs: Any) -> Any:
                graph.runs += 1  # Dynamo runs one graph for several modules where it can
                return module.forward(*inputs)

            return run

        call = captured(backend, dynamic=False)
        tensors = [
            t for t in pytree.tree_leaves((other_args, other_kwargs)) if isinstance(t, Tensor)
        ]
        device = tensors[0].device if tensors else torch.device("cpu")
        with _random_states_kept(device), saved_storages(device) as storages:
            result = call(other, "0", original_forward(other), other_args, other_kwargs)
            totals.append(sum(storages.values()))
            del result
    found.eager, found.least = totals
    for graph in found.graphs:
        graph.maps = [m.times(graph.runs) for m in graph.maps]


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    python = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    random.setstate(python)


def _fake_copy(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return _copy_with(model, inputs, mode.from_tensor)


def _real_copy(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    from .profile import copy_of

    return _copy_with(model, inputs, copy_of)


def _copy_with(
    model: nn.Module, inputs: Any, of_tensor: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, Any]:
    """A copy of a model and of its inputs, with others in the place of their tensors: one for each."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (
            *module._parameters.values(),
            *module._buffers.values(),
            *module.__dict__.values(),
        ):
            if isinstance(t, Tensor) and id(t) not in memo:
                other = of_tensor(t)
                is_parameter = isinstance(t, nn.Parameter)
                memo[id(t)] = (
                    nn.Parameter(other, t.requires_grad)
                    if is_parameter and type(other) is Tensor
                    else other
                )
    inputs = pytree.tree_map_only(Tensor, lambda t: memo.setdefault(id(t), of_tensor(t)), inputs)
    try:
        return copy.deepcopy((model, inputs), memo)
    except Exception as error:
        raise TypeError(
            "fuse: expected a model that copy.deepcopy takes, as its graph breaks and a copy has to run, got "
            f"{type(error).__name__}: {error}; without example_inputs the plan is made at the first call"
        ) from error
