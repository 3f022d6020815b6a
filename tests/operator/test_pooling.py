"""Pooling in fused models: PyTorch's own numbers, with less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusing import code
from torch import nn

from fusedconvbn import fuse, track_memory
from fusedconvbn.fusion.pooling import position_mean

FORMATS = pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
DTYPES = pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16)
)

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


@FORMATS
@DTYPES
@pytest.mark.parametrize("dims", ([2, 3], [-1], [1, 2]))
def test_a_mean_to_the_bit(dims, dtype, format, device):
    torch.manual_seed(0)
    x = (60 * torch.randn(3, 5, 67, 9)).to(device, dtype).to(memory_format=format).requires_grad_()
    ours, theirs = position_mean(x, dims), x.mean(dims, keepdim=True)
    assert torch.equal(ours, theirs)
    dout = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, x, dout)[0] for out in (ours, theirs)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "spelling", [*SPELLINGS.values(), *OTHERS.values()], ids=[*SPELLINGS, *OTHERS]
)
def test_a_mean_in_a_model(spelling):
    torch.manual_seed(0)
    net, x = Excited(spelling).double(), torch.randn(2, 3, 8, 9, dtype=torch.float64)
    fused = fuse(copy.deepcopy(net), x)
    assert ("position_mean" in code(net, x)) == (spelling in SPELLINGS.values())
    torch.testing.assert_close(step(fused, x), step(net, x), rtol=1e-9, atol=1e-9)


def test_a_module_stays_what_it_is():
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


# size of the map; kernel_size, stride, padding, dilation, ceil_mode
MAX = {
    "ResNet's": ((11, 13), [3], [2], [1], [1], False),
    "every option": ((9, 8), [3, 2], [2, 1], [1, 0], [1, 2], True),
    "stride of the kernel": ((9, 8), [3, 2], [], [0], [1], False),
    "wider than the map": ((2, 3), [5], [1], [2], [1], False),
    "dilated": ((9, 10), [3], [3], [0], [2], False),
    "256 offsets": ((20, 19), [16], [1], [8], [1], False),
    "more offsets": ((20, 19), [16, 17], [1], [8], [1], False),
}


def own_max_pool(x, options):
    return torch.ops.fusedconvbn.max_pool2d(x, *options)


def max_pool(x, options):
    kernel, stride, *rest = options
    return F.max_pool2d(x, kernel, stride or None, *rest)


@FORMATS
@DTYPES
@pytest.mark.parametrize("case", MAX.values(), ids=MAX)
def test_max_pool_to_the_bit(case, dtype, format, device):
    """With ties and NaN, as PyTorch decides them. On a GPU the sums of its gradient have no
    order."""
    torch.manual_seed(0)
    size, *options = case
    x = torch.randn(3, 6, *size).to(device, dtype).to(memory_format=format)
    x[0, :, :2], x[1, 2, 0, 1] = 0, float("nan")
    x.requires_grad_()
    ours, theirs = own_max_pool(x, options), max_pool(x, options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.stride() == theirs.stride()
    dout = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, x, dout)[0] for out in (ours, theirs)]
    rounding = 0 if device == "cpu" else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(*grads, rtol=rounding, atol=rounding)
    assert grads[0].stride() == grads[1].stride()


def packed(case):
    _, kernel, stride, *rest, ceil_mode = case
    return [v for pair in (kernel, stride or kernel, *rest) for v in (pair * 2)[:2]] + [ceil_mode]


@FORMATS
@pytest.mark.parametrize("case", list(MAX.values())[:-1], ids=list(MAX)[:-1])
def test_where_the_values_were_found(case, format, device):
    size, kernel, stride, *rest = case
    x = torch.randn(3, 6, *size, device=device).to(memory_format=format)
    pool = packed(case)
    out, offsets = torch.ops.fusedconvbn._max_pool2d(x, pool)
    expected, indices = F.max_pool2d(x, kernel, stride or None, *rest, return_indices=True)
    assert torch.equal(out, expected)
    rows, columns = (torch.arange(n, device=device) for n in out.shape[2:])
    row = indices // size[1] - (rows * pool[2] - pool[4])[:, None]
    column = indices % size[1] - (columns * pool[3] - pool[5])
    assert torch.equal(offsets, (row // pool[6] * pool[1] + column // pool[7]).byte())
    assert offsets.stride() == out.stride()


def test_a_window_too_large_for_a_byte():
    with pytest.raises(ValueError, match=r"at most 256 values, got \[16, 17"):
        torch.ops.fusedconvbn._max_pool2d(torch.zeros(1, 1, 30, 30), [16, 17, 1, 1, 8, 8, 1, 1, 0])
    for wrong in ([3, 3], [3, 3, 0, 1, 0, 0, 1, 1, 0]):
        with pytest.raises(ValueError, match="the kernel, stride, padding and dilation"):
            torch.ops.fusedconvbn._max_pool2d(torch.zeros(1, 1, 30, 30), wrong)


@pytest.mark.parametrize("case", list(MAX.values())[:-1], ids=list(MAX)[:-1])
def test_max_pool_operators(case):
    x = torch.randn(2, 3, *case[0]).to(memory_format=torch.channels_last)
    ops, pool = torch.ops.fusedconvbn, packed(case)
    out, offsets = ops._max_pool2d(x, pool)
    torch.library.opcheck(ops._max_pool2d.default, (x, pool))
    dout = torch.randn_like(out, requires_grad=True)
    torch.library.opcheck(ops._max_pool2d_backward.default, (dout, offsets, pool, x.shape, True))


def test_max_pool_keeps_a_byte_a_value():
    x = torch.randn(2, 8, 12, 10, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = own_max_pool(x, [[3], [2], [1]])
    assert sum(t.untyped_storage().nbytes() for t in saved) == out.numel() + 4


@pytest.mark.parametrize("case", MAX.values(), ids=MAX)
def test_max_pool_derivatives(case):
    torch.manual_seed(0)
    size, *options = case
    x = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
    function = lambda x: own_max_pool(x, options)  # noqa: E731
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)
    loss = lambda x: function(x).sin().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    each = torch.func.vmap(torch.func.grad(loss))(torch.stack([x.detach(), x.detach()]))
    torch.testing.assert_close(each, torch.stack([expected, expected]))


@pytest.mark.parametrize(
    "x, options",
    [
        (torch.randn(3, 5, 6), [[2]]),
        (torch.randn(2, 3, 5, 6), [[2]]),
        (torch.randn(0, 3, 5, 6, requires_grad=True), [[2]]),
        (torch.randn(3, 5, 6, requires_grad=True), [[2], [1], [1]]),
    ],
    ids=("no batch", "no gradient", "no samples", "no batch, gradient"),
)
def test_max_pool_of_other_tensors(x, options):
    expected = F.max_pool2d(x, *options)
    ours = own_max_pool(x, options)
    torch.testing.assert_close(ours, expected)
    assert ours.requires_grad == expected.requires_grad


def test_max_pool_errors():
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    for options in ([[2], [1], [2]], [[7]], [[2, 2, 2]]):
        with pytest.raises(RuntimeError) as ours:
            own_max_pool(x, options)
        with pytest.raises(RuntimeError) as theirs:
            torch.max_pool2d(x, *options)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


class Stem(nn.Module):
    """ResNet's, with a pool that is spelled in many ways."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last, self.bn2 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.pool = pool

    def forward(self, x):
        return self.bn2(self.last(self.pool(F.relu(self.bn(self.conv(x))))))


