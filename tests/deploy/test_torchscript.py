"""Scripting, tracing, and a saved model in a process that imports the package and nothing else."""

import copy
import subprocess
import sys

import pytest
import torch
from cases import CASES
from deployed import ACTIVATIONS, Activations, Network
from torch import nn
from torch.testing import assert_close

import fusedconvbn
from fusedconvbn import FusedConvBN2d, conv_bn

FRESH_PROCESS = """
import sys, torch, fusedconvbn
model = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert torch.equal(model(x), expected)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = [p.detach().clone() for p in model.parameters()]
for _ in range(3):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
model.eval()
assert torch.isfinite(model(x)).all()
"""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = FusedConvBN2d(3, 8, 3, padding=1, activation="relu")
        self.second = FusedConvBN2d(8, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("how", ("script", "trace"))
def test_a_saved_model_trains_in_a_fresh_process(how, tmp_path):
    model, x = Model(), torch.randn(4, 3, 9, 8)
    saved = (
        torch.jit.script(model) if how == "script" else torch.jit.trace(model, x, check_trace=False)
    )
    saved.save(tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "model.pt", tmp_path / "data.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_scripted_call_of_the_operator():
    def function(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        out = torch.ops.fusedconvbn.conv_bn(x, w, bn_weight=g, padding=[1, 0], activation="relu")
        return torch.ops.fusedconvbn.conv_bn(out, w.transpose(0, 1), stride=1, eps=0.1)

    scripted = torch.jit.script(function)
    x, w, g = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 5, 4), (4, 3, 2, 2), (4,))
    )
    assert torch.equal(scripted(x, w, g), function(x, w, g))
    assert torch.autograd.gradcheck(scripted, (x, w, g), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_the_scripted_function(name):
    case = CASES[name]
    tensors = case.tensors()
    scripted = torch.jit.script(conv_bn)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in case.options.items()}
    names = list(tensors)

    def function(*values):
        return scripted(**dict(zip(names, values, strict=True)), **options)

    values = list(tensors.values())
    assert torch.equal(function(*values), conv_bn(**tensors, **options))
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_scripted_running_statistics():
    case = CASES["2d bias"]
    tensors, running, expected = case.tensors(), case.running(), case.running()
    scripted = torch.jit.script(conv_bn)
    for _ in range(4):  # the profiling executor settles
        out = scripted(**tensors, **running)
        assert torch.equal(out, conv_bn(**tensors, **expected))
    assert all(torch.equal(running[n], expected[n]) for n in running)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_scripted_layer_takes_every_activation_and_a_residual(activation):
    layer = FusedConvBN2d(3, 3, 3, padding=1, activation=activation, momentum=None).double()
    eager, scripted = layer, torch.jit.script(copy.deepcopy(layer))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    for residual in (None, x.detach() * 2, x):
        out, expected = scripted(x, residual), eager(x, residual)
        assert_close(out, expected)
        grads = [torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)]
        assert_close(*grads)
    assert_close(dict(scripted.state_dict()), dict(eager.state_dict()))
    assert scripted.bn.num_batches_tracked == 3


def kinds(graph):
    return [node.kind() for node in graph.nodes()]


@pytest.mark.parametrize(
    ("network", "optimise"),
    [
        (Network, torch.jit.freeze),
        (Network, torch.jit.optimize_for_inference),
        (Activations, torch.jit.freeze),
    ],
)
def test_frozen_and_optimised_for_inference(network, optimise, tmp_path):
    model = network().eval()
    optimised = optimise(torch.jit.script(model))
    layers = len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert not list(optimised.parameters())  # they are constants of the graph
    assert kinds(optimised.graph).count("fusedconvbn::conv_bn") == layers
    optimised.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for batch in (2, 5):
        x = torch.randn(batch, 4 if network is Activations else 3, 7, 6)
        for _ in range(2):  # profiled, and as the executor then has it
            with torch.no_grad():
                assert_close(optimised(x), model(x))
                assert_close(loaded(x), model(x))


def test_a_folded_model_is_optimised_to_plain_convolutions():
    model, x = Network().eval(), torch.randn(2, 3, 7, 6)
    optimised = torch.jit.optimize_for_inference(
        torch.jit.script(fusedconvbn.fold(model, keep_signature=True))
    )
    assert "fusedconvbn::" not in str(optimised.graph)  # an operator
    for _ in range(2):
        with torch.no_grad():
            assert_close(optimised(x), model(x), rtol=1e-4, atol=1e-5)
