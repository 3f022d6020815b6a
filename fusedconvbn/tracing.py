"""The forward of a module as a graph, with what the graph takes for granted.

Symbolic tracing runs Python with stand-ins for tensors, and so bakes in whatever does not depend on them. What is baked in
is recorded as a :class:`Guards`, which are looked at in every call; what cannot be guarded is not traced.
"""

import inspect
import operator
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .links import BATCH_NORMS, CONVOLUTIONS, submodule

_ROOT = "m"  # where the traced module hangs below the root that fx sees
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_SIMPLE = (bool, int, float, str, type(None))


class Untraceable(Exception):
    """Why a forward cannot be a graph."""


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _options(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its forward may have read as plain Python values."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name != "training" and (type(value) in _SIMPLE or _is_tuple_of_simple(value))
    }


def _is_tuple_of_simple(value: Any) -> bool:
    return type(value) is tuple and all(type(v) in _SIMPLE for v in value)


@dataclass
class Guards:
    """What has to hold for a graph to be the forward of its module.

    Attributes:
        modules: of each module whose forward is part of the graph its path, its class and its plain attributes. It must have
            no hooks, which would not be run.
        training: paths and values of the `training` flags that decided a branch.
    """

    modules: list[tuple[tuple[str, ...], type, dict[str, Any]]] = field(default_factory=list)
    training: list[tuple[tuple[str, ...], bool]] = field(default_factory=list)

    def add(self, path: tuple[str, ...], module: nn.Module, options: bool = True) -> None:
        self.modules.append((path, type(module), _options(module) if options else {}))

    def hold(self, owner: nn.Module) -> bool:
        try:
            return all(
                submodule(owner, path).training == value for path, value in self.training
            ) and all(
                self._holds(path, submodule(owner, path), kind, options)
                for path, kind, options in self.modules
            )
        except (KeyError, AttributeError):  # a module is no longer there
            return False

    @staticmethod
    def _holds(
        path: tuple[str, ...], module: nn.Module, kind: type, options: dict[str, Any]
    ) -> bool:
        if path and has_hooks(module):  # those of the owner are run by its __call__
            return False
        if type(module) is not kind and not _interchangeable(type(module), kind):
            return False
        attributes = module.__dict__
        return all(attributes[name] == value for name, value in options.items())


def _interchangeable(a: type, b: type) -> bool:
    """A batch norm may become a synchronised one, or the other way round."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return a in norms and b in norms and nn.SyncBatchNorm in (a, b)


@dataclass
class Trace:
    graph: fx.Graph  # its targets are paths below the module
    guards: Guards
    positional: int  # arguments without a default; the others have theirs


class _Flag(int):
    """A module's `training` while it is traced: as an argument it is read at every call, as a condition it is a guard."""

    path: str
    reads: dict[str, bool]

    def __bool__(self) -> bool:
        self.reads[self.path] = int(self) != 0
        return int(self) != 0

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("get_attr", f"{self.path}.training", (), {})


