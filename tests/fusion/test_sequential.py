"""FusedConvBNSequential: a chain built by hand."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fusedconvbn import FusedConvBNSequential, track_memory


def modules(last=None):
    return [
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4, momentum=None),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        last or nn.SiLU(),
    ]


def x(*shape):
    return torch.randn(shape or (3, 6, 5, 4), dtype=torch.float64, requires_grad=True)


def compare(ours, theirs, *inputs):
    """Results and gradients of two functions, each with the parameters it is computed with."""
    results = []
    for function, parameters in (ours, theirs):
        out = function(*inputs)
        leaves = [t for given in inputs for t in (given if isinstance(given, list) else [given])]
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*leaves, *parameters])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", (nn.SiLU(), nn.PReLU(6)), ids=str)
@pytest.mark.parametrize("memory", ("auto", "min"))
@pytest.mark.parametrize("train", (True, False))
def test_is_the_sequential(memory, train, last):
    made = nn.Sequential(*modules(copy.deepcopy(last))).double()
    fused = FusedConvBNSequential(*copy.deepcopy(list(made)), memory=memory).train(train)
    made.train(train)
    assert list(fused.state_dict()) == list(made.state_dict())
    ours, theirs = list(fused.parameters()), list(made.parameters())
    compare((fused, ours), (made, theirs), x())
    residual = lambda t, r: made[8](made[:8](t) + r)  # noqa: E731
    compare((fused, ours), (residual, theirs), x(), x())
    concatenation = lambda parts: made(torch.cat(parts, 1))  # noqa: E731
    compare((fused, ours), (concatenation, theirs), [x(3, 1, 5, 4), x(3, 5, 5, 4)])
    for ours, theirs in zip(fused.buffers(), made.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saves_its_input_and_what_it_keeps():
    made = modules()
    t = torch.randn(4, 6, 24, 20, requires_grad=True) * 1
    map_bytes = 4 * 4 * 24 * 20 * 4
    with track_memory() as least:
        FusedConvBNSequential(*made, memory="min")(t)
    with track_memory() as auto:
        FusedConvBNSequential(*made)(t)
    with track_memory() as eager:
        nn.Sequential(*made)(t)
    assert t.nbytes <= least.saved < t.nbytes + (8 << 10)
    assert auto.saved in range(t.nbytes, t.nbytes + 2 * map_bytes + (8 << 10))
    assert eager.saved > 3 * auto.saved


def test_script_and_compile():
    made = [*modules()[:5], nn.PReLU(), *modules(nn.PReLU(6))[6:]]
    fused = FusedConvBNSequential(OrderedDict((f"m{i}", m) for i, m in enumerate(made)))
    other = copy.deepcopy(fused)
    scripted = torch.jit.script(fused)
    stream = io.BytesIO()
    torch.jit.save(scripted, stream)
    stream.seek(0)
    t = x().float()
    torch.testing.assert_close(torch.jit.load(stream)(t), other(t))
    assert set(scripted.state_dict()) == set(other.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t, t), copy.deepcopy(other)(t, t))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "expected at least one module"),
        ([nn.Conv2d(3, 3, 1), nn.ReLU()], "expected module '1' to stand behind a batch norm"),
        ([nn.Linear(3, 3)], "expected module '0' to be a convolution, batch norm or activation"),
        (
            [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")],
            "expected module '1' to come first",
        ),
    ],
)
def test_what_is_no_chain(made, message):
    with pytest.raises(ValueError, match=message):
        FusedConvBNSequential(*made)


def test_other_errors():
    with pytest.raises(ValueError, match='expected memory "auto" or "min"'):
        FusedConvBNSequential(*modules(), memory=0.5)
    with pytest.raises(ValueError, match="expected no residual"):
        FusedConvBNSequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))(
            torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        )
