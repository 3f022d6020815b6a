"""What the tests of whole models share: blocks, and the comparison of a fused model with the same
one unfused."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedconvbn import explain, fuse, is_fused, track_memory
from fusedconvbn.fusion.capture import capture_whole, paths_of
from fusedconvbn.fusion.graph import Graph


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **{"bias": False, **options})


def unit(i: int = 8, o: int = 8) -> nn.Sequential:
    return nn.Sequential(conv(i, o), nn.BatchNorm2d(o), nn.ReLU())


def pair() -> dict[str, nn.Module]:
    return {"conv": conv(8, 8), "bn": nn.BatchNorm2d(8)}


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 8, 7, 6))


class Block(nn.Module):
    """A bottleneck with a functional activation and an addition in place."""

    def __init__(self, channels: int = 8, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return out.relu_()


def model(forward: Any, **modules: nn.Module) -> nn.Module:
    """A model of some modules, of a class of its own with `forward`."""
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def small() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(240, 4)
    )


def picture() -> Tensor:
    return torch.randn(4, 3, 6, 5)


def tensors_of(result: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]


def chains(model: nn.Module, *inputs: Any, **options: Any) -> list[str]:
    return [chain.name for chain in explain(model, inputs, **options).chains]


def code(model: nn.Module, *inputs: Any) -> str:
    """What a fused model runs."""
    whole = capture_whole(model, type(model).forward, inputs, {})
    assert isinstance(whole, tuple), whole
    return Graph.of(*whole, paths_of(model)).module.code


def saved(model: nn.Module, *inputs: Any) -> int:
    torch.manual_seed(5)
    model(*inputs)  # is captured
    with track_memory() as memory:
        result = model(*inputs)
        del result
    return memory.saved


def doubled(value: Any) -> Any:
    def double(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return torch.utils._pytree.tree_map_only(Tensor, double, value)


def step(model: nn.Module, inputs: Any) -> list[Tensor | None]:
    """What a step of training leaves: results, gradients, buffers."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(3)
    random.seed(3)
    leaves = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), inputs
    )
    results = tensors_of(model(*leaves))
    total = sum((t * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sum() for t in results)
    total.backward()
    given = [t.grad for t in torch.utils._pytree.tree_leaves(leaves) if isinstance(t, Tensor)]
    buffers = [b.clone().double() for b in model.buffers()]
    return [*(t.detach() for t in results), *given, *(p.grad for p in model.parameters()), *buffers]


def same(
    made: nn.Module,
    *inputs: Any,
    train: bool = True,
    fused: nn.Module | None = None,
    less: bool = True,
    tolerance: float = 1e-9,
    **options: Any,
) -> nn.Module:
    """Fuses a copy and compares a step in float64, and what it saves for backward. Returns the
    fused one.

    Args:
        made: the model.
        inputs: its arguments.
        train: in which mode.
        fused: a copy that is fused already.
        less: whether fewer bytes are saved than in eager.
        tolerance: relative, and absolute.
        options: of fuse.
    """
    made, inputs = made.double().train(train), doubled(inputs)
    if fused is None:
        fused = fuse(copy.deepcopy(made), inputs, inplace=True, **options)
    assert is_fused(fused)
    for ours, theirs in zip(step(fused, inputs), step(made, inputs), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if train:
        ours, theirs = saved(fused, *inputs), saved(made, *inputs)
        report = explain(made, inputs, memory=fused._fusion.plan.memory)
        assert ours == pytest.approx(report.saved, rel=0.01)
        assert theirs == pytest.approx(report.eager, rel=0.01)
        assert not less or ours < theirs
    return fused
