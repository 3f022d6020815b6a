"""What a step of a model would save for backward, and how large its maps are, without running it."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from .links import BATCH_NORMS, CONVOLUTIONS, Chain
from .memory import saved_storages
from .tracing import attributes_restored


@dataclass
class Profile:
    """One forward pass.

    Attributes:
        saved: bytes that autograd saves for backward.
        by_module: the part of them that was first saved while a module ran, the innermost one, by its path.
        values: values in the result of each convolution and batch norm, by path.
        nbytes: their bytes.
        shapes, inputs: their shapes, and those of what the modules were given.
        behind: path of a batch norm, and of the convolution whose result it was given.
        calls: of each convolution and batch norm.
        fake: whether no real tensor was computed.
    """

    saved: int = 0
    by_module: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    fake: bool = True


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a sequence of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def profile(model: nn.Module, example_inputs: Any, fused: bool = False) -> Profile:
    """Runs a forward pass in training mode (in the modes its modules are in, if the model itself is in it) with stand-ins for tensors, or, where the model needs real ones (a branch depends on
    their values), with copies of its buffers and its random state as it was."""
    args, kwargs = arguments(example_inputs)
    modes = {m: m.training for m in model.modules()}
    if not model.training:
        model.train()
    try:
        try:
            return _fake_profile(model, args, kwargs, fused)
        except Exception:
            return _real_profile(model, args, kwargs, fused)
    finally:
        for m, mode in modes.items():
            m.training = mode


def _fake_profile(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fused: bool
) -> Profile:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(fake, (args, kwargs))
        with _exchanged(model, fake, fake), _recorded(model, Profile(), fused) as found:
            # The result is held until the count is done: what is saved has to live.
            result = model(*args, **kwargs)
            del result
    return found


def _real_profile(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fused: bool
) -> Profile:
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    args, kwargs = copy.deepcopy((args, kwargs))
    with (
        torch.random.fork_rng(devices=devices),
        _exchanged(model, lambda parameter: parameter, Tensor.clone),
        _recorded(model, Profile(fake=False), fused) as found,
    ):
        result = model(*args, **kwargs)
        del result
    return found


@contextmanager
def _exchanged(
    model: nn.Module, of_parameter: Callable[[Any], Any], of_buffer: Callable[[Any], Any]
) -> Iterator[None]:
    """Puts others in the place of a model's parameters and buffers, one for each however often it is there. Everything is
    as it was afterwards, attributes that a forward sets too."""
    made: dict[int, Any] = {}

    def exchange(tensors: dict[str, Any], by: Callable[[Any], Any]) -> None:
        for name, t in tensors.items():
            if t is not None:
                if id(t) not in made:
                    made[id(t)] = by(t)
                tensors[name] = made[id(t)]

    with attributes_restored(model):
        for module in model.modules():
            exchange(module._parameters, of_parameter)
            exchange(module._buffers, of_buffer)
        yield


def _normalise_alone(bn: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    """What a synchronised batch norm saves, without other processes, and on CPU too."""
    running = (bn.running_mean, bn.running_var)
    return F.batch_norm(input, *running, bn.weight, bn.bias, bn.training, 0.0, bn.eps)


@contextmanager
def _recorded(model: nn.Module, found: Profile, fused: bool) -> Iterator[Profile]:
    """Hooks on modules, which would keep fused forwards from running, are only put on others; in a fused model the chains
    are known by their names."""
    running = [""]
    names = {m: name for name, m in model.named_modules()}
    call, synchronised = Chain.__call__, nn.SyncBatchNorm.forward

    def run_chain(chain: Chain, owner: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        running.append(".".join(filter(None, (names.get(owner, ""), chain.name))))
        try:
            return call(chain, owner, *args, **kwargs)
        finally:
            running.pop()

    made: dict[int, tuple[Any, str]] = {}  # results of convolutions, which live no longer for it

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[module])
        if isinstance(module, BATCH_NORMS) and args and id(args[0]) in made:
            result, path = made[id(args[0])]
            if result() is args[0]:
                found.behind[names[module]] = path

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS)) and isinstance(output, Tensor):
            name = names[module]
            found.calls[name] = found.calls.get(name, 0) + 1
            if isinstance(module, CONVOLUTIONS):
                made[id(output)] = weakref.ref(output), name
            found.values[name] = output.numel()
            found.nbytes[name] = output.numel() * output.element_size()
            found.shapes[name] = tuple(output.shape)
            if args and isinstance(args[0], Tensor):
                found.inputs[name] = tuple(args[0].shape)

    def saw(nbytes: int) -> None:
        found.by_module[running[-1]] = found.by_module.get(running[-1], 0) + nbytes

    hooks = []
    for module in () if fused else names:
        hooks += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        Chain.__call__, nn.SyncBatchNorm.forward = run_chain, _normalise_alone
        with torch.enable_grad(), saved_storages(device_of(model), saw) as storages:
            yield found
            found.saved = sum(storages.values())
    finally:
        Chain.__call__, nn.SyncBatchNorm.forward = call, synchronised
        for hook in hooks:
            hook.remove()
