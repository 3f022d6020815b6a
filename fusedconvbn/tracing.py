"""The forward of a module as a graph, with what the graph takes for granted.

Symbolic tracing runs Python with stand-ins for tensors, and so bakes in whatever does not depend on them. What is baked in
is recorded as a :class:`Guards`, which are looked at in every call; what cannot be guarded is not traced.
"""

import copy
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
from torch.autograd.graph import saved_tensors_hooks

from .links import BATCH_NORMS, CONVOLUTIONS, submodule

_ROOT = "m"  # where the traced module hangs below the root that fx sees
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.Size)
_COLLECTIONS = (tuple, list, dict, set)


class Untraceable(Exception):
    """Why a forward cannot be a graph."""


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _options(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its forward may have read: the values of plain ones and of collections of them, and
    functions. The names of its submodules are among them."""
    options = {
        name: copy.copy(value)
        for name, value in module.__dict__.items()
        if name != "training" and not name.startswith("__") and _is_plain(value)
    }
    return {**options, _CHILDREN: tuple(module._modules)}


_CHILDREN = "_modules"


def _is_plain(value: Any) -> bool:
    if type(value) in _COLLECTIONS:
        return all(_is_plain(v) for v in value) and (
            type(value) is not dict or all(_is_plain(v) for v in value.values())
        )
    return type(value) in _SIMPLE or isinstance(
        value, (types.FunctionType, types.BuiltinFunctionType)
    )


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
        attributes = module.__dict__
        forward = attributes.get("forward")
        if path and forward is not None and not getattr(forward, "is_fused", False):
            return False
        if type(module) is not kind and not _interchangeable(type(module), kind):
            return False
        return all(
            (tuple(module._modules) if name == _CHILDREN else attributes[name]) == value
            for name, value in options.items()
        )


def _interchangeable(a: type, b: type) -> bool:
    """A batch norm may become a synchronised one, or the other way round; and `fully_shard` exchanges a module's class for
    one that has the same forward."""
    if len(a.__bases__) == 2 and a.__bases__[1] is b:
        return a.__bases__[0].__module__.startswith("torch.distributed.")
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return a in norms and b in norms and nn.SyncBatchNorm in (a, b)


@dataclass
class Trace:
    graph: fx.Graph  # its targets are paths below the module
    guards: Guards
    positional: int  # arguments without a default; the others have theirs


@dataclass(eq=False)
class _Flag:
    """A module's `training` while it is traced: as an argument it is read at every call; what else is made of it has it as a
    guard."""

    value: bool
    path: str
    reads: dict[str, bool]

    def read(self) -> bool:
        self.reads[self.path] = self.value
        return self.value

    def __bool__(self) -> bool:
        return self.read()

    def __hash__(self) -> int:
        return hash(self.read())

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("get_attr", f"{self.path}.training", (), {})


def _reading(operation: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(int(self.read()), operation)(*others)


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul"):
    setattr(_Flag, f"__{_name}__", _reading(f"__{_name}__"))
for _name in ("truediv", "rtruediv", "int", "float", "index", "invert", "and", "or", "xor", "neg"):
    setattr(_Flag, f"__{_name}__", _reading(f"__{_name}__"))


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
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)

    @property
    def __class__(self) -> type:
        """Is read by ``isinstance(x, …)``, whose answer would be baked in. The tracer's own code may ask."""
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if not asking.startswith(_LIBRARY):
            raise Untraceable("it asks of what class an argument or a result is")
        return _Value

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError


_LIBRARY = ("torch.fx", "torch.overrides", "torch.utils._pytree", "torch.nn", "fusedconvbn")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, leaves: set[nn.Module], shallow: bool) -> None:
        super().__init__(autowrap_modules=())
        self.leaves = leaves
        self.shallow = shallow
        self.modes = _modes()
        self.calls: dict[nn.Module, int] = {}
        self.inlined: dict[str, nn.Module] = {}
        self.running: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("it changes the grad mode or autocast")
        return super().create_node(*args, **kwargs)

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
            self.calls[m] = self.calls.get(m, 0) + 1
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()  # stays where an error came from
        return result

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value or isinstance(a, fx.proxy.Attribute):
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
        many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if many or parameter.default is not parameter.empty:
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