def _in_place(operation: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    def call(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return call


class _Value(fx.Proxy):
    """Records ``x += y`` as what it is; fx makes ``x = x + y`` of it."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)


class _Map(_Value):
    """Passes for a tensor where a forward asks for one."""

    _is_param = False

    @property
    def __class__(self) -> type:
        return torch.Tensor

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, leaves: set[nn.Module], shallow: bool) -> None:
        super().__init__(autowrap_modules=())
        self.leaves = leaves
        self.shallow = shallow
        self.inlined: dict[str, nn.Module] = {}
        self.running: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        is_map = node.op in ("placeholder", "call_module")
        return (_Map if is_map else _Value)(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.shallow or m in self.leaves or is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.inlined[path] = m
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()  # stays where an error came from
        return result

    def create_arg(self, a: Any) -> Any:
        if type(a) in (_Map, _Value) or isinstance(a, fx.proxy.Attribute):
            return a.node
        if type(a) is OrderedDict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise Untraceable(f"it makes a {type(a).__name__}")
        return super().create_arg(a)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as it is: torch's own, a fused layer, what is scripted, or has hooks or a forward that
    somebody else put there."""
    if isinstance(module, (torch.jit.ScriptModule, *CONVOLUTIONS, *BATCH_NORMS)):
        return True
    if has_hooks(module):
        return True
    if "forward" in module.__dict__ and not getattr(module.forward, "is_fused", False):
        return True
    home = type(module).__module__
    if home.startswith("fusedconvbn"):
        return True
    return home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


def _required(forward: Callable[..., Any]) -> int:
    """The number of arguments without a default.

    Raises:
        Untraceable: some must be given by keyword.
    """
    count = 0
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"its argument {parameter.name} is keyword-only")
    if count == 0:
        raise Untraceable("it has no argument that must be given")
    return count


def _root_of(module: nn.Module, count: int) -> nn.Module:
    """A module whose forward has `count` arguments and runs that of `module`, without its hooks."""
    names = ", ".join(f"x{i}" for i in range(count))
    scope: dict[str, Any] = {"original": type(module).forward}
    exec(f"def forward(self, {names}):\n    return original(self.{_ROOT}, {names})", scope)
    root = type("Root", (nn.Module,), {"forward": scope["forward"]})()
    root._modules[_ROOT] = module
    return root


@contextmanager
def _random_numbers() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether any were drawn; they come again afterwards."""
    numpy = sys.modules.get("numpy")

    def states() -> list[Any]:
        found = [random.getstate(), torch.get_rng_state().tolist()]
        return [*found, str(numpy.random.get_state())] if numpy else found

    python, numpys = random.getstate(), numpy.random.get_state() if numpy else None
    before = states()
    with torch.random.fork_rng():
        yield lambda: states() != before
    random.setstate(python)
    if numpy:
        numpy.random.set_state(numpys)


@contextmanager
def _flags(module: nn.Module, training: bool | None) -> Iterator[dict[str, bool]]:
    """Puts a :class:`_Flag` in the place of every `training`; yields the reads."""
    reads: dict[str, bool] = {}
    before = [(m, m.training) for m in module.modules()]
    for path, m in module.named_modules(prefix=_ROOT):
        flag = _Flag(m.training if training is None else training)
        flag.path, flag.reads = path, reads
        m.__dict__["training"] = flag
    try:
        yield reads
    finally:
        for m, value in before:
            m.__dict__["training"] = value


@contextmanager
def _original_forwards(module: nn.Module) -> Iterator[None]:
    """Fused forwards below are out of the way: what is traced is what they stand for."""
    fused = [m for m in module.modules() if getattr(m.__dict__.get("forward"), "is_fused", False)]
    forwards = [m.__dict__.pop("forward") for m in fused]
    try:
        yield
    finally:
        for m, forward in zip(fused, forwards, strict=True):
            m.__dict__["forward"] = forward


def trace(module: nn.Module, training: bool | None = None, shallow: bool = False) -> Trace:
    """The graph of a module's forward, through all submodules whose forward can be traced too.

    Args:
        module: not changed.
        training: the mode in which all its modules are taken to be; that in which they are when None.
        shallow: call submodules as they are.

    Raises:
        Untraceable: its own forward cannot be a graph; the message says why.
    """
    forward = type(module).forward
    count = _required(forward)
    leaves: set[nn.Module] = set()
    while True:
        tracer = _Tracer(leaves, shallow)
        options = {m: _options(m) for m in module.modules()}
        with (
            _random_numbers() as drawn,
            _original_forwards(module),
            _flags(module, training) as reads,
            torch.no_grad(),
        ):
            try:
                graph = tracer.trace(_root_of(module, count))
                failed = None
            except Exception as error:
                failed = (tracer.running[-1] if tracer.running else module, error)
            draws = drawn()
        changed = [m for m, before in options.items() if _options(m) != before]
        for m in changed:
            m.__dict__.update(options[m])
        if failed is None and changed:
            raise Untraceable("it changes an attribute of a module")
        if failed is None and draws:
            raise Untraceable("it draws random numbers that depend on no input")
        if failed is None:
            constants = [n for n in graph.nodes if "_tensor_constant" in str(n.target)]
            if constants:
                raise Untraceable("it makes a tensor that depends on no input")
            break
        culprit, error = failed
        if culprit is module or culprit in leaves or is_leaf(culprit):
            raise Untraceable(str(error).split("\n")[0]) from error
        leaves.add(culprit)

    guards = Guards()
    guards.add((), module)
    for path, inlined in tracer.inlined.items():
        guards.add(_below_root(path), inlined)
    guards.training = [(_below_root(path), value) for path, value in reads.items()]
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = ".".join(_below_root(node.target))
    return Trace(graph, guards, count)


def _below_root(target: str) -> tuple[str, ...]:
    return tuple(target.split(".")[1:])


def function_of(graph: fx.Graph, scope: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The source of a graph as ``forward(self, …)``, and its globals, to which those in `scope` are added."""
    code = graph.python_code("self")
    return code.src, {**code.globals, **scope}


def compiled(source: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function of a source that :func:`function_of` made."""
    names: dict[str, Any] = dict(scope)
    exec(compile(source, "<fusedconvbn>", "exec"), names)
    return names["forward"]


def picklable(scope: dict[str, Any]) -> dict[str, Any]:
    """Globals with the names of Python's modules in their place."""
    return {
        name: _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value
        for name, value in scope.items()
    }


def unpickled(scope: dict[str, Any]) -> dict[str, Any]:
    return {
        name: sys.modules.get(value.name) or __import__(value.name, fromlist=["_"])
        if isinstance(value, _ModuleName)
        else value
        for name, value in scope.items()
    }


@dataclass(frozen=True)
class _ModuleName:
    name: str
