"""Finds the chains of a graph, and puts calls of them in their place."""

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from .activations import activation_name
from .links import BATCH_NORMS, CONVOLUTIONS, Chain, ConvLink, NormLink
from .tracing import has_hooks

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_MUL = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_CAT = (torch.cat, torch.concat, torch.concatenate)
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.mish: "mish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    "tanh": "tanh",
}
_IN_PLACE_OPERATORS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.setitem,
)
# Whose result is in memory of its own; that of anything else may be its first argument's.
_FRESH = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    torch.add,
    torch.mul,
    torch.cat,
    F.interpolate,
    F.avg_pool2d,
    F.max_pool2d,
    F.conv2d,
    *_ACTIVATIONS,
)


def path_of(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(node.target).split("."))


@dataclass(eq=False)
class Match:
    """A chain in a graph.

    Attributes:
        input: its first map, or the list of nodes, or node of a list, that is concatenated.
        nodes: what it stands for, in order.
        end: the node whose value it computes.
    """

    input: Any
    links: list[ConvLink | NormLink] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    gate: fx.Node | None = None
    residual: fx.Node | None = None
    concatenates: bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def takes_activation(self) -> bool:
        last = self.links[-1]
        return isinstance(last, NormLink) and last.activation == "none"

    def extend(self, node: fx.Node, link: ConvLink | NormLink) -> None:
        self.nodes.append(node)
        self.links.append(link)

    def activate(self, node: fx.Node, activation: str) -> None:
        self.nodes.append(node)
        self.links[-1] = NormLink(self.links[-1].path, activation)

    def inputs(self) -> list[fx.Node]:
        parts = self.input if isinstance(self.input, list) else [self.input]
        return [n for n in (*parts, self.gate, self.residual) if n is not None]

    def saves_memory(self) -> bool:
        """Whether it keeps less than its modules would: batch norm has a convolution beside it, or an activation."""
        norms = [link for link in self.links if isinstance(link, NormLink)]
        return bool(norms) and (len(self.links) > 1 or norms[0].activation != "none")


def single_use(node: fx.Node) -> bool:
    """Whether a node is read in one place of one other node."""
    if len(node.users) != 1:
        return False
    reader = next(iter(node.users))
    return sum(a is node for a in reader.all_input_nodes) == 1 and _count(reader, node) == 1


def _count(reader: fx.Node, node: fx.Node) -> int:
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg(reader.args, visit)
    fx.map_arg(reader.kwargs, visit)
    return count


# What a subclass may have of its own without computing something else.
_HARMLESS = {
    "__init__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__qualname__",
    "__parameters__",
    "__orig_bases__",
    "__constants__",
    "__static_attributes__",
    "__firstlineno__",
    "__dict__",
    "__weakref__",
    "__repr__",
    "extra_repr",
    "reset_parameters",
    "_version",
}


@cache
def _overridden(kind: type, base: type) -> str:
    """The first attribute of `base` that its subclass `kind` has replaced; "" where it computes the same."""
    for parent in kind.__mro__[: kind.__mro__.index(base)]:
        for name in parent.__dict__:
            if name not in _HARMLESS and hasattr(base, name):
                return name
    return ""


