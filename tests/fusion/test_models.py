"""Networks that nobody here wrote: each is fused whole, and stays the same network."""

import copy
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import MODELS, SMALL, tensors_of

import fusedconvbn

pytestmark = pytest.mark.independent


def train(model, x, steps=5):
    """Losses of a few steps, and the gradients of the first; dropout and stochastic depth draw the
    same numbers in every call. The steps are small, since training on a handful of values a channel
    amplifies rounding a millionfold."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    losses, gradients = [], {}
    for step in range(steps):
        torch.manual_seed(step)
        loss = 0
        for scores in tensors_of(model(x)):
            targets = torch.arange(scores[:, 0].numel()).view_as(scores[:, 0]) % scores.shape[1]
            loss = loss + F.cross_entropy(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def assert_same(ours, theirs, tolerance=1e-8):
    """Relative to the largest value of each tensor, and, for what is 0 but for rounding, to one."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name].double() - value.double()).abs().max()
        assert difference <= tolerance * max(value.double().abs().max(), 1e-2), name


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=() if name in SMALL else pytest.mark.slow)
        for name, memory in zip(MODELS, cycle(("auto", "min")), strict=False)
    ],
)
def test_the_same_network(name, memory):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model, x = model.double(), x.double()
    fused = fusedconvbn.fuse(copy.deepcopy(model), x, memory=memory, inplace=True)
    report = fusedconvbn.explain(model, x, memory=memory)
    assert report.fused_pairs == report.pairs > 0
    assert not report.untraceable and not report.refused
    assert report.norms == sum(isinstance(m, _BatchNorm) for m in model.modules())

    (losses, gradients), (eager_losses, eager_gradients) = train(fused, x), train(model, x)
    assert losses == pytest.approx(eager_losses, rel=1e-8)
    assert_same(gradients, eager_gradients)
    assert_same(fused.state_dict(), model.state_dict())
    with torch.no_grad():
        ours, theirs = tensors_of(fused.eval()(x)), tensors_of(model.eval()(x))
    assert_same(dict(enumerate(ours)), dict(enumerate(theirs)))

    back = fusedconvbn.unfuse(fused)
    assert type(back) is type(model)
    assert [n for n, _ in back.named_modules()] == [n for n, _ in model.named_modules()]
    with torch.no_grad():
        again = tensors_of(back(x))
    assert_same(dict(enumerate(again)), dict(enumerate(tensors_of(model(x)))))


def test_parameters_stay_the_same_objects():
    model, x = MODELS["resnet18"]()
    fused = fusedconvbn.fuse(model, x)
    assert fused is not model and isinstance(fused, type(model))
    for (name, p), (other, q) in zip(
        model.named_parameters(), fused.named_parameters(), strict=True
    ):
        assert name == other and p is q
    for (name, p), (other, q) in zip(model.named_buffers(), fused.named_buffers(), strict=True):
        assert name == other and p is q
    assert not fusedconvbn.is_fused(model)
    assert fusedconvbn.fuse(model, inplace=True) is model and fusedconvbn.is_fused(model)
    assert isinstance(model.layer1[0].conv1, nn.Conv2d)
