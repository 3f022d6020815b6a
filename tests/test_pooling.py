"""Means over positions in fused models: the module's own numbers, and no map made for their gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedconvbn import fuse
from fusedconvbn.pooling import position_mean

SPELLINGS = {
    "module": lambda net, x: net.pool(x),
    "function": lambda net, x: F.adaptive_avg_pool2d(x, (1, 1)),
    "keyword": lambda net, x: F.adaptive_avg_pool2d(x, output_size=1),
    "method": lambda net, x: x.mean((2, 3), keepdim=True),
    "over channels too": lambda net, x: x.mean((1, 2, 3), keepdim=True),
    "negative dims": lambda net, x: torch.mean(x, dim=[-1, -2], keepdim=True),
}
OTHERS = {
    "to two": lambda net, x: F.adaptive_avg_pool2d(x, (2, 1)).sum(2, keepdim=True),
    "dtype": lambda net, x: x.mean((2, 3), keepdim=True, dtype=x.dtype),
    "all": lambda net, x: x.mean(),
}


class Excited(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.pool, self.scale = nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1)
        self.project, self.last = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.spelling = spelling

    def forward(self, x):
        x = F.silu(self.bn(self.conv(x)))
        pooled = self.spelling(self, x).expand(x.size(0), 6, 1, 1)
        return self.last(self.project(x * self.scale(pooled).sigmoid()))


def step(net, x):
    out = net(x)
    out.sin().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


def source(net):
    return net.forward.variants[0].source


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dims", ([2, 3], [-1], [1, 2]))
def test_to_the_bit(dims, dtype, format):
    torch.manual_seed(0)
    x = (60 * torch.randn(3, 5, 67, 9)).to(dtype).to(memory_format=format).requires_grad_()
    ours, theirs = position_mean(x, dims), x.mean(dims, keepdim=True)
    assert torch.equal(ours, theirs)
    dout = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, x, dout)[0] for out in (ours, theirs)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "spelling", [*SPELLINGS.values(), *OTHERS.values()], ids=[*SPELLINGS, *OTHERS]
)
def test_in_a_model(spelling):
    torch.manual_seed(0)
    net, x = Excited(spelling).double(), torch.randn(2, 3, 8, 9, dtype=torch.float64)
    fused = fuse(copy.deepcopy(net), x)
    assert ("position_mean" in source(fused)) == (spelling in SPELLINGS.values())
    torch.testing.assert_close(step(fused, x), step(net, x), rtol=1e-9, atol=1e-9)


def test_the_module_stays_what_it_is():
    """Hooks on it run, and other options are seen."""
    net, x = Excited(SPELLINGS["module"]), torch.randn(2, 3, 8, 9)
    fused = fuse(net, x)
    calls = []
    handle = fused.pool.register_forward_hook(lambda *_: calls.append(1))
    fused(x)
    assert calls == [1]
    handle.remove()
    fused.pool.output_size = 2
    with pytest.raises(RuntimeError):  # (N, 6, 2, 2) is not expanded to (N, 6, 1, 1)
        fused(x)


def test_torchscript():
    class Scripted(Excited):
        def __init__(self):
            super().__init__(None)

        def forward(self, x):
            x = F.silu(self.bn(self.conv(x)))
            return self.last(self.project(x * self.scale(self.pool(x)).sigmoid()))

    net, x = Scripted(), torch.randn(2, 3, 8, 9)
    fused = fuse(net, x).eval()
    torch.testing.assert_close(torch.jit.script(fused)(x), net.eval()(x))


def test_no_map_is_made_for_the_gradient():
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(position_mean(x, [2, 3]).sum(), x)
    assert grad.untyped_storage().nbytes() == 4 * 2 * 3