class Functional(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 3, stride=2, padding=(1, 0))


class WithIndices(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2, return_indices=True)[0]


@pytest.mark.parametrize(
    "pool, rewritten",
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((2, 3), ceil_mode=True), True),
        (Functional(), True),
        (WithIndices(), False),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), False),
    ],
    ids=("module", "options", "function", "indices", "module with indices"),
)
def test_max_pool_in_a_model(pool, rewritten):
    torch.manual_seed(0)
    if getattr(pool, "return_indices", False):
        pool = nn.Sequential(pool, First())
    net, x = Stem(pool).double(), torch.randn(2, 3, 9, 11, dtype=torch.float64)
    fused = fuse(copy.deepcopy(net), x)
    assert ("ops.fusedconvbn.max_pool2d" in code(net, x)) == rewritten
    torch.testing.assert_close(step(fused, x), step(net, x), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(torch.jit.script(fused.eval())(x), net.eval()(x))


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_max_pool_in_a_plan():
    """What is predicted of a model with one is what it keeps."""
    net, x = Stem(nn.MaxPool2d(3, 2, 1)), torch.randn(4, 3, 30, 32)
    fused = fuse(net, x, memory="min")
    with track_memory() as memory:
        fused(x).sum().backward()
    pooled = 4 * 8 * 14 * 15
    vectors = 4 * (2 * 8 + 2 * 4 + 1)
    assert memory.saved == 4 * x.numel() + 5 * pooled + vectors
