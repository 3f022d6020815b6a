"""Chains of `DTensor`s: each process runs a chain of replicated tensors as if they were plain
tensors."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._imports import when_imported
from .chain import Conv, Gate, Norm, Prelu, unpack

_KINDS = {Conv: "convolution", Norm: "batch norm", Gate: "gate", Prelu: "PReLU"}


def _named(
    tensors: Sequence[Tensor], links: Sequence[int], scalars: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a chain, each with its name in error messages."""
    input, chain = unpack(tensors, links, scalars)
    yield from (("input", t) for t in input)
    for i, link in enumerate(chain):
        for name in ("weight", "bias", "residual", "statistics"):
            if getattr(link, name, None) is not None:
                kind = _KINDS[type(link)]
                yield f"the {kind}'s {name} (link {i})", getattr(link, name)


def _replicated(t: Any) -> bool:
    return all(p.is_replicate() for p in t.placements)


def _check(named: Iterable[tuple[str, Tensor]]) -> None:
    from torch.distributed.tensor import DTensor

    meshes = set()
    for name, t in named:
        if not isinstance(t, DTensor):
            raise TypeError(
                f"conv_bn: expected all tensors to be DTensors where one is, got {name} that is "
                "not; distribute_tensor and distribute_module make replicated DTensors"
            )
        if not _replicated(t):  # would need collectives inside: halos, sums of statistics
            raise NotImplementedError(
                f"conv_bn: expected replicated DTensors, got {name} placed {t.placements}; "
                "redistribute it to Replicate()"
            )
        meshes.add(t.device_mesh)
        if len(meshes) > 1:
            raise ValueError(
                f"conv_bn: expected DTensors on one mesh, got {name} on {t.device_mesh}"
            )


@torch.no_grad()  # autograd has run already
def _run(func: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * mesh.ndim

    def local(t: Any) -> Any:
        whole = t if _replicated(t) else t.redistribute(placements=placements)
        return whole.to_local()

    def distributed(t: Tensor) -> Tensor:
        return DTensor.from_local(t, mesh, placements, run_check=False)

    args, kwargs = tree_map_only(DTensor, local, (args, kwargs))
    return tree_map_only(Tensor, distributed, func(*args, **kwargs))


def _forward(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    _check(_named(*args[:3]))
    return _run(func, args, kwargs, args[0][0].device_mesh)


def _unchecked(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """For a backward, whose tensors forward has checked and whose gradient may be a partial sum,
    and for a pool."""
    return _run(func, args, kwargs, args[0].device_mesh)


def _statistics(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    _check([("input", args[0])])
    return _run(func, args, kwargs, args[0].device_mesh)


def _register() -> None:
    from torch.distributed.tensor import DTensor

    rules = {
        "_chain_forward": _forward,
        "_chain_backward": _unchecked,
        "_channel_stats": _statistics,
        "_max_pool2d": _unchecked,
        "_max_pool2d_backward": _unchecked,
    }
    for name, rule in rules.items():
        with contextlib.suppress(RuntimeError):  # registered by an earlier import of this package
            torch.library.register_torch_dispatch(f"fusedconvbn::{name}", DTensor, rule)


def register() -> None:
    when_imported("torch.distributed.tensor", _register)
