"""Whole models: one call that fuses, one that gives the original back."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ..options import refuse_lazy
from .copies import copied
from .plan import Plan, parse_memory

if TYPE_CHECKING:
    from .find import Findings


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
            recomputed. ``"auto"`` gives up what it must until 0.53 of eager's bytes are reached or nothing is left; on CPU first
            what is nearly free to recompute, also below that.
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
    memory = checked(model, example_inputs, memory, calibrate)
    model = uncompiled(model)
    plan, example = Plan(memory), None
    from .find import find  # imports TorchDynamo, which takes as long as torch itself
    from .model import fused

    if example_inputs is not None:
        found = find(model, *args_and_kwargs(example_inputs), memory, calibrate)
        plan, example = found.plan, _stand_ins(example_inputs)
        _warn_if_useless(type(model).__name__, found)
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


def checked(
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


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` was given: a captured graph cannot be captured again."""
    return getattr(model, "_orig_mod", model)


def _sharing_copy(model: nn.Module) -> nn.Module:
    return copied(model, (), lambda t: t, "inplace=True makes no copy")[0]


def args_and_kwargs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a sequence of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _stand_ins(example_inputs: Any) -> Any:
    """The same without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map_only(Tensor, mode.from_tensor, args_and_kwargs(example_inputs))


def _warn_if_useless(name: str, found: "Findings") -> None:
    fused, norms = (
        sum(len(g.matches) for g in found.graphs),
        sum(g.norms * g.runs for g in found.graphs),
    )
    if not fused:
        none = "no captured graph of it runs one" if found.untraceable else "it runs no batch norm"
        what = f"none of its {norms} batch norms can be" if norms else none
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
