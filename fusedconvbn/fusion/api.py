"""Whole models: one call fuses a model, another restores the original."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from ..options import refuse_lazy
from . import cuda_libraries
from .copies import M, copied
from .optimizers import OPTIMIZERS, Optimizer, optimizer_bytes
from .plan import Memory, Peak, Plan, parse_memory

if TYPE_CHECKING:
    from .find import Findings


def fuse(
    model: M,
    example_inputs: Any = None,
    *,
    memory: float | int | str = "auto",
    inplace: bool = False,
    calibrate: bool = False,
    optimizer: Optimizer = "adam",
) -> M:
    r"""The same network with less memory: its convolutions, batch norms and activations run as
    chains, which save some of their feature maps for backward and recompute the others.

    TorchDynamo, the front end of ``torch.compile``, captures what the model's ``forward`` computes.
    These patterns are found in the captured graphs, whether they are written with modules,
    subclasses of them, functions or methods:

    - convolution → batch norm → activation, with a residual that is added before the activation,
      and batch norm → activation → convolution, continued as long as each map has a single reader;
    - concatenations in front of them, of which only the parts are saved;
    - products with one value per sample and channel, as in squeeze-and-excitation.

    Everything else stays as it is; :func:`fusedconvbn.explain` says why it was not fused.

    Parameters, buffers, ``state_dict`` keys, modules and hooks stay. The model gets a subclass of
    its class, of the same name, whose ``forward`` runs the captured graphs. Each call checks the
    assumptions of the captured graphs (modes, attributes, shapes, hooks inside). Where one has
    changed, the model is captured again, which takes seconds. Side effects of the forward happen in
    every call.

    Args:
        model: not changed unless ``inplace``.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, of the size
            in which the model will be trained. The model is captured, and the plan is made, with
            their shapes. The model does not run, unless the graph breaks where it needs values:
            then a copy of it does. Without ``example_inputs`` the first call does all this.
        memory: what may be saved for backward. A float, or a string like ``"40%"``, is a fraction
            of what eager saves for ``example_inputs``; an int of at least 1000, or a string like
            ``"6GiB"``, is a number of bytes; the plan is the fastest one within this budget. Below
            what ``"min"`` saves, whole parts of the model run again in backward, and save their
            inputs alone; such a plan needs no more memory at its peak than ``"min"``. A string like
            ``"peak 12GiB"`` is a budget for all that is live at any moment of a step: parameters,
            buffers, inputs, gradients, the state of the optimizer, and what forward and backward
            need. On CUDA a plan for any of these runs each convolution, to measure cuDNN's
            workspaces, and resets CUDA's peak statistics.
            ``"min"`` recomputes every inner map of the chains.
            ``"auto"`` recomputes as many maps as it takes to come down to 0.53 of eager's bytes, or
            all of them if that is not enough; on CPU it begins with the maps that are nearly free
            to recompute, and recomputes these below 0.53, too.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and
            buffers.
        calibrate: measure on the model's device how long recomputing each map takes, instead of
            estimating it from FLOPs and bytes. Needs ``example_inputs``.
        optimizer: whose state a peak has to hold: ``"sgd"`` (with momentum), ``"adam"``,
            ``"adamw"``, or ``"none"``; without weight decay.

    Returns:
        The fused model, of a subclass of its class. ``print`` and :func:`fusedconvbn.is_fused` show
        that it is fused.

    Raises:
        ValueError: ``memory`` breaks the rule above, needs ``example_inputs``, or is less than the
            least that is possible; the message says how much that is.
        TypeError: ``model`` is scripted, no module, or cannot be copied and ``inplace`` is off.

    Warns:
        UserWarning: nothing was fused, or memory does not fall; and later, once, if a call of the
            model runs unfused.

    Example:
        >>> example = torch.randn(64, 3, 224, 224)
        >>> model = fusedconvbn.fuse(torchvision.models.resnet50(), example, memory="auto")
        >>> model(images).sum().backward()
    """
    asked = checked(model, example_inputs, memory, calibrate)
    model = uncompiled(model)
    budget = with_static(asked, model, example_inputs, optimizer)
    plan, example = Plan(budget), None
    from .find import find  # imports TorchDynamo, which takes as long as torch itself
    from .model import fused

    if example_inputs is not None:
        found = find(model, *args_and_kwargs(example_inputs), budget, calibrate)
        plan, example = found.plan, _stand_ins(example_inputs)
        _warn_if_useless(type(model).__name__, found)
    return fused(unfuse(model, inplace=inplace), plan, example)


def unfuse(model: M, *, inplace: bool = False) -> M:
    """The model as it was before :func:`fuse`: it, and every module inside, runs its own
    ``forward`` again.

    Args:
        model: a fused model, or a model with fused models inside.
        inplace: change ``model``; otherwise the result is a copy that shares its parameters and
            buffers.

    Returns:
        The model, of its own class.

    Raises:
        TypeError: the model's class was replaced after it was fused, as by ``fully_shard``.
    """
    model = model if inplace else _sharing_copy(model)
    for module in model.modules():
        if hasattr(type(module), "_fusion"):
            if "_fusion" not in vars(type(module)):
                raise TypeError(
                    "unfuse: expected a model as fuse returned it, got a "
                    f"{type(module).__name__} whose class was replaced since; unfuse it before "
                    "fully_shard"
                )
            fusion: Any = module._fusion
            fusion.take_off(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether a model was fused by :func:`fuse`."""
    return hasattr(type(model), "_fusion")


