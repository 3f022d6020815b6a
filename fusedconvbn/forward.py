"""The forward of a fused module: its chains run as operators as long as the module is what it was when it was fused."""

import contextlib
import copy
import inspect
import re
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .links import BATCH_NORMS, CONVOLUTIONS, Chain
from .matching import CALL, Matcher, rewrite
from .pooling import rewrite_pooling
from .scripting import scriptable
from .tracing import (
    Guards,
    Untraceable,
    compiled,
    function_of,
    is_leaf,
    picklable,
    trace,
    unpickled,
)


@dataclass
class Variant:
    """One way through a module's forward.

    Attributes:
        source: the code of ``forward(self, …)``.
        scope: its globals.
        guards: when it is the right way.
        positional: its number of arguments.
    """

    source: str
    scope: dict[str, Any]
    chains: list[Chain]
    guards: Guards
    positional: int

    def __post_init__(self) -> None:
        self.function = compiled(self.source, {**self.scope, "chains": self.chains})

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "function"}
        return {**state, "scope": picklable(self.scope)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, scope=unpickled(state["scope"]))
        self.__post_init__()


class FusedForward:
    """Stands in a module's ``__dict__`` as its ``forward``. What it cannot run fused (hooks were put on a module that it
    would not call, a child was exchanged, other arguments are given) is run by the forward that it hides, whose
    children may have fused forwards of their own."""

    is_fused = True

    def __new__(cls, *_: Any) -> "FusedForward":
        forward = super().__new__(cls)
        _forwards[id(forward)] = forward
        return forward

    def __init__(self, module: nn.Module, variants: list[Variant]) -> None:
        self.module = module
        self.variants = variants

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    @property
    def __code__(self) -> types.CodeType:
        """Where torch.export finds the line to name in a message."""
        return type(self.module).forward.__code__

    @property
    def chains(self) -> list[Chain]:
        return [chain for variant in self.variants for chain in variant.chains]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index = _variant(id(self))
        if index >= 0:
            variant = self.variants[index]
            tensors = args
            if kwargs or len(args) != variant.positional:
                tensors = _without_defaults(self.__signature__, args, kwargs)
            # A number or a list may take another way.
            if len(tensors) == variant.positional and all(isinstance(t, Tensor) for t in tensors):
                return variant.function(self.module, *tensors)
        return type(self.module).forward(self.module, *args, **kwargs)

    def scriptable(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in the module's place.

        Raises:
            NotImplementedError: the forward branches on the mode; a traced graph has one of its ways, and would take it in both.
        """
        if any(variant.guards.training for variant in self.variants):
            raise NotImplementedError(
                f"TorchScript of a fused {type(self.module).__name__}, whose forward branches on `training`"
            )
        found = analyse(self.module)
        for chain, planned in zip(found.variant.chains, self.variants[0].chains, strict=True):
            chain.kept = planned.kept
        chains = {f"{CALL}{i}": chain for i, chain in enumerate(found.variant.chains)}
        return scriptable(self.module, found.graph, chains)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedForward":
        return FusedForward(copy.deepcopy(self.module, memo), self.variants)


def _without_defaults(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call by position, without those that are what they would be by default; none where others than
    the required ones are left."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the original forward gives the error
        return ()
    positional: list[Any] = []
    for name, parameter in signature.parameters.items():
        if name not in given or given[name] is parameter.default:
            continue
        if parameter.default is not parameter.empty or parameter.kind in _MANY:
            return ()
        positional.append(given[name])
    return tuple(positional)


_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


_forwards: "weakref.WeakValueDictionary[int, FusedForward]" = weakref.WeakValueDictionary()


def _variant(identity: int) -> int:
    """The variant whose guards hold, -1 if none; in compiled code what it was when it was compiled. The forward comes as a
    number since the compiler of torch 2.11 takes nothing but constants."""
    forward = _forwards[identity]
    for index, variant in enumerate(forward.variants):
        if variant.guards.hold(forward.module):
            return index
    return -1


# What torch.compiler.assume_constant_result does, which would import the compiler here and now.
_variant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass
class Analysis:
    """What can be fused of a module's forward.

    Attributes:
        refused: path of a module below it, and why it is in no chain.
        pairs: batch norms right behind a convolution, by path.
    """

    graph: fx.Graph
    variant: Variant
    refused: dict[str, str]
    pairs: list[tuple[str, str]]


def _pairs(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[tuple[str, str]]:
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or {node.op, before.op} != {"call_module"}:
            continue
        if isinstance(modules[node.target], BATCH_NORMS) and isinstance(
            modules[before.target], CONVOLUTIONS
        ):
            pairs.append((before.target, node.target))
    return pairs


def analyse(module: nn.Module, training: bool | None = None, shallow: bool = False) -> Analysis:
    """Traces a module's forward and finds its chains.

    Raises:
        Untraceable: it cannot be traced.
    """
    found = trace(module, training, shallow)
    modules = dict(module.named_modules())
    pairs = _pairs(found.graph, modules)
    matcher = Matcher(found.graph, module)
    for match in matcher.matches:
        for node in match.nodes:
            if node.op == "call_module":
                path = tuple(node.target.split("."))
                options = not isinstance(modules[node.target], BATCH_NORMS)  # read in every call
                found.guards.add(path, modules[node.target], options)
    chains = rewrite(found.graph, matcher.matches)
    rewrite_pooling(found.graph, modules, found.guards)
    source, scope = function_of(found.graph, {})
    source = re.sub(rf"self\.{CALL}(\d+)\(", r"chains[\1](self, ", source)
    variant = Variant(source, scope, chains, found.guards, found.positional)
    return Analysis(found.graph, variant, matcher.refused, pairs)


def _modes(analysis: Analysis) -> list[bool | None]:
    """In which a forward is to be traced: as it is, and, if branches depend on it, in both."""
    return [None, True, False] if analysis.variant.guards.training else [None]


def _has_own_forward(module: nn.Module) -> bool:
    return not is_leaf(module) and any(True for _ in module.children())


def fused_forward(module: nn.Module) -> tuple[FusedForward | None, Analysis]:
    """The fused forward of a module, None if there is nothing to fuse, and what was found.

    Raises:
        Untraceable: its forward cannot be traced.
    """
    analyses = [analyse(module)]
    for mode in _modes(analyses[0])[1:]:
        with contextlib.suppress(Untraceable):
            analyses.append(analyse(module, mode))
    if any(_has_own_forward(m) for m in module.children()):
        # Runs where the others do not, as when there are hooks somewhere inside.
        analyses += [analyse(module, mode, shallow=True) for mode in _modes(analyses[0])]
    variants = [a.variant for a in analyses]
    if not any(v.chains for v in variants):
        return None, analyses[0]
    return FusedForward(module, variants), analyses[0]
