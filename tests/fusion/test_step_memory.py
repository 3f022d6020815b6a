"""`step_memory` foretells what a training step of a captured graph takes, from stand-ins."""

import copy
import functools
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import MODELS

import fusedconvbn
from fusedconvbn.fusion import chain_stand_in, cuda_libraries
from fusedconvbn.fusion.capture import capture_whole, paths_of
from fusedconvbn.fusion.checkpoints import run_checkpoints
from fusedconvbn.fusion.graph import Graph
from fusedconvbn.fusion.model import original_forward
from fusedconvbn.fusion.plan import Plan
from fusedconvbn.fusion.step import step_memory

ROOT = Path(__file__).parents[2]
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
FLOAT, HALF = torch.float32, torch.bfloat16


def block(channels, width, stride=1, activation=nn.ReLU, groups=1):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        activation(),
        nn.Conv2d(width, width, 3, 1, 1, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    )


class Residual(nn.Module):
    """A sum whose activation is computed again from the residual, and one whose gradients two
    readers share."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = block(3, 32), block(32, 32), block(32, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.silu(self.second(x) + x)
        x = F.relu(self.third(x) + x)
        return self.last(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excitation between depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.first = block(3, 48, 2, nn.SiLU, groups=48)
        self.down, self.up = nn.Conv2d(48, 12, 1), nn.Conv2d(12, 48, 1)
        self.second = nn.Sequential(nn.Conv2d(48, 32, 1, bias=False), nn.BatchNorm2d(32))

    def forward(self, x):
        x = F.silu(self.first(x))
        gate = torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.second(x * gate).mean((2, 3))


class Concatenated(nn.Module):
    """A dense block, pools and a PReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(32 + 16 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(32 + 16 * i, 16, 3, 1, 1) for i in range(3))
        self.prelu = nn.PReLU(80)

    def forward(self, x):
        parts = [F.max_pool2d(self.first(x), 3, 2, 1)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        return self.prelu(self.norms[-1](torch.cat(parts, 1))).mean((2, 3))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(block(3, 32), nn.ReLU())
        self.second = nn.Sequential(block(32, 64, 2), nn.Dropout(0.3), block(64, 64, 1, nn.GELU))

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=False).mean((2, 3))


SMALL = {kind.__name__: kind for kind in (Residual, Gated, Concatenated, Checkpointed)}


def autocast(dtype):
    return nullcontext() if dtype == FLOAT else torch.autocast("cpu", dtype)


@functools.lru_cache(1)
def captured(name, layout, dtype, size):
    """The captured graph of a network, unfused and fused, and its inputs."""
    torch.manual_seed(0)
    model, x = (SMALL[name](), torch.empty(4, 3, 1, 1)) if name in SMALL else MODELS[name]()
    model = model.train().to(memory_format=layout)
    x = torch.randn(len(x), 3, size, size).contiguous(memory_format=layout)
    with autocast(dtype):
        module, inputs = capture_whole(model, original_forward(model), (x,), {})
        eager = copy.deepcopy(module)
        run_checkpoints(eager)
        return eager, Graph.of(module, inputs, paths_of(model)), inputs


def planned(name, memory, layout, dtype, size):
    eager, graph, inputs = captured(name, layout, dtype, size)
    if memory == "eager":
        return eager, inputs
    plan = Plan(memory)
    figures = (graph.eager.saved, graph.least.saved, graph.step_flops, graph.device)
    plan.decide(graph.maps, *figures)
    graph.save(plan.of(graph.maps, graph.device))
    return graph.module, inputs


def measured(module, inputs, dtype):
    for t in inputs:
        if isinstance(t, torch.Tensor):
            t.grad = None
    with fusedconvbn.track_memory() as found:
        with autocast(dtype):
            loss = sum(t.sum() for t in tree_leaves(module(*inputs)))
        loss.backward()
    return found


def check(name, memory, layout, dtype, size):
    torch.set_num_threads(1)
    module, inputs = planned(name, memory, layout, dtype, size)
    with autocast(dtype):
        ours = step_memory(module, inputs)
    theirs = measured(module, inputs, dtype)
    assert ours.saved == pytest.approx(theirs.saved, rel=0.001)
    assert ours.end_of_forward == pytest.approx(theirs.end_of_forward, rel=0.01)
    assert ours.peak == pytest.approx(theirs.peak, rel=0.03)


MEMORIES = ("eager", "auto", "min", 1.0)
LAYOUTS = pytest.mark.parametrize("layout", (LAST, CONTIGUOUS), ids=("last", "contiguous"))
DTYPES = pytest.mark.parametrize("dtype", (FLOAT, HALF), ids=("float", "half"))


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, layout, dtype):
    for memory in MEMORIES:
        check(name, memory, layout, dtype, 64)


@pytest.mark.parametrize(
    "name, layout, dtype",
    [("resnet18", LAST, FLOAT), ("mobilenet_v2", LAST, HALF), ("shufflenet_v2_x1_0", LAST, FLOAT)],
)
def test_torchvision(name, layout, dtype):
    for memory in MEMORIES:
        check(name, memory, layout, dtype, 64)


TORCHVISION = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
    "vgg16_bn",
    "googlenet",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
)


@pytest.mark.slow
@pytest.mark.parametrize("size", (64, 128))
@LAYOUTS
@DTYPES
@pytest.mark.parametrize("name", TORCHVISION)
def test_more_of_torchvision(name, layout, dtype, size):
    for memory in MEMORIES:
        check(name, memory, layout, dtype, size)


def test_cheap_activations_are_those_of_the_kernels():
    source = (ROOT / "csrc/kernels/activation.h").read_text("utf-8")
    cheap = re.findall(r"struct (\w+) : Cheap", source)
    names = {re.sub(r"\B([A-Z])", r"_\1", name).lower() for name in cheap}
    assert set(chain_stand_in._CHEAP) == names - {"identity"} | {"none"}


def test_workspaces_on_cuda_are_measured_once(monkeypatch):
    """A convolution runs with real tensors of the same form, outside of the stand-ins' mode."""
    asked = []
    allocated = iter((40, 60) * 2)  # before a call, and after it
    for name, found in {
        "is_initialized": lambda: True,
        "memory_allocated": lambda _: next(allocated),
        "reset_peak_memory_stats": asked.append,
        "max_memory_allocated": lambda _: 170,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)

    def workspace(batch):
        x = torch.empty(batch, 3, 5, 6).contiguous(memory_format=LAST)
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        args = (x, torch.empty(4, 3, 1, 1), None, *options)
        return cuda_libraries.workspace(torch.ops.aten.convolution.default, args)

    with FakeTensorMode():
        assert workspace(2) == workspace(2) == workspace(7) == 170 - 60
    assert len(asked) == 2


def test_nothing_changes():
    """Neither the parameters and buffers, nor the random numbers."""
    module, inputs = planned("Checkpointed", "min", LAST, FLOAT, 32)
    before = copy.deepcopy(inputs)
    random = torch.get_rng_state()
    assert step_memory(module, inputs) == step_memory(module, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    for t, other in zip(inputs, before, strict=True):
        assert torch.equal(t, other) and (t.grad is None) == (other.grad is None)


def test_without_a_gradient():
    module, (_, x) = nn.Identity(), (None, torch.ones(2, 3))
    found = step_memory(torch.fx.symbolic_trace(module), [x])
    assert found.saved == 0