@cache
def _place_of_inplace(function: Any) -> int | None:
    """Where an argument `inplace` stands, as in ``F.relu(x, True)``."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def mutated(node: fx.Node) -> fx.Node | None:
    """The argument that a node writes to, if it does."""
    name = getattr(node.target, "__name__", str(node.target))
    writes = node.target in _IN_PLACE_OPERATORS
    if node.op in ("call_function", "call_method"):
        writes = writes or (name.endswith("_") and not name.endswith("__"))
    writes = writes or node.kwargs.get("inplace") is True
    if node.op == "call_function" and not writes:
        place = _place_of_inplace(node.target)
        writes = place is not None and len(node.args) > place and node.args[place] is True
    if "out" in node.kwargs:
        return node.kwargs["out"]
    return next(iter(node.all_input_nodes), None) if writes else None


def reason_against(module: nn.Module, calls: int) -> str | None:
    """Why a convolution or a batch norm that is called so often in a forward cannot be a link."""
    kind = next(k for k in (*CONVOLUTIONS, *BATCH_NORMS) if isinstance(module, k))
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if overridden := _overridden(type(module), kind):
        return f"it is a {type(module).__name__}, which has its own {overridden}"
    if has_hooks(module):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if calls > 1:
        return "it is shared: it is called more than once"
    return None


def _unexpanded(node: fx.Node, other: fx.Node) -> fx.Node:
    """What multiplies `other` just as well without being expanded to it."""
    if node.op == "call_method" and node.target == "expand_as" and node.args[1:] == (other,):
        return node.args[0]
    return node


_POOLS = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ConstantPad2d,
    nn.ZeroPad2d,
)


class Matcher:
    """Chains of one graph.

    Attributes:
        matches: the chains.
        refused: path of a batch norm, or of a convolution in front of one, and why it is in no chain.
        modules: those whose forward the chains stand for, by path.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self.modules = dict(root.named_modules())
        self.uses: dict[nn.Module, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                module = self.modules[node.target]
                self.uses[module] = self.uses.get(module, 0) + 1
        self.writes = {n: t for n in graph.nodes if (t := self._mutated(n)) is not None}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.refused: dict[str, str] = {}
        self.ends: set[fx.Node] = set()  # of chains, whose results are new
        self.open: dict[fx.Node, Match] = {}  # by the last node
        self.closed: list[Match] = []
        for node in graph.nodes:
            self._visit(node)
        self.matches = [m for m in (*self.closed, *self.open.values()) if m.saves_memory()]
        undisturbed: list[Match] | None = None
        while undisturbed is None or len(undisturbed) < len(self.matches):
            self.matches = self.matches if undisturbed is None else undisturbed
            self.ends = {m.end for m in self.matches}
            undisturbed = [m for m in self.matches if self._is_undisturbed(m)]
        self.matches.sort(key=lambda m: self.order[m.end])
        self._concatenate()
        self._explain_the_rest()

    def _mutated(self, node: fx.Node) -> fx.Node | None:
        if node.op == "call_module":
            module = self.modules[node.target]
            in_place = getattr(module, "inplace", False) is True
            return next(iter(node.all_input_nodes), None) if in_place else None
        return mutated(node)

    def _storage(self, node: fx.Node) -> fx.Node:
        """The node whose memory a node's value may share."""
        while node.op.startswith("call_") and node not in self.ends and node.all_input_nodes:
            if node in self.writes:
                node = self.writes[node]
            elif self._is_fresh(node):
                break
            else:
                node = node.all_input_nodes[0]
        return node

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(
                self.modules[node.target], (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear, *_POOLS)
            )
        return node.target in _FRESH

    # ---------------------------------------------------------------------------------------- growing

    def _visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._visit_module(node, self.modules[node.target])
        elif node.op in ("call_function", "call_method"):
            if node.target in _ADD:
                self._visit_add(node)
            elif activation := self._function_activation(node):
                self._activate(node, activation)

    def _visit_module(self, node: fx.Node, module: nn.Module) -> None:
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return
        x = node.args[0]
        if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS)):
            reason = reason_against(module, self.uses[module])
            if reason:
                self.refused[node.target] = reason
                return
            path = path_of(node)
            convolution = isinstance(module, CONVOLUTIONS)
            link = ConvLink.of(path, module) if convolution else NormLink(path)
            match = self.open.get(x)
            if match is not None and self._continues(match, x, link, module):
                del self.open[x]
            else:
                match = self._new(x, link)
            match.extend(node, link)
            self.open[node] = match
        elif type(module) is nn.Identity:
            match = self.open.get(x)
            if match is not None and single_use(x) and not has_hooks(module):
                del self.open[x]
                match.nodes.append(node)
                self.open[node] = match
        elif not has_hooks(module):
            try:
                activation = activation_name(module)
            except ValueError:
                return
            self._activate(node, activation)

    def _continues(
        self, match: Match, x: fx.Node, link: ConvLink | NormLink, module: nn.Module
    ) -> bool:
        if (
            not single_use(x)
            and isinstance(link, NormLink)
            and isinstance(match.links[-1], ConvLink)
        ):
            reason = "the result of the convolution in front of it is used elsewhere too"
            self.refused[".".join(link.path)] = reason
        if match.residual is not None or not single_use(x):
            return False
        if isinstance(link, ConvLink):
            return not link.options.pad
        # Batch norm of a convolution in another number of dimensions is an error, which is the module's to give.
        last = match.links[-1]
        if isinstance(last, ConvLink):
            conv = self.modules[".".join(last.path)]
            dimensions = {"1d": 1, "2d": 2, "3d": 3}.get(type(module).__name__[-2:])
            if dimensions not in (None, len(last.options.stride)):
                self.refused[".".join(link.path)] = "it is a batch norm over another dimension"
                return False
            if conv.weight.device != self._device(module, conv.weight.device):
                self.refused[".".join(link.path)] = "it and its convolution are on two devices"
                return False
            if conv.out_channels != module.num_features:
                self.refused[".".join(link.path)] = "it has not the channels of its convolution"
                return False
        return True

    @staticmethod
    def _device(module: nn.Module, default: torch.device) -> torch.device:
        return next((t.device for t in (*module.parameters(), *module.buffers())), default)

    def _new(self, x: fx.Node, link: ConvLink | NormLink) -> Match:
        gated = x.op in ("call_function", "call_method") and x.target in _MUL and single_use(x)
        if gated and isinstance(link, ConvLink) and not link.options.pad and not x.kwargs:
            a, b = (*x.args, None)[:2]
            factors = isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b
            target = self.writes.get(x)
            if factors and (target is None or (single_use(target) and self._is_own(target))):
                return Match(_unexpanded(a, b), nodes=[x], gate=_unexpanded(b, a))
        return Match(x)

    def _is_own(self, node: fx.Node) -> bool:
        """Whether a node's memory is made by it, or by a chain that ends in it."""
        if node in self.open:
            return True
        return node.op == "call_module" and self._is_fresh(node)

    def _activate(self, node: fx.Node, activation: str) -> None:
        x = node.args[0] if node.args else node.kwargs.get("input")
        match = self.open.get(x)
        if match is None or not single_use(x) or not match.takes_activation():
            return
        del self.open[x]
        if activation == "none":
            match.nodes.append(node)
        else:
            match.activate(node, activation)
        self.open[node] = match

    def _visit_add(self, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return
        candidates = []
        for this, other in (node.args, node.args[::-1]):
            match = self.open.get(this)
            if match is None or match.residual is not None or not match.takes_activation():
                continue
            if this is other or not single_use(this):
                continue
            # What it writes to must be nobody else's.
            if self.writes.get(node) is other and not (single_use(other) and self._is_own(other)):
                continue
            candidates.append((len(match.links), match, this, other))
        if not candidates:
            return
        _, match, this, other = max(candidates, key=lambda c: c[0])
        del self.open[this]
        match.residual = other
        match.nodes.append(node)
        self.open[node] = match

    @staticmethod
    def _function_activation(node: fx.Node) -> str | None:
        """The activation that a call of a function is, as ``F.leaky_relu(x, 0.2)``."""
        target, kwargs = node.target, {k: v for k, v in node.kwargs.items() if k != "inplace"}
        first = node.args[0] if node.args else kwargs.pop("input", None)
        if not isinstance(first, fx.Node):
            return None
        rest = [a for a in node.args[1:] if not isinstance(a, bool)]
        if target in _ACTIVATIONS:
            return None if rest or kwargs else _ACTIVATIONS[target]
        slope = rest[0] if rest else None
        if target in (F.leaky_relu, F.leaky_relu_):
            slope = kwargs.get("negative_slope", 0.01 if slope is None else slope)
            return f"leaky_relu({float(slope)})" if isinstance(slope, (int, float)) else None
        if target in (F.elu, F.elu_):
            alpha = kwargs.get("alpha", 1.0 if slope is None else slope)
            return f"elu({float(alpha)})" if isinstance(alpha, (int, float)) else None
        if target is F.gelu:
            approximate = kwargs.get("approximate", slope or "none")
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
        if target in (F.hardtanh, F.hardtanh_):
            low, high = (*rest, -1.0, 1.0)[:2] if len(rest) != 1 else (rest[0], 1.0)
            low, high = kwargs.get("min_val", low), kwargs.get("max_val", high)
            return "relu6" if (low, high) == (0, 6) else None
        return None

    # ------------------------------------------------------------------------------- what would be wrong

    def _is_undisturbed(self, match: Match) -> bool:
        """Whether nothing that a chain reads is written to before it runs, which is where it ends; nor, where eager
        would not have saved it, afterwards."""
        own = set(match.nodes)
        first, last = self.order[match.nodes[0]], self.order[match.end]
        read = {self._storage(n) for n in match.inputs()}
        residual = self._storage(match.residual) if match.residual is not None else None
        for node, target in self.writes.items():
            if node in own:
                continue
            storage = self._storage(target)
            between = storage in read and first < self.order[node] < last
            behind = storage is residual and self.order[node] > last
            if between or behind:
                for link in match.links:
                    self.refused[".".join(link.path)] = f"{node.name} writes to what it reads"
                return False
        return True

    # -------------------------------------------------------------------------------- virtual concatenation

    def _concatenate(self) -> None:
        """Chains that read a concatenation of channels read its parts, where nobody else reads the whole."""
        virtual: dict[fx.Node, list[fx.Node] | fx.Node] = {}
        heads = {m.input: m for m in self.matches if isinstance(m.input, fx.Node) and not m.gate}
        by_input: dict[fx.Node, list[Match]] = {}
        for match in self.matches:
            if match.gate is None and isinstance(match.input, fx.Node):
                by_input.setdefault(match.input, []).append(match)

        def only_chains_read(cat: fx.Node) -> bool:
            return all(
                isinstance(self._parts(user), list)
                or any(m.nodes[0] is user and m.residual is not cat for m in by_input.get(cat, ()))
                for user in cat.users
            )

        for node in reversed(list(self.graph.nodes)):
            parts = self._parts(node)
            if parts is None or not only_chains_read(node):
                continue
            nodes = parts if isinstance(parts, list) else [parts]
            if any(
                self._storage(t) is self._storage(p) and self.order[w] > self.order[p]
                for w, t in self.writes.items()
                for p in nodes
            ):
                continue
            virtual[node] = parts
        for node in self.graph.nodes:  # concatenations of concatenations
            if isinstance(self._parts(node), list):
                node.update_arg(0, self._flattened(node, virtual))
        for cat in [n for n in heads if n in virtual]:
            for match in by_input[cat]:
                match.input = self._flattened(cat, virtual)
                match.concatenates = True

    def _parts(self, node: fx.Node) -> list[fx.Node] | fx.Node | None:
        if node.op != "call_function" or node.target not in _CAT:
            return None
        arguments = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
        if set(arguments) != {"tensors", "dim"} or arguments["dim"] != 1:
            return None
        parts = arguments["tensors"]
        if isinstance(parts, (list, tuple)):
            return list(parts) if all(isinstance(p, fx.Node) for p in parts) else None
        return parts if isinstance(parts, fx.Node) else None

    def _flattened(self, cat: fx.Node, virtual: dict[fx.Node, Any]) -> Any:
        parts = virtual.get(cat, self._parts(cat))
        if isinstance(parts, fx.Node):
            return parts
        flat: list[fx.Node] = []
        for part in parts:
            inner = self._flattened(part, virtual) if part in virtual else part
            if isinstance(inner, list):
                flat += inner
            else:
                flat.append(part)
        return flat

    # ------------------------------------------------------------------------------------------- report

    def _explain_the_rest(self) -> None:
        """A reason for every batch norm that is in no chain."""
        fused = {link.path for m in self.matches for link in m.links}
        self.refused = {p: r for p, r in self.refused.items() if tuple(p.split(".")) not in fused}
        for node in self.graph.nodes:
            if node.op != "call_module" or path_of(node) in fused:
                continue
            if isinstance(self.modules[node.target], BATCH_NORMS):
                reason = "it has neither a convolution nor an activation beside it"
                self.refused.setdefault(node.target, reason)


def rewrite(graph: fx.Graph, matches: Iterable[Match]) -> list[Chain]:
    """Puts a call of ``chain_0``, ``chain_1`` … in the place of each match. Returns the chains."""
    matches = list(matches)
    readers: dict[fx.Node, int] = {}  # of the statistics of a part
    for match in matches:
        if _reads_statistics(match):
            for part in match.input:
                readers[part] = readers.get(part, 0) + 1
    shares = any(count > 1 for count in readers.values())
    statistics = None
    if shares:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            statistics = graph.call_function(dict)
    chains = []
    for match in matches:
        kwargs: dict[str, Any] = {}
        if match.residual is not None:
            kwargs["residual"] = match.residual
        if match.gate is not None:
            kwargs["gate"] = match.gate
        if statistics is not None and _reads_statistics(match):
            kwargs["statistics"] = statistics
            kwargs["keys"] = tuple(part.name for part in match.input)
        if match.concatenates and isinstance(match.input, fx.Node):
            match.input.meta["is_list"] = True
        with graph.inserting_before(match.end):
            call = graph.create_node(
                "call_module", f"{CALL}{len(chains)}", (match.input,), kwargs, name="chain"
            )
        match.end.replace_all_uses_with(call)
        for other in matches:  # later ones may read the node that goes
            _replace_inputs(other, match.end, call)
        modules = tuple(node.target for node in match.nodes if node.op == "call_module")
        joined = match.residual is not None
        chains.append(
            Chain(tuple(match.links), match.gate is not None, modules=modules, joined=joined)
        )
        for node in reversed(match.nodes):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.target in _CAT and not node.users:
            graph.erase_node(node)
    return chains


CALL = "fusedconvbn_chain_"


def _reads_statistics(match: Match) -> bool:
    return (
        match.concatenates
        and isinstance(match.input, list)
        and isinstance(match.links[0], NormLink)
    )


def _replace_inputs(match: Match, old: fx.Node, new: fx.Node) -> None:
    if isinstance(match.input, list):
        match.input = [new if n is old else n for n in match.input]
    elif match.input is old:
        match.input = new
    match.gate = new if match.gate is old else match.gate
    match.residual = new if match.residual is old else match.residual
