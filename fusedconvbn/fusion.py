"""Whole models: one call that fuses, one that gives the original back."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .calibration import measured_seconds
from .forward import fused_forward
from .links import BATCH_NORMS, Chain, ConvOptions, refuse_lazy
from .matching import reason_against
from .planning import (
    AUTO_FRACTION,
    InnerMap,
    OutOfReach,
    best,
    flops_per_value,
    frugal,
    parse_memory,
    price_per_byte,
    seconds_per_value,
)
from .profiling import Profile, device_of, profile
from .tracing import Untraceable, is_leaf
from .watching import PairedForward, pair_up


@dataclass
class Findings:
    """What was found in a model and decided about it; :class:`fusedconvbn.report.Report` says it in words.

    Attributes:
        chains: those that run, with the path of the module that owns them.
        refused: path of a module, and why it is in no chain.
        untraceable: path of a module, and why its own forward runs as it is.
        pairs: batch norms right behind a convolution, as (convolution, batch norm).
        eager, least: what the model saves as it was, and with no inner map kept.
        maps: the inner maps of the chains.
        kept: those that are kept.
    """

    chains: list[tuple[str, Chain]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    eager: Profile | None = None
    least: Profile | None = None
    maps: list[InnerMap] = field(default_factory=list)
    kept: frozenset[str] = frozenset()


def fuse(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    memory: float | int | str = "auto",
    inplace: bool = False,
    calibrate: bool = False,
) -> nn.Module:
    r"""The same network with less memory: its convolutions, batch norms and activations run as chains that keep some of their
    feature maps for backward and remake the others.

    Found are convolution → batch norm → activation, with a residual that is added before the activation, and batch norm →
    activation → convolution, across modules, in rows as long as each map has one reader; concatenations in front of
    them, whose parts alone are kept; and products with one value per sample and channel, as squeeze-and-excitation has.
    Modules whose ``forward`` depends on values are run as they are, and those inside them are fused. What cannot be fused
    is left as it is; :func:`fusedconvbn.explain` says why.

    Parameters, buffers, ``state_dict`` keys and the modules themselves stay: each fused module has a ``forward`` of its own
    in its ``__dict__``, which looks at every call whether the module is still what it was (hooks on modules
    inside, exchanged children, changed options) and otherwise runs the original one. Train and eval mode, of the model
    or of one batch norm, SyncBatchNorm, momentum and eps are read at every call.

    Args:
        model: not changed unless ``inplace``.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the size in which the model will be
            trained. They are not computed with, only their shapes are, unless the model's control flow needs values.
        memory: what may be saved for backward. A float is a fraction of what eager saves for ``example_inputs``, an
            int or a string like ``"6GiB"`` bytes; the plan is the fastest one within. ``"min"`` keeps nothing that can be
            remade. ``"auto"`` gives up what is nearly free to remake, and more until 0.53 of eager's bytes are reached
            or nothing is left; without ``example_inputs`` the former alone.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and buffers.
        calibrate: measure on the model's device how long remaking each map takes, instead of estimating it from its FLOPs and
            bytes. Needs ``example_inputs``.

    Returns:
        The fused model, of the same class.

    Raises:
        ValueError: ``memory`` breaks the rule above, needs ``example_inputs``, or is less than what can be reached;
            the message says how much that is.
        TypeError: ``model`` is scripted, or no module.

    Example:
        >>> model = fusedconvbn.fuse(torchvision.models.resnet50(), torch.randn(64, 3, 224, 224), memory="auto")
        >>> model(images).sum().backward()
    """
    return fused_with_findings(model, example_inputs, memory, inplace, calibrate)[0]


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before :func:`fuse`: every module runs its own ``forward`` again.

    Args:
        model: with fused forwards anywhere in it.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and buffers.

    Returns:
        The model, of the same class.
    """
    model = model if inplace else _sharing_copy(model)
    for module, _ in list(_fused(model)):
        del module.__dict__["forward"], module.__dict__["__prepare_scriptable__"]
    return model


def fused_with_findings(
    model: nn.Module,
    example_inputs: Any,
    memory: float | int | str,
    inplace: bool,
    calibrate: bool,
) -> tuple[nn.Module, Findings]:
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
    model = model if inplace else _sharing_copy(model)
    before = [(module, forward) for module, forward in _fused(model)]
    try:
        unfuse(model, inplace=True)
        return model, _fuse(model, example_inputs, memory, calibrate)
    except BaseException:
        unfuse(model, inplace=True)
        for module, forward in before:
            _put(module, forward)
        raise


def _fuse(
    model: nn.Module, example_inputs: Any, memory: float | int | str, calibrate: bool
) -> Findings:
    found = Findings()
    if example_inputs is not None:
        found.eager = profile(model, example_inputs)
    _install(model, found)
    if found.eager is not None and found.untraceable:
        _pair_up(model, found)
    device = device_of(model).type
    modules = dict(model.named_modules())
    found.maps = _inner_maps(found.chains, modules, found.eager, device)
    price = price_per_byte(device)
    if found.eager is None:
        found.kept = frozenset() if memory == "min" else best(found.maps, None, price)
    else:
        found.least = profile(model, example_inputs, fused=True)
        if calibrate:
            found.maps = measured_seconds(found.maps, model, found.eager)
        found.kept = _plan(found, memory, price, convolution_flops(found, modules))
    for path, chain in _all_chains(model):
        prefix = f"{path}." if path else ""
        local = {kept.removeprefix(prefix) for kept in found.kept if kept.startswith(prefix)}
        chain.plan(local)
    return found