def _modes() -> tuple[Any, ...]:
    """What a context manager in a forward may change, and a graph does not know of."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(d) for d in devices),
        *(torch.get_autocast_dtype(d) for d in devices),
    )


@contextmanager
def _no_context_is_lost() -> Iterator[None]:
    """Refuses what would not leave a trace in the graph: functions with a backward of their own, hooks on saved tensors
    (as checkpoints have), and the question whether gradients are recorded."""
    own_apply, hooks = torch.autograd.Function.__dict__.get("apply"), saved_tensors_hooks.__enter__
    is_grad_enabled = torch.is_grad_enabled

    def refuse(*_: Any, **__: Any) -> None:
        raise Untraceable("it has an autograd.Function, or hooks on what is saved for backward")

    def asked() -> bool:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "fusedconvbn")):
            raise Untraceable("it asks whether gradients are recorded")
        return is_grad_enabled()

    torch.autograd.Function.apply = classmethod(refuse)
    saved_tensors_hooks.__enter__ = refuse
    torch.is_grad_enabled = asked
    try:
        yield
    finally:
        torch.is_grad_enabled = is_grad_enabled
        saved_tensors_hooks.__enter__ = hooks
        if own_apply is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = own_apply


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Puts every attribute of a module and those inside back as it was, the contents of lists and dicts too; yields a function
    that says whether any differs now."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    collections = [
        (value, copy.copy(value))
        for _, attributes in before
        for value in attributes.values()
        if type(value) in (list, dict, set) or isinstance(value, OrderedDict)
    ]

    def differs() -> bool:
        return any(
            m.__dict__.keys() != attributes.keys()
            or any(
                m.__dict__[name] is not value
                for name, value in attributes.items()
                if name != "training"
            )
            for m, attributes in before
        ) or any(not _same(value, content) for value, content in collections)

    try:
        yield differs
    finally:
        for m, attributes in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)
        for value, content in collections:
            if not _same(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)


def _same(a: Any, b: Any) -> bool:
    """Whether two collections have the same contents; tensors are not compared, but are or are not the same."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and b[key] is value for key, value in a.items())
    return a == b if isinstance(a, set) else all(x is y for x, y in zip(a, b, strict=True))


@contextmanager
def _flags(module: nn.Module, training: bool | None) -> Iterator[dict[str, bool]]:
    """Puts a :class:`_Flag` in the place of every `training`; yields the reads."""
    reads: dict[str, bool] = {}
    before = [(m, m.training) for m in module.modules()]
    for path, m in module.named_modules(prefix=_ROOT):
        m.__dict__["training"] = _Flag(m.training if training is None else training, path, reads)
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
        with (
            _random_numbers() as drawn,
            _original_forwards(module),
            attributes_restored(module) as changed,
            _flags(module, training) as reads,
            torch.enable_grad(),
            _no_context_is_lost(),
        ):
            tracer = _Tracer(leaves, shallow)
            try:
                graph = tracer.trace(_root_of(module, count))
                failed = None
            except Exception as error:
                failed = (tracer.running[-1] if tracer.running else module, error)
            draws = drawn()
            changes = changed() or any(type(m.training) is not _Flag for m in module.modules())
        if failed is None and changes:
            raise Untraceable("it changes an attribute of a module")
        if failed is None and draws:
            raise Untraceable("it draws random numbers that depend on no input")
        if failed is None:
            constants = [n for n in graph.nodes if "_tensor_constant" in str(n.target)]
            if constants:
                raise Untraceable("it makes a tensor that depends on no input")
            again = {m for m, calls in tracer.calls.items() if calls > 1}
            if not again:
                break
            leaves |= again  # a shared module: its own forward may be fused
            continue
        culprit, error = failed
        if culprit is module or culprit in leaves or is_leaf(culprit):
            raise Untraceable(str(error).split("\n")[0]) from error
        leaves.add(culprit)

    guards = Guards()
    guards.add((), module)
    inlined = {_below_root(path): m for path, m in tracer.inlined.items()}
    called = {_below_root(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    for name, m in module.named_modules():
        path = tuple(name.split(".")) if name else ()
        # What is not called may have been read: the children of a ModuleList, the options of a Dropout.
        read = path and not any(path[: n + 1] in called for n in range(len(path)))
        if path in inlined or read:
            guards.add(path, m)
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
