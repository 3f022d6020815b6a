"""A fused model: an object of a subclass of the model's class, whose call runs captured graphs that
have chains in them."""

import copy
import copyreg
import inspect
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import forward_ad

from .calls import is_training
from .capture import captured, global_hooks, groups_of, is_capturing, paths_of
from .copies import M
from .curve import Curve
from .graph import Graph
from .plan import Plan

_STATIC = 8  # captures of each graph of a model, before sizes become dynamic


class Fused:
    """The first base of a fused model's class; the second is the model's own class (as
    `torch.distributed.fsdp.fully_shard` does it). Hooks on the model run around its forward, and
    what the forward calls is captured. Copies and pickles are of the model's own class."""

    _fusion: "Fusion"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does nothing. A user's own may require arguments or register each subclass."""

    @contextmanager
    def _plain(self) -> Iterator[nn.Module]:
        """The model as it was before it was fused, inside the context."""
        fused, forward = type(self), vars(self).get("forward")
        self._fusion.take_off(self)
        try:
            yield self
        finally:
            self.__class__ = fused
            vars(self).pop("forward", None)
            if forward is not None:
                self.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        with self._plain() as plain:
            other = copy.deepcopy(plain, memo)
        return fused(other, self._fusion.plan, self._fusion.example)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._plain() as plain:
            create, args, *rest = plain.__reduce_ex__(protocol)
        if create is copyreg.__newobj__:  # pickle requires that the object has this very class
            create, args = copyreg._reconstructor, (args[0], object, None)
        return (create, args, *rest)

    def _replicate_for_data_parallel(self) -> nn.Module:
        self._fusion.warn_once(
            "torch.nn.DataParallel creates new replicas for each step; use DistributedDataParallel"
        )
        with self._plain() as plain:
            return plain._replicate_for_data_parallel()

    def __prepare_scriptable__(self) -> nn.Module:
        from .script import scriptable

        return scriptable(self)

    def _get_name(self) -> str:
        return f"Fused[{super()._get_name()}]"