def _plan(
    found: Findings, memory: float | int | str, price: float, step_flops: int
) -> frozenset[str]:
    if memory == "min":
        return frozenset()
    eager, least = found.eager.saved, found.least.saved
    if memory == "auto":
        return frugal(found.maps, max(int(AUTO_FRACTION * eager) - least, 0), price, step_flops)
    budget = int(memory * eager) if isinstance(memory, float) else memory
    if budget < least:
        raise OutOfReach(
            f"fuse: expected memory of at least {least} bytes ({least / eager:.3f} of the {eager} bytes that eager "
            f"saves for these inputs), the least that can be reached, got {memory!r}"
            + (f", which is {budget} bytes" if isinstance(memory, float) else "")
        )
    return best(found.maps, budget - least)


def _put(module: nn.Module, forward: Any) -> None:
    module.__dict__["forward"] = forward
    module.__dict__["__prepare_scriptable__"] = forward.scriptable


def _sharing_copy(model: nn.Module) -> nn.Module:
    # deepcopy takes what its memo has for an object as its copy
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _fused(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if getattr(forward, "is_fused", False):
            yield module, forward


def _all_chains(model: nn.Module) -> Iterator[tuple[str, Chain]]:
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if getattr(forward, "is_fused", False):
            for chain in forward.chains:
                yield ("" if isinstance(forward, PairedForward) else path), chain


def _install(model: nn.Module, found: Findings) -> None:
    """Gives every module that can be traced and has chains a fused forward, the inner ones first: they run where an
    outer one does not."""
    outermost: dict[str, Any] = {}
    for path, module in reversed(list(model.named_modules())):
        if is_leaf(module) or not any(isinstance(m, BATCH_NORMS) for m in module.modules()):
            continue
        if type(module).forward is nn.modules.module._forward_unimplemented:
            continue
        try:
            forward, analysis = fused_forward(module)
        except Untraceable as error:
            found.untraceable[path] = str(error)
            continue
        # Whatever it runs inline is its own affair now.
        inlined = {".".join(filter(None, (path, *p))) for p, *_ in analysis.variant.guards.modules}
        for other in [p for p in outermost if p in inlined]:
            del outermost[other]
        for other in inlined & found.untraceable.keys():
            del found.untraceable[other]
        outermost[path] = (module, forward, analysis)
        if forward is not None:
            _put(module, forward)
    seen = set()
    for path, (_, forward, analysis) in reversed(outermost.items()):
        prefix = f"{path}." if path else ""
        found.refused |= {prefix + p: reason for p, reason in analysis.refused.items()}
        found.pairs += [(prefix + a, prefix + b) for a, b in analysis.pairs]
        for chain in forward.chains if forward is not None else ():
            names = tuple(link.path for link in chain.links)
            if (path, names) not in seen:
                seen.add((path, names))
                found.chains.append((path, chain))


def _pair_up(model: nn.Module, found: Findings) -> None:
    """Pairs of which no traced forward runs either module, as the example run showed them."""
    modules = dict(model.named_modules())
    traced = {p for pair in found.pairs for p in pair} | set(found.refused)
    for owner, chain in found.chains:
        traced |= {".".join(filter(None, (owner, *link.path))) for link in chain.links}
    for bn_path, conv_path in found.eager.behind.items():
        if not traced.isdisjoint((bn_path, conv_path)):
            continue
        conv, bn = modules[conv_path], modules[bn_path]
        found.pairs.append((conv_path, bn_path))
        for path, module in ((conv_path, conv), (bn_path, bn)):
            if reason := reason_against(module, found.eager.calls[path]):
                found.refused[path] = reason
        if not found.refused.keys().isdisjoint((conv_path, bn_path)):
            continue
        if ConvOptions.of(conv).pad:
            found.refused[conv_path] = "its padding is not one that the operator does"
            continue
        postponing, paired = pair_up(conv_path, conv, bn_path, bn)
        _put(conv, postponing)
        _put(bn, paired)
        found.chains.append(("", paired.chain))


def _inner_maps(
    chains: list[tuple[str, Chain]],
    modules: dict[str, nn.Module],
    eager: Profile | None,
    device: str,
) -> list[InnerMap]:
    maps: dict[str, InnerMap] = {}
    for prefix, chain in chains:
        for local in chain.maps():
            path = ".".join(filter(None, (prefix, *local)))
            module = modules[path]
            values, nbytes = 1, 4
            if eager is not None:
                values, nbytes = eager.values.get(path, 0), eager.nbytes.get(path, 0)
            itemsize = nbytes // values if values else 4
            maps[path] = InnerMap(
                path,
                nbytes,
                int(flops_per_value(module) * values),
                seconds_per_value(module, itemsize, device) * values,
            )
    return list(maps.values())


def convolution_flops(found: Findings, modules: dict[str, nn.Module]) -> int:
    """Of a training step of the model as it was: each convolution's forward, and both its gradients."""
    return sum(
        3 * int(flops_per_value(modules[path]) * values)
        for path, values in found.eager.values.items()
    )
