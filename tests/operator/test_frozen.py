"""Frozen batch norm: bn in eval mode while the convolution trains."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, unfused
from torch import nn

import fusedconvbn
from fusedconvbn import FusedConvBN2d, conv_bn, track_memory
from fusedconvbn.activations import ACTIVATIONS, activation_module

SMALL = 16 << 10  # weights, folded weights and vectors


def fused(tensors, case, **more):
    return conv_bn(**tensors, **{**case.options, **more})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck(case):
    """Input, weight, bias, γ, β and residual; groups, transposed, 1-d and 3-d are among the
    cases."""
    tensors, running = case.tensors(), case.running()
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: fused(
            dict(zip(names, values, strict=True)), case, training=False, **running
        ),
        list(tensors.values()),
        fast_mode=True,
    )


FULL = Case((2, 4, 5, 6), (6, 2, 3, 2), bias=True, groups=2, residual=True, activation="silu")


@pytest.mark.parametrize(
    "needs_grad", ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")
)
def test_one_gradient_alone(needs_grad):
    options = {"training": False, **FULL.running()}
    alone = {n: t.detach().requires_grad_(n == needs_grad) for n, t in FULL.tensors().items()}
    results = [
        torch.autograd.grad(function(alone, FULL, **options).sin().sum(), alone[needs_grad])
        for function in (fused, unfused)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def frozen_layer(activation, **options):
    layer = FusedConvBN2d(8, 8, 3, padding=1, activation=activation, **options)
    layer.bn.eval()
    nn.init.uniform_(layer.bn.running_mean, -1, 1)
    nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    return layer


@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_input_is_kept(activation, residual):
    """And, for ReLU, the result, which whatever comes next keeps anyway; for other activations a
    residual."""
    layer, x = frozen_layer(activation), torch.randn(4, 8, 32, 24)
    shortcut = torch.randn(4, 8, 32, 24) if residual else None
    with track_memory() as memory:
        layer(x, shortcut)
    maps = {"none": 1, "relu": 2}.get(activation, 1 + residual)
    assert maps * x.nbytes <= memory.saved < maps * x.nbytes + SMALL

    with track_memory() as row:  # what comes next
        layer.conv(layer(x, shortcut))
    maps = {"none": 2, "relu": 2}.get(activation, 2 + residual)
    assert maps * x.nbytes <= row.saved < maps * x.nbytes + SMALL


@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutions_that_are_run(activation, residual):
    """One forward and its backward; one more to recompute the map, for an activation that needs
    it."""
    layer, x = frozen_layer(activation), torch.randn(2, 8, 6, 5, requires_grad=True)
    shortcut = torch.randn(2, 8, 6, 5) if residual else None

    def convolutions(function):
        with torch.profiler.profile() as profiler:
            result = function()
        names = [e.name for e in profiler.events()]
        return names.count("aten::convolution"), names.count("aten::convolution_backward"), result

    forward, _, out = convolutions(lambda: layer(x, shortcut))
    recomputed, backward, _ = convolutions(lambda: out.sum().backward())
    assert (forward, recomputed, backward) == (1, activation not in ("none", "relu"), 1)
    with torch.no_grad():
        assert convolutions(lambda: layer(x, shortcut))[:2] == (1, 0)


@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
def test_running_statistics_are_left_alone(activation):
    layer, x = frozen_layer(activation), torch.randn(4, 8, 7, 6)
    before = copy.deepcopy(layer.bn.state_dict())
    versions = [b._version for b in layer.bn.buffers()]
    layer(x).sum().backward()
    for name, value in before.items():
        assert torch.equal(layer.bn.state_dict()[name], value)
    assert [b._version for b in layer.bn.buffers()] == versions
    assert all(p.grad is not None for p in layer.parameters())


class Pairs(nn.Module):
    """Three pairs of which the first two have a frozen batch norm, one of them with untrained
    parameters too."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        torch.manual_seed(3)
        self.layers = nn.ModuleList(
            FusedConvBN2d(*channels, 3, padding=1, bias=True, activation=activation)
            for channels, activation in (((3, 5), "relu"), ((5, 4), "hardswish"), ((4, 4), "elu"))
        ).double()
        for layer in self.layers:
            nn.init.uniform_(layer.bn.running_var, 0.5, 2)

    def train(self, mode=True):
        super().train(mode)
        for layer in self.layers[:2]:
            layer.bn.eval()
        self.layers[1].bn.requires_grad_(False)
        return self

    def forward(self, x):
        for layer in self.layers:
            if self.fused:
                x = layer(x)
            else:
                x = activation_module(layer.activation)(layer.bn(layer.conv(x)))
        return x


def test_a_model_with_some_batch_norms_frozen():
    x, results = torch.randn(4, 3, 7, 6, dtype=torch.float64), []
    for is_fused in (True, False):
        model = Pairs(is_fused).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x + step), torch.ones(4, 4, 7, 6, dtype=torch.float64))
            loss.backward()
            optimizer.step()
        assert [int(layer.bn.num_batches_tracked) for layer in model.layers] == [0, 0, 4]
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
def test_a_trained_frozen_layer_folds_to_what_it_computes(activation):
    layer, x = frozen_layer(activation, bias=True).double(), torch.randn(2, 8, 6, 5).double()
    torch.testing.assert_close(fusedconvbn.fold(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_frozen_and_thawed_again():
    """The mode is that of bn at each call, and backward that of the call it belongs to."""
    layer, x = frozen_layer("silu").double(), torch.randn(4, 8, 5, 6).double()
    params = list(layer.parameters())
    expected = torch.autograd.grad(F.silu(layer.bn(layer.conv(x))).sum(), params)
    frozen = layer(x).sum()
    layer.train()
    layer(x)
    torch.testing.assert_close(torch.autograd.grad(frozen, params), expected)
