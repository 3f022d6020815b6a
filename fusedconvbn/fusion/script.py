"""A fused model for TorchScript: a module of two captured graphs, for training and evaluation, with
the model's own parameters and buffers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _format_target
from torch.fx.graph_module import _forward_from_src
from torch.utils import _pytree as pytree

from .capture import captured, groups_of, paths_of
from .copies import copied, copy_of
from .graph import Graph


class NotScriptable(Exception):
    """TorchScript cannot express a model's graphs; the original forward is scripted instead."""


def scriptable(model: Any) -> nn.Module:
    """What ``torch.jit.script`` compiles for a fused model: its graphs; or the original model,
    where it was fused without example inputs or TorchScript cannot express its graphs."""
    fusion = model._fusion
    if fusion.example is None:
        reason = "torch.jit.script finds its graph only if fuse was given example_inputs"
    else:
        try:
            with model._plain() as plain:
                return _static(plain, fusion)
        except NotScriptable as error:
            reason = f"torch.jit.script got its original forward, as {error}"
    fusion.warn_once(reason)
    with model._plain() as plain:
        original: nn.Module = plain.__class__.__new__(plain.__class__)
        original.__dict__.update(plain.__dict__)
    return original


def _static(model: nn.Module, fusion: Any) -> nn.Module:
    args, kwargs = fusion.example
    if kwargs or not all(isinstance(t, Tensor) for t in args):
        raise NotScriptable("it takes tensors by position alone")
    static = _bare(model)
    names = [f"input_{i}" for i in range(len(args))]
    source = [f"def forward(self, {', '.join(f'{name}: torch.Tensor' for name in names)}):"]
    for mode in (True, False):
        graph, given, result = _captured(model, fusion, args, mode, names)
        name = f"_{'train' if mode else 'eval'}_graph"
        static.add_module(name, graph)
        source += [f"    {'if self.training' if mode else 'else'}:"]
        source += [f"        out = self.{name}({', '.join(given)})", f"        return {result}"]
    forward = _forward_from_src("\n".join(source) + "\n", {"torch": torch})
    static.__class__ = type(type(model).__name__, (nn.Module,), {"forward": forward})
    return static


def _bare(model: nn.Module) -> nn.Module:
    """Plain ``nn.Module`` objects with the parameters and buffers of a model under the same
    names."""
    bares: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        bare = bares[module] = nn.Module()
        bare._parameters, bare._buffers = dict(module._parameters), dict(module._buffers)
        bare._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        bare.training = module.training
    for module, bare in bares.items():
        bare._modules = {name: child and bares[child] for name, child in module._modules.items()}
    return bares[model]


def _captured(
    model: nn.Module, fusion: Any, args: Sequence[Tensor], mode: bool, names: Sequence[str]
) -> tuple[fx.GraphModule, list[str], str]:
    """The graph of a mode, the expressions of its arguments, and the expression of the model's
    result."""
    # A copy, as side effects of the forward change it.
    other, _ = copied(model, (), copy_of, "torch.jit.script captures one")
    if other.training != mode:
        other.train(mode)
    inputs = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in args
    ]
    found: list[tuple[fx.GraphModule, list[Any]]] = []
    outputs: list[Tensor] = []

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        found.append((module, list(example_inputs)))
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        outputs.extend(torch.empty(0) for _ in output.args[0])
        return lambda *_: tuple(outputs)

    try:
        for t in inputs:
            for d in range(t.dim()):
                torch._dynamo.maybe_mark_dynamic(t, d)
        result = captured(backend, whole=True)(other, "0", fusion.forward, tuple(inputs), {})
    except torch._dynamo.exc.TorchDynamoException as error:  # a graph break, or the model's error
        mode_name = "training" if mode else "evaluation"
        reason = str(error).splitlines()[0]
        raise NotScriptable(f"there is no one graph of it in {mode_name}: {reason}") from error
    if len(found) != 1:
        raise NotScriptable("it computes nothing with tensors")
    module, example_inputs = found[0]
    tensors = dict(zip(names, inputs, strict=True))
    tensors |= {
        _format_target("self", name): t
        for name, t in (*other.named_parameters(), *other.named_buffers())
    }
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    given = [
        _given(node, t, tensors, placeholders, example_inputs)
        for node, t in zip(placeholders, example_inputs, strict=True)
    ]
    graph = Graph.of(module, example_inputs, paths_of(other), groups_of(other), measured=False)
    graph.save(fusion.plan.of(graph.maps, graph.device))
    for node in graph.module.graph.nodes:
        node.type = None
        if node.op == "placeholder" and isinstance(node.meta.get("example_value"), torch.SymInt):
            node.type = int
    _write_out_floats(graph.module.graph)
    names_of = {id(t): f"out[{i}]" for i, t in enumerate(outputs)}
    return fx.GraphModule({}, graph.module.graph), given, _written(result, names_of)


def _write_out_floats(graph: fx.Graph) -> None:
    """Writes infinity and NaN as ``float("inf")`` and so on, as TorchScript has no names for
    them."""
    for node in list(graph.nodes):

        def written(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return graph.call_function(float, (str(value),))
            return value

        with graph.inserting_before(node):
            node.args = pytree.tree_map(written, node.args)


def _given(
    node: fx.Node,
    example: Any,
    tensors: Mapping[str, Tensor],
    placeholders: Sequence[fx.Node],
    example_inputs: Sequence[Any],
) -> str:
    """The expression of a placeholder of the graph: an input of the model, a parameter, or a size
    of one of these."""
    if isinstance(example, Tensor):
        for name, t in tensors.items():
            if t is example:
                return name
    if isinstance(example, torch.SymInt):
        for other, t in zip(placeholders, example_inputs, strict=True):
            if isinstance(t, Tensor):
                for d, size in enumerate(other.meta["example_value"].shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == example.node.expr:
                        return f"{_given(other, t, tensors, (), ())}.size({d})"
    raise NotScriptable(f"its graph reads {node.name}, which is neither an input nor a parameter")


def _written(result: Any, names_of: Mapping[int, str]) -> str:
    """The expression of the model's result, given those of its tensors by their ids."""
    if id(result) in names_of:
        return names_of[id(result)]
    if isinstance(result, Mapping):
        return "{" + ", ".join(f"{k!r}: {_written(v, names_of)}" for k, v in result.items()) + "}"
    if isinstance(result, (tuple, list)):
        inner = ", ".join(_written(v, names_of) for v in result)
        return f"[{inner}]" if isinstance(result, list) else f"({inner},)"
    if result is None or isinstance(result, (bool, int, float, str)):
        return repr(result)
    raise NotScriptable(f"its result has a {type(result).__name__} in it")
