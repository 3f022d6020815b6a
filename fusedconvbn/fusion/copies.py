"""Copies of models."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=nn.Module)


def copied(
    model: M, inputs: Any, of_tensor: Callable[[Tensor], Tensor], advice: str
) -> tuple[M, Any]:
    """A copy of a model and of its inputs, in which each tensor is replaced by `of_tensor` of it.
    The tensors of a model are its parameters, its buffers, and what hooks computed for the last
    call, as pruning does.

    Raises:
        TypeError: deepcopy fails; the message ends with `advice`.
    """
    memo: dict[int, Any] = {}

    def other(t: Tensor) -> Tensor:
        if id(t) not in memo:
            new = of_tensor(t)
            plain = isinstance(t, nn.Parameter) and type(new) is Tensor
            new = memo[id(t)] = nn.Parameter(new, t.requires_grad) if plain else new
            memo[id(new)] = new  # so that deepcopy does not copy it
        found: Tensor = memo[id(t)]
        return found

    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values(), *m.__dict__.values()):
            if isinstance(t, Tensor):
                other(t)
    inputs = pytree.tree_map_only(Tensor, other, inputs)
    try:
        return copy.deepcopy((model, inputs), memo)
    except Exception as error:
        raise TypeError(
            "fuse: expected a model that copy.deepcopy takes, got "
            f"{type(error).__name__}: {error}; {advice}"
        ) from error


def copy_of(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)