def checked(model: nn.Module, example_inputs: Any, memory: Any, calibrate: bool) -> Memory:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "fuse: expected model to be an nn.Module that is not scripted, got "
            f"{type(model).__name__}"
        )
    for name, module in model.named_modules():
        refuse_lazy("fuse", f"{name or 'model'!r}", module)
    budget = parse_memory(memory)
    if example_inputs is None and (calibrate or not isinstance(budget, str)):
        what = "calibrate=True" if calibrate else f"memory={budget!r}"
        raise ValueError(f"fuse: expected example_inputs with {what}, got None")
    return budget


def with_static(memory: Memory, model: nn.Module, example_inputs: Any, optimizer: str) -> Memory:
    """A peak that knows what a step needs all the time."""
    if optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise ValueError(f"fuse: expected optimizer to be one of {known}, got {optimizer!r}")
    if not isinstance(memory, Peak):
        return memory
    inputs = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor)]
    on_cuda = any(t.is_cuda for t in inputs)
    states, in_step = optimizer_bytes(optimizer, model.parameters(), on_cuda)
    held = states + sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *inputs))
    if on_cuda:
        held += cuda_libraries.always_held() + int(cuda_libraries.UNSPLIT * memory.nbytes)
    return Peak(memory.nbytes, held, held + in_step)


def uncompiled(model: M) -> M:
    """The model inside the result of ``torch.compile``, since a compiled model cannot be
    captured."""
    inside: M = getattr(model, "_orig_mod", model)
    return inside


def _sharing_copy(model: M) -> M:
    return copied(model, (), lambda t: t, "inplace=True makes no copy")[0]


def args_and_kwargs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, from a tensor, a sequence of positional or a mapping of keyword
    ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _stand_ins(example_inputs: Any) -> Any:
    """The arguments of a call, with tensors that have no data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map_only(Tensor, mode.from_tensor, args_and_kwargs(example_inputs))


def _warn_if_useless(name: str, found: "Findings") -> None:
    if found.unfused:
        warnings.warn(f"fuse: nothing of {name} is fused, {found.unfused}", stacklevel=3)
    elif found.saved > 0.95 * found.eager:
        share = found.saved / max(found.eager, 1)
        warnings.warn(
            f"fuse: {name} saves {share:.2f} of eager's bytes for these inputs; "
            "fusedconvbn.explain says where they are",
            stacklevel=3,
        )
