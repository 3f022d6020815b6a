"""Which buffers a batch norm reads, updates and counts in: as nn.BatchNorm2d, in every state it can
be brought into."""

import copy
import itertools

import pytest
import torch
from torch import nn

import fusedconvbn
from fusedconvbn import FusedConvBN2d, FusedConvBNSequential

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
MISSING = ((), BUFFERS, BUFFERS[:2], BUFFERS[2:], BUFFERS[:1], BUFFERS[1:2])
STATES = list(itertools.product((True, False), (True, False), (0.3, None), MISSING))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 2, bias=True), nn.BatchNorm2d(4), nn.ReLU())


def bring(bn, training, track, momentum, missing):
    """A batch norm into a state."""
    bn.momentum, bn.track_running_stats = momentum, track
    for name in missing:
        setattr(bn, name, None)
    bn.train(training)


def layer(net, x):
    return FusedConvBN2d.from_modules(net[0], net[1], "relu")


def fused(net, x):
    model = fusedconvbn.fuse(net, x, inplace=True)
    assert fusedconvbn.is_fused(model)
    return model


def sequential(net, x):
    return FusedConvBNSequential(*net)


def traced(model, x):
    state = copy.deepcopy(model.state_dict())
    found = torch.jit.trace(model, x, check_trace=False)
    model.load_state_dict(state)
    return found


MAKERS = (layer, fused, sequential)
WAYS = (lambda model, x: model, lambda model, x: torch.jit.script(model), traced)


def buffers(bn):
    return {
        name: getattr(bn, name).clone() for name in BUFFERS if getattr(bn, name, None) is not None
    }


@pytest.mark.thin(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS, ids=("eager", "scripted", "traced"))
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_buffers_are_used_as_batch_norm_does(make, way, state):
    torch.manual_seed(0)
    x, plain = torch.randn(2, 3, 5, 4), Net()
    with torch.no_grad():
        plain[1].running_mean.normal_()
        plain[1].running_var.uniform_(0.5, 2)
        plain[1].num_batches_tracked.fill_(3)
    net = copy.deepcopy(plain)
    model = make(net, x)
    bring(net[1], *state), bring(plain[1], *state)
    training, track, _, missing = state
    one_sided = ("running_mean" in missing) != ("running_var" in missing)
    if one_sided and (track or not training):
        message = "" if make is fused else "both or neither"  # it gives eager's own error
        with pytest.raises((ValueError, RuntimeError, torch.jit.Error), match=message):
            way(model, x)(x)
        return
    model = way(model, x)
    bn = net[1]
    if isinstance(model, torch.jit.RecursiveScriptModule) and way is not traced:
        bn = next(m for m in model.modules() if hasattr(m, "running_mean"))  # a copy
    # torch.jit.trace sees a fused model's original forward, and makes a constant of the count.
    expected = traced(plain, x) if make is fused and way is traced else plain
    for _ in range(2):
        torch.testing.assert_close(model(x), expected(x))
    due, found = buffers(plain[1]), buffers(bn)
    assert found.keys() == due.keys()
    for name, t in due.items():
        torch.testing.assert_close(found[name], t, msg=lambda m, n=name: f"{n}: {m}")