class Fusion:
    """The state of a fused model, held by its class.

    Attributes:
        plan: which maps are saved; copies share it.
        kind: the model's own class.
        own: the model's own ``forward``, where the object has one besides its class.
        captures, runs: how many graphs were captured, and how many have run.
        example: stand-ins for the example inputs, with which :mod:`fusedconvbn.fusion.script`
            captures.
    """

    def __init__(self, model: nn.Module, plan: Plan, example: Any = None) -> None:
        self.plan = plan
        self.example = example
        self.kind = type(model)
        self.own = model.__dict__.get("forward")
        self.runs = self.captures = 0
        self._warned = False
        self._version, self._failed = 0, set[tuple[int, bool, bool]]()
        self._methods, self._hooks = _methods(model), global_hooks()
        self._captured: Callable[..., Any] | None = None
        self._static = False
        self._model = weakref.ref(model)
        self.region = _Region(self)

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        if self.own is None:
            return self.kind.forward(model, *args, **kwargs)
        if isinstance(self.own, types.MethodType):
            return self.own.__func__(model, *args, **kwargs)
        return self.own(*args, **kwargs)

    def take_off(self, model: nn.Module) -> None:
        """Gives the model its own class and ``forward``. A ``forward`` that it was given after it
        was fused stays, as it wraps one of the two."""
        model.__class__ = self.kind
        if self.own is not None and "forward" not in vars(model):
            bound = isinstance(self.own, types.MethodType)
            model.__dict__["forward"] = (
                types.MethodType(self.own.__func__, model) if bound else self.own
            )

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_traced():
            return self.forward(model, *args, **kwargs)
        # With dynamic sizes Dynamo would use one graph for modules of different sizes, but a plan
        # for several graphs is made for static sizes. A model that is called with many sizes gets
        # dynamic ones.
        static = self.plan.parts > 0 and self.captures <= _STATIC * self.plan.parts
        if static != self._static or self._captured is None:
            self._static = static
            self._captured = captured(self._backend, dynamic=False if static else None)
        if (methods := self._methods_changed()) or self._hooks != global_hooks():
            for method in self._methods[2] if methods else ():
                torch._dynamo.eval_frame.reset_code(method.__code__)
            self._methods, self._hooks = _methods(model), global_hooks()
            self._version += 1
        state = (self._version, model.training, torch.is_grad_enabled())
        if state in self._failed:
            return self.forward(model, *args, **kwargs)
        runs = self.runs
        try:
            result = self._captured(model, str(self._version), self.forward, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.runs > runs:
                raise
            # Raises the error if it is the model's own.
            result = self.forward(model, *args, **kwargs)
            self._failed.add(state)
            what = " ".join(str(error).split("\n")[:2])
            self.warn_once(f"TorchDynamo cannot capture it: {what}")
            return result
        if self.runs == runs:
            self.warn_once(_why_eager())
        return result

    def run_traced(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward that Dynamo reads where the model is a part of what it captures."""
        if is_capturing() or torch.compiler.is_exporting():
            return self.forward(model, *args, **kwargs)
        return self.region(lambda *a, **k: self.forward(model, *a, **k), *args, **kwargs)

    def warn_once(self, reason: str) -> None:
        """Warns, once, that the model is run unfused."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"a fused {self.kind.__name__} runs unfused: {reason}", stacklevel=4)

    def _methods_changed(self) -> bool:
        """Whether a method of one of the model's classes was replaced, which Dynamo does not
        guard."""
        namespaces, names, functions = self._methods
        try:
            return [*map(operator.getitem, namespaces, names)] != functions
        except KeyError:
            return True

    def _backend(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        model = self._model()
        self.captures += 1
        run = fused_graph(
            module, example_inputs, self.plan, paths_of(model), groups_of(model)
        ).module.forward

        def count_and_run(*args: Any) -> Any:
            self.runs += 1
            return run(*args)

        return count_and_run

    def rewrite_region(self, body: fx.GraphModule) -> None:
        model = self._model()
        graph = Graph.of(body, (), paths_of(model), groups_of(model), measured=False, compiled=True)
        graph.save(self.plan.of(graph.maps, graph.device))


class _Region(torch._ops.HigherOrderOperator):
    """The body of a fused model, as one operator in a graph that the user's ``torch.compile``
    captured. Dynamo captures the body by the rules of its operator `wrap`. The body is rewritten
    when it is first run or traced."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__("fusedconvbn_region")
        self.__name__, self.__module__ = "wrap", __name__  # by which a graph's code finds it
        self.fusion = fusion

    def __call__(self, body: fx.GraphModule, *args: Any) -> Any:
        if not body.meta.get("fused"):
            self.fusion.rewrite_region(body)
            body.meta["fused"] = True
        return body(*args)


def fused_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    plan: Plan,
    paths: dict[str, str],
    groups: dict[str, str] | None = None,
    compiled: bool = False,
) -> Graph:
    """A captured graph with its chains, which saves what the plan says. Maps that the plan does not
    know yet are decided about first."""
    training = torch.is_grad_enabled() and any(is_training(node) for node in module.graph.nodes)
    measured = training and not plan.complete
    graph = Graph.of(module, example_inputs, paths, groups, measured=measured, compiled=compiled)
    unknown = [m for m in graph.maps if m.name not in plan.known]
    if measured and unknown:
        # The backend of torch.compile plans each graph alone; fuse has planned all of them before.
        whole = not plan.known and not compiled
        plan.decide(
            unknown,
            graph.eager.saved,
            graph.least.saved,
            graph.step_flops,
            graph.device,
            Curve.of(graph) if whole and plan.has_budget else None,
        )
    graph.save(plan.of(graph.maps, graph.device))
    if torch.is_grad_enabled() and not compiled:
        graph.cut(plan.segments)
    return graph


def fused(model: M, plan: Plan, example: Any = None) -> M:
    """Turns a model into a fused one, in place."""
    fusion = Fusion(model, plan, example)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, kind):  # it was unfused or copied, with a wrapper around this
            return fusion.forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return fusion.run_traced(self, args, kwargs)
        return fusion.run(self, args, kwargs)

    forward.__signature__ = inspect.signature(fusion.kind.forward)
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(fusion.kind, name) for name in names}
    kind = type(fusion.kind)(
        fusion.kind.__name__,
        (Fused, fusion.kind),
        {**namespace, "forward": forward, "_fusion": fusion},
    )
    model.__dict__.pop("forward", None)
    model.__class__ = kind
    return model


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """A model's own forward, as a function of the model."""
    return model._fusion.forward if isinstance(model, Fused) else _own_forward


def _own_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model.forward(*args, **kwargs)


def _is_traced() -> bool:
    """Whether the original forward must run: for a tracer that reads it (torch.jit.trace, torch.fx,
    torch.export), or for transforms with which chains save no memory (torch.func, forward-mode
    AD)."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    )


def _methods(model: nn.Module) -> tuple[list[Any], list[str], list[Any]]:
    """The methods of a model's classes: their namespaces, their names, and the functions."""
    found: dict[tuple[type, str], Any] = {}
    for kind in {type(module) for module in model.modules()}:
        for base in kind.__mro__:
            own = not base.__module__.startswith("torch.")
            for name, f in vars(base).items():
                if isinstance(f, types.FunctionType) and (own or name == "forward"):
                    found[base, name] = f
    return [vars(kind) for kind, _ in found], [name for _, name in found], list(found.values())


def _why_eager() -> str:
    if torch._dynamo.config.disable:
        return "TORCHDYNAMO_DISABLE is set, and its graph cannot be captured"
    stance = torch._dynamo.eval_frame._stance.stance
    if stance in ("force_eager", "eager_on_recompile"):
        return f"torch.compiler.set_stance({stance!r}) keeps its graph from being captured"
    return (
        "TorchDynamo captured no graph of it, as it cannot read its forward or has captured it too "
        "often; TORCH_LOGS=graph_breaks,recompiles says why, and torch._dynamo.reset() lets it try "
        "again"
    )
